"""The CUDA kernels against float64, on a CPU through the emulator (where g++ is) and on a GPU where there is one.

What is compared for equality of bits holds on both: a row's result must not depend on the rows beside it or on how the
work is cut. Attention has its own file.
"""

import pytest
import torch
from cuda_emulator import COMPILER, load_emulated
from torch.nn import functional as F

from engine import cuda_weights
from engine.block_weights import DenseWeight
from engine.kernels import fused_ops, linear_config, nvrtc, reference
from engine.kernels.dense_linear import pack_dense
from engine.kernels.draft_ops import draft_tokens, gather_seen, silu_rows
from engine.kernels.int8_linear import Int8Weight, pack_int8
from engine.kernels.linear_config import Decode, LinearConfig
from engine.kernels.linear_inputs import Norm, Seen
from engine.kernels.nf4_linear import NF4_VALUES, Nf4Weight, code_tables, pack_nf4
from engine.kernels.small_batch_linear import PackedLinear, Workspace, run_linear
from engine.kernels.tree_attention import ancestor_table
from engine.tree import CandidateTree

DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}
TREE = CandidateTree.from_choices([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 0, 0, 0)])


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
    if not nvrtc.is_available():
        pytest.skip("no CUDA device with the run-time compiler")
    return torch.device("cuda"), nvrtc.load_kernel


