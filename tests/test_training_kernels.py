"""The generator's two kernels against plain torch: odd lengths, grouped heads, greedy and drawn rows."""

import pytest
import torch

from engine.training import ragged_attention, row_sampler
from engine.training.ragged_attention import attend_rows_plain
from engine.training.row_sampler import choose_tokens_plain


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _kernel_runs() -> bool:
    """A kernel runs on a GPU, or anywhere in Triton's interpreter (TRITON_INTERPRET=1)."""
    return ragged_attention.has_triton() and (
        torch.cuda.is_available() or ragged_attention.triton.knobs.runtime.interpret
    )


needs_kernel = pytest.mark.skipif(not _kernel_runs(), reason="needs Triton and a GPU, or TRITON_INTERPRET=1")


def _case(heads: int, kv_heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(heads)
    slots, capacity, dim = 5, 150, 64

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(_device())

    position = torch.tensor([0, 1, 63, 64, 149]).to(_device())
    cache = draw(2, slots, kv_heads, capacity, dim)
    return draw(slots, heads, dim), draw(slots, kv_heads, dim), draw(slots, kv_heads, dim), cache, position


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (8, 1)])
def test_plain_attention_reads_each_rows_own_length(heads: int, kv_heads: int) -> None:
    query, key, value, cache, position = _case(heads, kv_heads, torch.float32)
    expected = cache.double().clone()
    out = attend_rows_plain(query, key, value, cache[0], cache[1], position)
    for row, length in enumerate(position.tolist()):
        keys, values = (part[row, :, : length + 1].clone() for part in expected)
        keys[:, length], values[:, length] = key[row].double(), value[row].double()
        keys, values = (part.repeat_interleave(heads // kv_heads, 0) for part in (keys, values))
        weights = torch.einsum("hd,htd->ht", query[row].double(), keys).div(8).softmax(-1)
        torch.testing.assert_close(out[row].double(), torch.einsum("ht,htd->hd", weights, values), rtol=1e-4, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (8, 1)])
def test_attention_kernel_equals_plain(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and _device() == "cpu":
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16")
    query, key, value, cache, position = _case(heads, kv_heads, dtype)
    other = cache.clone()
    out = ragged_attention.attend_rows_triton(query, key, value, cache[0], cache[1], position)
    expected = attend_rows_plain(query, key, value, other[0], other[1], position)
    tolerance = 2e-3 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.float(), expected.float(), rtol=tolerance, atol=tolerance)
    assert torch.equal(cache, other)


def _check_choice(choose) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = (torch.randn(64, 5003, generator=generator) * 4).to(_device())
    temperature = torch.tensor([0.0, 0.7] * 32, device=_device())
    seed = torch.zeros(1, dtype=torch.int64, device=_device())
    first = choose(scores, temperature, 0.05, seed)
    second = choose(scores, temperature, 0.05, seed)
    assert torch.equal(first[::2], scores[::2].argmax(1)) and torch.equal(first[::2], second[::2])
    assert (first[1::2] != second[1::2]).any()
    chances = (scores / 0.7).softmax(1)
    chosen = chances.gather(1, first[:, None])[:, 0]
    assert (chosen >= 0.05 * chances.amax(1) * 0.999).all()


def test_plain_choice_is_the_best_or_a_likely_draw() -> None:
    _check_choice(choose_tokens_plain)


@needs_kernel
def test_choice_kernel_is_the_best_or_a_likely_draw() -> None:
    _check_choice(row_sampler.choose_tokens_triton)


def _frequencies(choose) -> torch.Tensor:
    scores = torch.tensor([[2.0, 1.0, 0.0, -9.0]]).repeat(4000, 1).to(_device())
    temperature = torch.full((4000,), 0.7, device=_device())
    chosen = choose(scores, temperature, 0.05, torch.zeros(1, dtype=torch.int64, device=_device()))
    return torch.bincount(chosen.cpu(), minlength=4) / 4000


@pytest.mark.parametrize("name", ["plain", pytest.param("kernel", marks=needs_kernel)])
def test_draws_follow_the_distribution(name: str) -> None:
    choose = choose_tokens_plain if name == "plain" else row_sampler.choose_tokens_triton
    expected = torch.tensor([2.0, 1.0, 0.0, float("-inf")]).div(0.7).softmax(0)
    torch.testing.assert_close(_frequencies(choose), expected, atol=0.03, rtol=0)
