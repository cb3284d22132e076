"""The kernels that draft in few launches, against plain torch: on a CPU through the emulator, and on a GPU."""

import pytest
import torch
from cuda_emulator import COMPILER, load_emulated
from test_cuda_runner import CONFIG
from torch import Tensor
from torch.nn import functional as F

from engine.cuda_memory import StepMemory
from engine.cuda_plan import TreePlan
from engine.heads import seen_embeddings
from engine.kernels import fused_ops, nvrtc
from engine.kernels.draft_blocks import add_block
from engine.kernels.draft_guesses import (
    Guessed,
    GuessLists,
    Unsettled,
    embed_guessed,
    list_guesses,
    settle_guesses,
    token_tiles,
)
from engine.kernels.int8_linear import Int8Weight, pack_int8
from engine.kernels.linear_inputs import Seen
from engine.kernels.small_batch_linear import PackedLinear
from engine.tree import CandidateTree

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
    row_of = torch.arange(rows, dtype=torch.int32).repeat_interleave(guesses)
    rank_of = torch.arange(guesses, dtype=torch.int32).repeat(rows)
    tokens = torch.full((rows * guesses + 2,), -1, dtype=torch.int32, device=device)
    chances = torch.zeros(rows * guesses + 2, device=device)
    nodes = range(1, rows * guesses + 1)  # all but those around them
    shifted = (torch.cat([part[:1], part, part[:1]]).to(device) for part in (row_of, rank_of))
    cleared = torch.ones(3, 300, dtype=torch.int32, device=device)
    unsettled = Unsettled(lists, Guessed(*shifted, tokens, chances, nodes), cleared)
    settle_guesses(unsettled, load=load)
    assert tokens[[0, -1]].tolist() == [-1, -1] and int(cleared.abs().max()) == 0
    best = want.topk(guesses)
    torch.testing.assert_close(
        chances[1:-1].view(rows, guesses).cpu().double(), want.softmax(-1).gather(1, best.indices), rtol=0.02, atol=1e-6
    )
    same = tokens[1:-1].view(rows, guesses).cpu() == token_map[best.indices]
    assert same.float().mean() > 0.95  # 16 bits of a row, against float64

    table, out = (random(size, 64, seed=5).to(device, dtype) for size in (5000, len(tokens)))
    record, settled, settled_chances = fused_ops.new_record(device), tokens.clone(), chances.clone()
    record[fused_ops.BONUS] = 77
    tokens[nodes], chances[nodes], tokens[-1] = 0, 0, 88
    cleared.fill_(1)
    embed_guessed(unsettled, table, record, out, load=load)
    assert torch.equal(tokens[nodes], settled[nodes]) and torch.equal(chances, settled_chances)
    assert tokens[[0, -1]].tolist() == [77, 88] and int(cleared.abs().max()) == 0
    assert torch.equal(out, table[tokens])


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
    settle_guesses(Unsettled(lists, Guessed(zeros, ranks, tokens, chances, range(6))), load=load)
    assert tokens.tolist() == [210, 211, 504, 0, 1, 2]


def int8(rows: int, columns: int, seed: int) -> Int8Weight:
    return Int8Weight.from_dense(random(rows, columns, seed=seed, std=columns**-0.5))