def random(*shape, dtype, device, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def error(out, want):
    return float((out.double().cpu() - want.cpu()).norm() / want.norm())


def random_nf4(n, k, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    return Nf4Weight(codes.to(device), (torch.rand(n, k // 64, generator=generator) + 0.5).to(device))


def packed(kind, n, k, dtype, device) -> tuple[PackedLinear, torch.Tensor, list[int]]:
    """A packed matrix, its values, and the ways to decode it."""
    if kind == "nf4":
        weight = random_nf4(n, k, device)
        return pack_nf4([weight], dtype), weight.dequantize(), [Decode.NF4_TABLE, Decode.NF4_PERMUTE]
    values = random(n, k, dtype=dtype, device=device, seed=1)
    if kind == "int8":
        weight = Int8Weight.from_dense(values)
        return pack_int8([weight], dtype), weight.dequantize(), [Decode.INT8]
    return pack_dense(values), values, [Decode.DENSE]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "int8", "dense"])
@pytest.mark.parametrize(("n", "k", "tokens"), [(16, 64, 1), (80, 704, 13), (48, 1088, 33)])
def test_linear_is_close_to_float64_and_the_same_for_every_cut(machine, dtype, kind, n, k, tokens):
    device, load = machine
    weight, values, decodes = packed(kind, n, k, dtype, device)
    x, workspace = random(tokens, k, dtype=dtype, device=device), Workspace(device)
    tiles = linear_config.token_tiles_for(tokens)
    cuts = [(tiles, 1, 1, 8, 1), (tiles, 2, 2, 2, 2), (tiles, 1, 4, 1, 4)]
    results = []
    for config in (LinearConfig(decode, *cut) for decode in decodes for cut in cuts):
        out = torch.full((tokens, n), torch.nan, dtype=dtype, device=device)
        results.append(run_linear(x, weight, config, workspace, out=out, load=load))
    assert error(results[0], reference.linear(x, values)) < TOLERANCE[dtype]
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert int(workspace.counters.abs().max()) == 0


# (row_warps, slice_warps, depth, min_blocks, prefetch, wgmma, cluster, x_blocks, wide_table)
WGMMA_CUTS = [
    *((4, 1, 3, 1, 1, 1, 1, 2, 0), (4, 4, 3, 1, 1, 1, 1, 2, 1), (12, 1, 4, 1, 0, 1, 2, 2, 1)),
    (4, 2, 3, 1, 0, 1, 4, 4, 0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "int8", "dense"])
@pytest.mark.parametrize(("n", "k", "tokens"), [(16, 64, 1), (144, 704, 13), (80, 1600, 33)])
def test_hopper_linear_is_close_to_float64_and_the_same_for_every_cut(machine, dtype, kind, n, k, tokens):
    device, load = machine
    if device.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU")
    weight, values, decodes = packed(kind, n, k, dtype, device)
    x, workspace = random(tokens, k, dtype=dtype, device=device), Workspace(device)
    tiles, results = linear_config.token_tiles_for(tokens), []
    for config in (LinearConfig(decode, tiles, 1, *cut) for decode in decodes for cut in WGMMA_CUTS):
        if not config.fits(k, 227 * 1024):
            continue
        out = torch.full((tokens, n), torch.nan, dtype=dtype, device=device)
        results.append(run_linear(x, weight, config, workspace, out=out, load=load))
    assert error(results[0], reference.linear(x, values)) < TOLERANCE[dtype]
    assert all(torch.equal(results[0], other) for other in results[1:])
    fewer = run_linear(x[:1], weight, LinearConfig(decodes[0], 1, 1, *WGMMA_CUTS[1]), workspace, load=load)
    assert torch.equal(fewer, results[0][:1])
    assert int(workspace.counters.abs().max()) == 0


# (row_tiles, row_warps, slice_warps, row_loop)
RESIDENT_CUTS = [(1, 1, 8, 1), (2, 2, 4, 1), (1, 2, 2, 2), (1, 3, 1, 3), (2, 1, 8, 2)]


def resident(decode, tokens, cut):
    *shape, row_loop = cut
    return LinearConfig(decode, linear_config.token_tiles_for(tokens), *shape, depth=0, row_loop=row_loop, resident=1)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("nf4", torch.bfloat16), ("int8", torch.bfloat16), ("int8", torch.float16), ("dense", torch.float16)],
)
@pytest.mark.parametrize(("n", "k", "tokens"), [(16, 64, 1), (112, 576, 13), (48, 704, 33)])
def test_resident_linear_has_the_bits_of_the_other(machine, dtype, kind, n, k, tokens):
    device, load = machine
    weight, values, decodes = packed(kind, n, k, dtype, device)
    x, workspace = random(tokens, k, dtype=dtype, device=device), Workspace(device)
    residual = random(tokens, n, dtype=dtype, device=device, seed=4)
    want = LinearConfig(decodes[0], linear_config.token_tiles_for(tokens), 1, 1, 8, 1)
    plain = run_linear(x, weight, want, workspace, load=load)
    added = run_linear(x, weight, want, workspace, residual=residual, load=load)
    assert error(plain, reference.linear(x, values)) < TOLERANCE[dtype]
    for config in (resident(decode, tokens, cut) for decode in decodes for cut in RESIDENT_CUTS):
        if config.shared_bytes(k) > 190 * 1024:  # beside the table no multiprocessor has so much
            continue
        out = torch.full((tokens, n), torch.nan, dtype=dtype, device=device)
        assert torch.equal(run_linear(x, weight, config, workspace, out=out, load=load), plain), str(config)
        out.copy_(residual)
        assert torch.equal(run_linear(x, weight, config, workspace, residual=out, out=out, load=load), added)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "k", "tokens"), [("int8", 576, 1), ("nf4", 64, 7), ("int8", 2048, 17)])
def test_a_linear_normalises_to_the_bits_of_the_norm(machine, dtype, kind, k, tokens):
    device, load = machine
    weight, _, decodes = packed(kind, 48, k, dtype, device)
    x, norm = (random(*size, dtype=dtype, device=device, seed=s) for s, size in ((0, (tokens, k)), (1, (k,))))
    workspace = Workspace(device)
    for cut in RESIDENT_CUTS[:3]:
        config = resident(decodes[-1], tokens, cut)
        assert config.can_normalize(k)
        apart = run_linear(fused_ops.rms_norm(x, norm, 1e-5, load=load), weight, config, workspace, load=load)
        normed = torch.full_like(x, torch.nan)
        together = run_linear(x, weight, config, workspace, norm=Norm(norm, 1e-5, normed), load=load)
        assert torch.equal(together, apart)
        assert torch.equal(normed, fused_ops.rms_norm(x, norm, 1e-5, load=load))


