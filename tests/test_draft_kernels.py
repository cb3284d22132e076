"""The kernels that draft in few launches, against plain torch: on a CPU through the emulator, and on a GPU."""

import pytest
import torch
from cuda_emulator import COMPILER, load_emulated
from torch import Tensor

from engine.kernels import nvrtc
from engine.kernels.draft_guesses import Guessed, GuessLists, list_guesses, settle_guesses, token_tiles
from engine.kernels.int8_linear import Int8Weight, pack_int8

FIXED_ONE = 65536


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(COMPILER is None, reason="the emulator is built with g++")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def machine(request):
    """A device and the way to load a kernel for it."""
    if request.param == "cpu":
        return torch.device("cpu"), load_emulated
    if not nvrtc.is_available() or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no CUDA device with the run-time compiler and integer tensor cores")
    return torch.device("cuda"), nvrtc.load_kernel


def random(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def as_sums(values: Tensor, copies: int, rows: int) -> Tensor:
    """Values [rows, hidden] as the kernels add them: shares in fixed point, a carry of pairs included."""
    shares = torch.zeros(copies, 8 * token_tiles(rows), values.shape[1], dtype=torch.int64)
    whole = (values.double() * FIXED_ONE).round().long()
    shares[0, :rows] = whole
    if copies > 1:
        shares[1, :rows] = whole // 3
        shares[0, :rows] -= whole // 3
    pairs = shares[..., 0::2] + (shares[..., 1::2] << 32)
    return pairs.contiguous().view(torch.int32).view(shares.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("vocab", "rows", "guesses", "copies"), [(48, 1, 3, 0), (400, 7, 16, 1), (1024, 9, 2, 2), (528, 20, 5, 0)]
)
def test_the_best_guesses_and_their_chances(machine, dtype, vocab, rows, guesses, copies):
    device, load = machine
    values = Int8Weight.from_dense(random(vocab, 128, seed=1))
    output = pack_int8([Int8Weight(values.codes.to(device), values.scale.to(device))], dtype)
    x, more = random(rows, 128, seed=2).to(dtype), random(rows, 128, seed=3, std=3.0)
    added = as_sums(more, copies, rows).to(device) if copies else None
    token_map = torch.randperm(5000, generator=torch.Generator().manual_seed(4))[:vocab].int()
    lists = GuessLists.empty(vocab, rows, guesses, device)
    list_guesses(x.to(device), output, lists, token_map=token_map.to(device), added=added, load=load)

    want = (x.double() + (more if copies else 0)) @ values.dequantize().double().T
    row_of, rank_of = (part.flatten().int() for part in torch.meshgrid(torch.arange(rows), torch.arange(guesses), indexing="ij"))
    tokens, chances = torch.full((rows * guesses + 2,), -1).int().to(device), torch.zeros(rows * guesses + 2, device=device)
    nodes = range(1, rows * guesses + 1)  # all but those around them
    shifted = (torch.cat([part[:1], part, part[:1]]).to(device) for part in (row_of, rank_of))
    cleared = torch.ones(3, 300, dtype=torch.int32, device=device)
    settle_guesses(lists, Guessed(*shifted, tokens, chances, nodes), cleared=cleared, load=load)
    assert tokens[[0, -1]].tolist() == [-1, -1] and int(cleared.abs().max()) == 0
    best = want.topk(guesses)
    torch.testing.assert_close(
        chances[1:-1].view(rows, guesses).cpu().double(), want.softmax(-1).gather(1, best.indices), rtol=0.02, atol=1e-6
    )
    same = tokens[1:-1].view(rows, guesses).cpu() == token_map[best.indices]
    assert same.float().mean() > 0.95  # 16 bits of a row, against float64


def test_smaller_tokens_come_first_among_equals(machine):
    device, load = machine
    codes = torch.zeros(512, 64, dtype=torch.int8)
    codes[[7, 300, 301], 0] = 3
    output = pack_int8([Int8Weight(codes.to(device), torch.ones(512, device=device))], torch.bfloat16)
    token_map = torch.arange(512, dtype=torch.int32, device=device).flip(0).contiguous()
    lists = GuessLists.empty(512, 1, 6, device)
    list_guesses(torch.ones(1, 64).bfloat16().to(device), output, lists, token_map=token_map, load=load)
    zeros, ranks = torch.zeros(6, dtype=torch.int32, device=device), torch.arange(6, dtype=torch.int32, device=device)
    tokens, chances = torch.zeros_like(zeros), torch.zeros(6, device=device)
    settle_guesses(lists, Guessed(zeros, ranks, tokens, chances, range(6)), load=load)
    assert tokens.tolist() == [210, 211, 504, 0, 1, 2]