def pack(weight: Int8Weight, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> PackedLinear:
    return pack_int8([Int8Weight(weight.codes.to(device), weight.scale.to(device))], dtype)


def from_sums(sums: Tensor, rows: int) -> Tensor:
    """What the kernels have added, float64 [rows, hidden]."""
    pairs = sums.cpu().contiguous().view(torch.int64).sum(0)[:rows]
    low = (pairs << 32) >> 32
    return torch.stack([low, (pairs - low) >> 32], dim=-1).flatten(1).double() / FIXED_ONE


def wide_block(x: Tensor, up: Int8Weight, down: Int8Weight) -> Tensor:
    inner = F.silu(x.double() @ up.dequantize().double().T)
    return inner @ down.dequantize().double().T


def error(out: Tensor, want: Tensor) -> float:
    return float((out.double().cpu() - want).norm() / want.norm())


TREE = CandidateTree.from_choices([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (1, 0, 2)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "copies"), [(1, 1), (6, 2), (13, 1)])
def test_blocks_follow_each_other_through_sums(machine, dtype, rows, copies):
    device, load = machine
    matrices = [int8(192, 128, 1), int8(128, 192, 2), int8(192, 128, 3), int8(128, 192, 4)]
    up, down, *second = (pack(matrix, device, dtype) for matrix in matrices)
    sums = torch.zeros(2, copies, 8 * token_tiles(rows), 128, dtype=torch.int32, device=device)
    state = random(1, 128, seed=5).to(dtype)
    base = state if rows == 1 else random(rows, 128, seed=6).to(dtype)
    x = torch.full((rows, 128), torch.nan, dtype=dtype, device=device)
    add_block(base.to(device), up, down, sums[0], rows=rows, load=load)
    add_block(base.to(device), *second, sums[1], rows=rows, added=sums[0], x_out=x, load=load)
    after = base.double() + wide_block(base, *matrices[:2])
    assert error(from_sums(sums[0], rows), after - base.double()) < 4e-3
    assert error(x, after) < 4e-3
    assert error(from_sums(sums[1], rows), wide_block(after, *matrices[2:])) < 6e-3
    again = torch.zeros_like(sums[0])
    add_block(base.to(device), up, down, again, rows=rows, load=load)
    assert torch.equal(from_sums(again, rows), from_sums(sums[0], rows))


WIDE = CandidateTree.from_choices(
    [(i,) for i in range(3)]
    + [(i, j) for i in range(3) for j in range(2)]
    + [(i, j, 0) for i in range(3) for j in range(2)]
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize(("tree", "head"), [(TREE, 1), (TREE, 2), (WIDE, 2)])
def test_a_first_block_sees_tokens_and_settles_guesses(machine, dtype, merges, tree, head):
    device, load = machine
    table, state = random(300, 128, seed=1).to(dtype), random(1, 128, seed=2).to(dtype)
    matrices = int8(64, (2 + head) * 128, 3), int8(128, 64, 4)
    output = pack(int8(300 // 16 * 16, 128, 5), device, dtype)
    record = fused_ops.new_record(device)
    record[fused_ops.BONUS] = 40
    plan = TreePlan(tree, StepMemory(CONFIG, dtype, device), sees_path=True)
    before, turn = plan.rounds[head - 1 : head + 1]
    tokens, chances = torch.arange(tree.num_nodes).int().to(device) + 100, torch.zeros(tree.num_nodes, device=device)
    lists = GuessLists.empty(output.n, before.num_rows, before.guesses, device)
    rows = random(before.num_rows, 128, seed=6).to(dtype)
    list_guesses(rows.to(device), output, lists, load=load)
    guessed = Guessed(plan.row_of, plan.rank, tokens, chances, before.nodes)
    want_tokens, want_chances = tokens.clone(), chances.clone()
    apart = Guessed(plan.row_of, plan.rank, want_tokens, want_chances, before.nodes)
    settle_guesses(Unsettled(lists, apart), load=load)
    old = torch.ones(4, 64, dtype=torch.int32, device=device)
    if not merges:
        tokens.copy_(want_tokens)
    sums = torch.zeros(1, 8, 128, dtype=torch.int32, device=device)
    seen = Seen(table.to(device), tokens, record, plan.ancestor_at, turn.row_nodes)
    options = {"rows": turn.num_rows, "seen": seen, "merges": merges}
    if merges:
        options["unsettled"] = Unsettled(lists, guessed, old)
    add_block(state.to(device), *(pack(matrix, device, dtype) for matrix in matrices), sums, load=load, **options)
    if merges:
        assert torch.equal(tokens, want_tokens) and torch.equal(chances, want_chances) and not old.any()
    inputs = []
    for node in turn.row_nodes.tolist():
        path = [40, *(int(want_tokens[n]) for n in tree.path_to(node)[1:])]
        inputs.append(torch.cat([state.float(), seen_embeddings(table[path].float())]).flatten())
    want = wide_block(torch.stack(inputs), *matrices)
    assert error(from_sums(sums, turn.num_rows), want) < 5e-3