@pytest.mark.parametrize("cut", RESIDENT_CUTS)
@pytest.mark.parametrize("tokens", [3, 12])
def test_a_linear_tells_each_tokens_best(machine, cut, tokens):
    device, load = machine
    weight, _, _ = packed("int8", 208, 576, torch.bfloat16, device)
    x, workspace = random(tokens, 576, dtype=torch.bfloat16, device=device), Workspace(device)
    x[1] = 0  # all results are equal
    config = resident(Decode.INT8, tokens, cut)
    logits = run_linear(x, weight, config, workspace, out=torch.empty(tokens, 208, device=device), load=load)
    keys = torch.zeros(tokens, config.num_places(208), dtype=torch.int64, device=device)
    run_linear(x, weight, config, workspace, best=True, out=keys, load=load)
    found = fused_ops.best_tokens(keys)
    assert torch.equal(found, fused_ops.best_tokens(fused_ops.argmax_keys(logits, load=load)))
    assert found[1] == 0


def test_a_linear_gathers_what_a_head_sees(machine):
    device, load = machine
    dtype, workspace = torch.bfloat16, Workspace(device)
    weight, _, _ = packed("int8", 64, 3 * 192, dtype, device)
    table, state = (random(*size, dtype=dtype, device=device, seed=s) for s, size in enumerate([(50, 192), (1, 192)]))
    tokens = torch.arange(10, 10 + TREE.num_nodes, dtype=torch.int32, device=device)
    record, ancestors = fused_ops.new_record(device), ancestor_table(TREE.ancestors, TREE.depth).to(device)
    record[fused_ops.BONUS] = 40
    nodes = torch.tensor([4, 6, 5, 7, 8, 4, 4, 4, 6], dtype=torch.int32, device=device)
    inputs, x = (torch.zeros(size, dtype=dtype, device=device) for size in ((9, 3, 192), (9, 192)))
    gather_seen(state, table, tokens, record, ancestors, nodes, inputs, x, load=load)
    config, seen = resident(Decode.INT8, 9, (1, 1, 8, 1)), Seen(table, tokens, record, ancestors, nodes)
    apart = run_linear(inputs.flatten(1), weight, config, workspace, silu=True, load=load)
    together = run_linear(state, weight, config, workspace, seen=seen, silu=True, load=load)
    assert error(together, apart.double()) < TOLERANCE[dtype]  # the order in which an embedding's squares are added
    plain = run_linear(inputs.flatten(1), weight, config, workspace, load=load)
    assert error(apart, F.silu(plain.double())) < TOLERANCE[dtype]
    spread = run_linear(x, weight_of(64, 192, dtype, device), config, workspace, residual=plain[:1], load=load)
    same = run_linear(
        x, weight_of(64, 192, dtype, device), config, workspace, residual=plain[:1].repeat(9, 1), load=load
    )
    assert torch.equal(spread, same)


def weight_of(n, k, dtype, device):
    return packed("int8", n, k, dtype, device)[0]


@pytest.mark.parametrize("kind", ["nf4", "int8", "dense"])
def test_a_row_does_not_depend_on_the_rows_beside_it(machine, kind):
    device, load = machine
    weight, _, decodes = packed(kind, 32, 320, torch.bfloat16, device)
    x, workspace = random(64, 320, dtype=torch.bfloat16, device=device), Workspace(device)
    run = [
        run_linear(x[i : i + 1], weight, LinearConfig(decodes[0], 1, 1, 1, 8, 2), workspace, load=load)
        for i in range(64)
    ]
    alone = torch.cat(run)
    for tokens in (2, 8, 9, 31, 64):
        config = LinearConfig(decodes[0], linear_config.token_tiles_for(tokens), 2, 1, 4, 1)
        for tried in (config, resident(decodes[0], tokens, (1, 1, 8, 1))):
            assert torch.equal(run_linear(x[:tokens], weight, tried, workspace, load=load), alone[:tokens])


