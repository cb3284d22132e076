"""The sampler against a literal reading of its description, row by row, and the exactness of its draws."""

import dataclasses
import math
import random
from collections.abc import Sequence

import pytest
import torch

from engine import InvalidParameterError, SamplingParams
from engine.sampler import Sampler, position_uniforms

VOCAB = 40
PROMPT = [3, 3, 5, 9]
SAID = [5, 5, 11, 12]  # the answer so far: two committed, two drafted


def reference_uniform(seed: int, position: int) -> float:
    """Two rounds of splitmix64 in Python's whole numbers."""
    mask = (1 << 64) - 1

    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    return (mix((mix(seed) + position) & mask) >> 11) * 2.0**-53


def reference_chances(logits: Sequence[float], params: SamplingParams, said: Sequence[int] = ()) -> list[float]:
    """The distribution after all controls, one after the other, as the settings describe them."""
    row = [logit + dict(params.logit_bias).get(token, 0.0) for token, logit in enumerate(logits)]
    for token in range(len(row)):
        if token in PROMPT or token in said:
            row[token] *= 1 / params.repetition_penalty if row[token] > 0 else params.repetition_penalty
        if token in said:
            row[token] -= params.presence_penalty + params.frequency_penalty * list(said).count(token)
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    weight = {token: math.exp((row[token] - row[order[0]]) / params.temperature) for token in order}
    kept = order[: params.top_k or len(order)]
    kept = [token for token in kept if weight[token] >= params.min_p]
    total, before, nucleus = sum(weight[token] for token in kept), 0.0, []
    for token in kept:
        if before < params.top_p * total:
            nucleus.append(token)
        before += weight[token]
    mass = sum(weight[token] for token in nucleus)
    return [weight[token] / mass if token in nucleus else 0.0 for token in range(len(row))]


def random_params(draw: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=draw.uniform(0.2, 2.0),
        top_k=draw.choice([0, 1, 3, 17, 39, 40, 1000]),
        top_p=draw.choice([1.0, 0.95, 0.6, 0.05]),
        min_p=draw.choice([0.0, 0.02, 0.3, 1.0]),
        repetition_penalty=draw.choice([1.0, 0.5, 1.7]),
        presence_penalty=draw.choice([0.0, 1.1, -0.7]),
        frequency_penalty=draw.choice([0.0, 0.4, -1.2]),
        logit_bias=draw.choice([(), ((4, 3.0), (11, -100.0))]),
    )


def started(params: SamplingParams, seed: int = 0, vocab: int = VOCAB) -> Sampler:
    sampler = Sampler(vocab, "cpu")
    sampler.start(params, seed, PROMPT)
    return sampler