def test_garbage_in_one_row_stays_there(machine):
    device, load = machine
    weight, _, _ = packed("nf4", 32, 128, torch.bfloat16, device)
    x, workspace = random(5, 128, dtype=torch.bfloat16, device=device), Workspace(device)
    config = LinearConfig(Decode.NF4_TABLE, 1, 1, 1, 8, 1)
    clean = run_linear(x, weight, config, workspace, load=load)
    x[2] = torch.nan
    dirty = run_linear(x, weight, config, workspace, load=load)
    keep = [0, 1, 3, 4]
    assert torch.equal(clean[keep], dirty[keep]) and dirty[2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_epilogues(machine, dtype):
    device, load = machine
    gate, up = random_nf4(48, 192, device, 1), random_nf4(48, 192, device, 2)
    x, workspace = random(9, 192, dtype=dtype, device=device) * 0.2, Workspace(device)
    config = LinearConfig(Decode.NF4_PERMUTE, 2, 1, 2, 4, 1)
    out = run_linear(x, pack_nf4([gate, up], dtype, gate_up=True), config, workspace, load=load)
    assert error(out, reference.swiglu(x, gate.dequantize(), up.dequantize())) < TOLERANCE[dtype]
    weight, residual = pack_nf4([gate, up], dtype), random(9, 96, dtype=dtype, device=device, seed=3)
    want = reference.linear(x, torch.cat([gate.dequantize(), up.dequantize()]))
    out = run_linear(x, weight, config, workspace, residual=residual, load=load)
    assert error(out, want + residual.double()) < TOLERANCE[dtype]
    logits = torch.empty(9, 96, dtype=torch.float32, device=device)
    assert error(run_linear(x, weight, config, workspace, out=logits, load=load), want) < TOLERANCE[dtype] / 1.5
    gated, other = pack_nf4([gate, up], dtype, gate_up=True), resident(Decode.NF4_PERMUTE, 9, (1, 2, 4, 1))
    one, two = (run_linear(x, gated, tried, workspace, load=load) for tried in (config, other))
    assert torch.equal(one, two)
    assert torch.equal(run_linear(x, weight, other, workspace, out=torch.empty_like(logits), load=load), logits)


@pytest.mark.parametrize("quantize", ["nf4", "int8", "none"])
@pytest.mark.parametrize(("sizes", "gate_up"), [((80, 16, 48), False), ((72, 72), True), ((20, 12), False)])
def test_a_matrix_packed_by_pieces_has_the_bytes_of_the_whole(monkeypatch, quantize, sizes, gate_up):
    matrices = [
        DenseWeight(torch.randn(rows, 128, generator=torch.Generator().manual_seed(i))) for i, rows in enumerate(sizes)
    ]
    whole = cuda_weights.pack_matrix(matrices, quantize, torch.bfloat16, "cpu", gate_up=gate_up)
    monkeypatch.setattr(cuda_weights, "PIECE_VALUES", 32 * 128)
    pieces = cuda_weights.pack_matrix(matrices, quantize, torch.bfloat16, "cpu", gate_up=gate_up)
    assert (pieces.n, pieces.k, pieces.gate_up) == (whole.n, whole.k, whole.gate_up) == (sum(sizes), 128, gate_up)
    assert torch.equal(pieces.weights.flatten(), whole.weights.flatten())
    assert whole.scales is None or torch.equal(pieces.scales.flatten(), whole.scales.flatten())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_tables_hold_every_code(dtype):
    order, pairs, _ = code_tables(dtype)
    assert sorted(order) == list(range(16))
    low = torch.tensor([pair & 0xFFFF for pair in pairs[:16]]).to(torch.int16)  # high nibble 0
    first = low.view(dtype).double()
    high = torch.tensor([pair >> 16 for pair in pairs[:16]], dtype=torch.int32).to(torch.int16).view(dtype).double()
    values = torch.tensor(NF4_VALUES, dtype=torch.float64)[list(order)]
    assert (first == first[0]).all()
    factor = high.abs().max()
    assert ((high / factor - values).abs() < 2**-8).all()


def test_nf4_dequantizes_as_bitsandbytes_does():
    functional = pytest.importorskip("bitsandbytes.functional")
    values = random(32, 512, dtype=torch.float32, device="cpu")
    for nested in (False, True):
        data, state = functional.quantize_4bit(values, blocksize=64, compress_statistics=nested, quant_type="nf4")
        want = functional.dequantize_4bit(data, state)
        torch.testing.assert_close(Nf4Weight.from_bitsandbytes(data, state).dequantize(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5, 576), (3, 4096)])
def test_rms_norm(machine, dtype, rows, width):
    device, load = machine
    x, weight = (random(*size, dtype=dtype, device=device, seed=s) for s, size in ((0, (rows, width)), (1, (width,))))
    out = fused_ops.rms_norm(x, weight, 1e-5, load=load)
    assert error(out, reference.rms_norm(x, weight, 1e-5)) < TOLERANCE[dtype]


def test_drafted_tokens_prefer_large_then_early(machine):
    device, load = machine
    logits = random(3, 5000, dtype=torch.float32, device=device)
    logits[1, [7, 4000]] = 9.0
    token_map = torch.arange(5000, dtype=torch.int32, device=device) * 3
    row_of = torch.tensor([0, 0, 1, 2, 1, 1, 0, 2, 1], dtype=torch.int32, device=device)
    rank_of = torch.tensor([0, 5, 0, 0, 1, 5, 2, 3, 2], dtype=torch.int32, device=device)
    tokens, chances = torch.full_like(row_of, -1), torch.full((9,), -1.0, device=device)
    draft_tokens(logits, token_map, row_of, rank_of, tokens, chances, guesses=6, nodes=range(1, 8), load=load)
    best = logits.topk(6)
    assert tokens[[0, 8]].tolist() == [-1, -1] and chances[[0, 8]].tolist() == [-1, -1]
    assert tokens[[2, 4]].tolist() == [21, 12000]
    for node in (1, 3, 5, 6, 7):
        row, rank = row_of[node], rank_of[node]
        assert tokens[node] == 3 * best.indices[row, rank]
        assert chances[node].item() == pytest.approx(logits[row].softmax(-1)[tokens[node] // 3].item(), rel=1e-4)


@pytest.mark.parametrize(("vocab", "guesses"), [(48, 3), (700, 40), (4096, 8), (4096, 64)])
@pytest.mark.parametrize("spread", [0.0, 0.5, 8.0])
def test_drafted_tokens_are_in_order_among_many_equals(machine, vocab, guesses, spread):
    device, load = machine
    logits = (random(1, vocab, dtype=torch.float32, device=device) * spread).round() / 4 + 0.0  # no negative zeros
    zeros, ranks = (make(guesses, dtype=torch.int32, device=device) for make in (torch.zeros, torch.arange))
    tokens, chances = torch.zeros_like(zeros), torch.zeros(guesses, device=device)
    draft_tokens(logits, None, zeros, ranks, tokens, chances, guesses=guesses, nodes=range(guesses), load=load)
    want = sorted(range(vocab), key=lambda index: (-logits[0, index].item(), index))[:guesses]
    assert tokens.tolist() == want
    torch.testing.assert_close(chances, logits[0].softmax(-1)[want], rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_heads_inputs_are_the_hidden_state_and_the_tokens_of_the_path(machine, dtype):
    device, load = machine
    table, state = (random(*size, dtype=dtype, device=device, seed=s) for s, size in enumerate([(50, 192), (1, 192)]))
    tokens = torch.arange(10, 10 + TREE.num_nodes, dtype=torch.int32, device=device)
    record, ancestors = fused_ops.new_record(device), ancestor_table(TREE.ancestors, TREE.depth).to(device)
    record[fused_ops.BONUS] = 40
    nodes = torch.tensor([4, 6], dtype=torch.int32, device=device)
    inputs, x = (torch.full(size, torch.nan, dtype=dtype, device=device) for size in ((2, 3, 192), (2, 192)))
    gather_seen(state, table, tokens, record, ancestors, nodes, inputs, x, load=load)
    assert torch.equal(x, state.expand(2, -1)) and torch.equal(inputs[:, 0], x)
    for row, node in enumerate([4, 6]):
        parent = TREE.path_to(node)[1]
        want = reference.rms_norm(table[[40, 10 + parent]], torch.ones(192, device=device), 1e-6)
        assert error(inputs[row, 1:], want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_rows(machine, dtype):
    device, load = machine
    x, residual = (random(3, 1096, dtype=dtype, device=device, seed=s) for s in (1, 2))
    bias, out, plain = random(1096, dtype=dtype, device=device, seed=3), torch.empty_like(x), F.silu(x.double())
    silu_rows(x, out, bias=bias, residual=residual, load=load)
    assert error(out, residual.double() + F.silu(x.double() + bias.double())) < TOLERANCE[dtype]
    silu_rows(x, x, load=load)
    assert error(x, plain) < TOLERANCE[dtype]


def test_embeddings_take_the_root_from_the_record(machine):
    device, load = machine
    table = random(50, 128, dtype=torch.float16, device=device)
    tokens, out = torch.tensor([3, 7, 7], dtype=torch.int32, device=device), torch.empty(3, 128).half().to(device)
    fused_ops.embed_tokens(tokens, table, None, out, load=load)
    assert torch.equal(out, table[[3, 7, 7]])
    record = fused_ops.new_record(device)
    record[fused_ops.BONUS] = 49
    fused_ops.embed_tokens(tokens, table, record, out, load=load)
    assert torch.equal(out, table[[49, 7, 7]]) and tokens.tolist() == [49, 7, 7]


def test_best_tokens_are_the_argmax(machine):
    device, load = machine
    logits = random(5, 9000, dtype=torch.float32, device=device) - 10  # all below zero
    logits[2, [8, 8999]] = 3.0
    found = fused_ops.best_tokens(fused_ops.argmax_keys(logits, load=load))
    assert torch.equal(found, logits.argmax(1)) and found[2] == 8


def step(machine, targets, tokens, length=5, vocab=9000):
    """Run argmax and acceptance over logits whose argmax are `targets`; return the record."""
    device, load = machine
    logits = random(len(targets), vocab, dtype=torch.float32, device=device)
    logits[torch.arange(len(targets)), torch.tensor(targets)] = 20.0
    record, parents = fused_ops.new_record(device, length), torch.tensor(TREE.parents, dtype=torch.int32, device=device)
    tokens = torch.tensor(tokens, dtype=torch.int32, device=device)
    fused_ops.accept_greedy(fused_ops.argmax_keys(logits, load=load), tokens, parents, record, load=load)
    return fused_ops.StepRecord(record.tolist()), record


@pytest.mark.parametrize("seed", range(6))
def test_acceptance_follows_the_target(machine, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, 4, (), generator=generator).item() + 4 * node % 8 for node in range(TREE.num_nodes)]
    targets = [tokens[TREE.children[n][0]] if TREE.children[n] else 8500 for n in range(TREE.num_nodes)]
    stop = torch.randint(0, TREE.num_nodes, (), generator=generator).item()
    targets[stop] = 8999
    want = reference.accept_greedy(targets, tokens, list(TREE.parents))
    record, _ = step(machine, targets, tokens)
    assert record.path == want and record.tokens == [tokens[node] for node in want]
    assert record.num_accepted == len(want) - 1 and record.length == 5 + len(want) and record.bonus == targets[want[-1]]


def test_token_zero_is_accepted_only_as_a_guess(machine):
    tokens = [11, 0, *range(20, 20 + TREE.num_nodes - 2)]
    accepted, _ = step(machine, [0] * TREE.num_nodes, tokens)
    assert accepted.path == [0, 1] and accepted.bonus == 0


def test_commit_copies_the_path_of_every_layer(machine):
    device, load = machine
    nodes, layers, kv_heads, head_dim, capacity = TREE.num_nodes, 2, 3, 64, 24
    targets = [0] * nodes
    tokens = list(range(100, 100 + nodes))
    for node in TREE.path_to(8)[:-1]:
        targets[node] = tokens[next(i for i in TREE.path_to(8) if TREE.parents[i] == node)]
    view, record = step(machine, targets, tokens)
    assert view.path == TREE.path_to(8)
    scratch = [random(layers, nodes, kv_heads, head_dim, dtype=torch.float16, device=device, seed=s) for s in (1, 2)]
    cache = [torch.zeros(layers, kv_heads, capacity, head_dim, dtype=torch.float16, device=device) for _ in range(2)]
    hidden = random(nodes, 192, dtype=torch.float16, device=device, seed=3)
    state = torch.zeros(1, 192, dtype=torch.float16, device=device)
    fused_ops.commit_path(*scratch, *cache, record, hidden=hidden, state=state, load=load)
    assert torch.equal(state[0], hidden[8])
    for rows, new in zip(cache, scratch, strict=True):
        want = torch.zeros_like(rows)
        want[:, :, 5 : 5 + len(view.path)] = new[:, view.path].transpose(1, 2)
        assert torch.equal(rows, want)