def above(*rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The drafted tokens of all rows, and which of them each row follows."""
    tokens = [token for row in rows for token in row]
    mask, first = torch.zeros(len(rows), len(tokens), dtype=torch.bool), 0
    for index, row in enumerate(rows):
        mask[index, first : first + len(row)] = True
        first += len(row)
    return torch.tensor(tokens, dtype=torch.int64), mask


@pytest.mark.parametrize("case", range(60))
def test_probabilities_are_those_of_the_description(case: int) -> None:
    draw = random.Random(case)
    params, logits = random_params(draw), torch.randn(2, VOCAB) * 2
    sampler = started(params)
    committed = torch.tensor(SAID[:2])
    sampler.history.add(committed, torch.tensor([True, True]))
    got = sampler.probabilities(logits, *above(SAID[2:], [7]))
    for row, said in zip(range(2), (SAID, [*SAID[:2], 7]), strict=True):
        assert got[row].tolist() == pytest.approx(reference_chances(logits[row].tolist(), params, said), abs=1e-6)


def test_random_numbers_are_those_of_splitmix64() -> None:
    draw = random.Random(1)
    for seed in (0, 1, 2**32, 2**63 - 1, draw.getrandbits(63)):
        positions = [0, 1, 2, 1000, draw.getrandbits(31)]
        got = position_uniforms(torch.tensor([seed]), torch.tensor(positions)).tolist()
        assert got == [reference_uniform(seed, position) for position in positions]
        assert all(0 <= number < 1 for number in got)


@pytest.mark.parametrize("case", range(12))
def test_a_row_has_the_same_token_whatever_stands_beside_it(case: int) -> None:
    params = dataclasses.replace(random_params(random.Random(case)), logit_bias=())
    vocab = 3001  # more than are put in order at once, and no multiple of a vector's length
    logits = torch.randn(17, vocab) * (0.05 if case % 3 == 0 else 2)
    sampler, positions = started(params, 9, vocab), torch.arange(100, 117)
    rows = [[index % 5, 2] for index in range(17)]
    together = sampler.choose(logits, positions, *above(*rows)).tolist()
    assert len(set(together)) > 1 or params.top_k == 1 or params.min_p == 1
    for index in range(17):
        alone = sampler.choose(logits[index : index + 1].clone(), positions[index : index + 1], *above(rows[index]))
        assert alone.item() == together[index]


@pytest.mark.parametrize("flatness", [0.01, 0.3, 3.0, 12.0])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"min_p": 0.2},
        {"top_p": 0.02},
        {"top_p": 0.9},
        {"top_p": 0.999, "min_p": 0.001},
        {"top_k": 50, "top_p": 0.7},
        {"top_k": 2500},
        {"top_k": 2500, "top_p": 0.9, "min_p": 1e-4},
    ],
)
def test_a_single_row_on_a_cpu_keeps_what_many_rows_keep(flatness: float, settings: dict[str, float]) -> None:
    """One row is looked at by candidates, several are put in order as on a GPU."""
    logits = (torch.randn(2, 5000) * flatness).round(decimals=2)  # with ties
    for temperature in (1e-6, 0.4, 3.0):
        sampler = started(SamplingParams(temperature=temperature, **settings), vocab=5000)  # type: ignore[arg-type]
        both = sampler.probabilities(logits, *above([], []))
        for row in range(2):
            assert torch.equal(sampler.probabilities(logits[row : row + 1], *above([]))[0], both[row])


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.3}])
def test_equal_logits_go_by_token(settings: dict[str, float]) -> None:
    logits = torch.zeros(1, 2000)
    logits[0, ::2] = -0.0
    sampler = started(SamplingParams(temperature=1.0, **settings), vocab=2000)  # type: ignore[arg-type]
    chances = sampler.probabilities(logits, *above([]))[0]
    assert chances.nonzero().flatten().tolist() == list(range(3 if "top_k" in settings else 600))


def test_greedy_heeds_bias_and_penalties_and_takes_the_lower_of_equals() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 20:22] = 2.0

    def choice(said: Sequence[int] = (), **settings: object) -> int:
        sampler = started(SamplingParams(**settings))  # type: ignore[arg-type]
        return int(sampler.choose(logits, torch.tensor([8]), *above(said)))

    assert choice() == 20
    assert choice(logit_bias=((30, 2.5),)) == 30
    assert choice([20], presence_penalty=0.1) == 21
    assert choice([20, 21, 21], frequency_penalty=0.1) == 20
    assert choice([20], repetition_penalty=1.1) == 21
    assert choice([20], repetition_penalty=0.9) == 20


def test_extreme_temperatures_are_finite() -> None:
    logits = torch.randn(1, VOCAB)
    for temperature in (5e-324, 1e-30, 5.0):
        chances = started(SamplingParams(temperature=temperature)).probabilities(logits, *above([]))
        assert float(chances.sum()) == pytest.approx(1)
        assert (float(chances.max()) == 1) == (temperature < 1)


def test_a_bias_of_a_token_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="names token 40; allowed with this model is 0 to 39"):
        started(SamplingParams(logit_bias=((40, 1.0),)))
