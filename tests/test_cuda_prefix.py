"""The heads' prefix attention on the CUDA runner: what heads read, and that the text knows nothing of it.

What heads read behind a token has the same bits from a prompt, from plain steps and from any tree; steps without a
drafter launch nothing for it.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_cuda_runner import CONFIG, TREES, Oracle, decode, device, make_runner, random_heads, weights  # noqa: F401
from torch import Tensor

from engine.accept import accept_exact
from engine.attention import attend_prefill
from engine.backbone import Backbone, BackboneWeights
from engine.block_weights import DenseWeight, Weight
from engine.captured_decode import CapturedLoop
from engine.cuda_drafter import CudaDrafter
from engine.cuda_memory import StepMemory
from engine.cuda_pass_tuning import PassTuner
from engine.cuda_prefix import PrefixLayer
from engine.cuda_runner import CudaRunner
from engine.cuda_weights import CudaKernelsUnavailableError
from engine.decode import PLAIN
from engine.errors import CheckpointMismatchError
from engine.kernels.int8_linear import Int8Weight
from engine.kernels.linear_config import default_config
from engine.kernels.measured_configs import MeasuredConfigs
from engine.kv_cache import KVCache
from engine.linear import DenseLinear
from engine.prefix_attention import PrefixAttention, PrefixConfig, feature
from engine.pruned_tree import PrunedTree
from engine.sampling import SamplingParams
from engine.tree import CandidateTree

PROMPT = [5, 3, 80, 7, 11, 42, 9, 1, 60, 33, 2, 90]  # a small chunk
OWN_LAYER = CONFIG.num_layers  # of the cache
CANDIDATES = CandidateTree.from_choices([(0,), (1,), (1, 0), (1, 1), (0, 0)])


def random_prefix(*layers: int) -> PrefixAttention:
    """A prefix attention that matters."""
    torch.manual_seed(4)
    shape = PrefixConfig(layers, CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim)
    prefix = PrefixAttention(shape, CONFIG.hidden_size)
    for matrix in (prefix.query_key_value, prefix.output):
        torch.nn.init.normal_(matrix.weight, std=2.0 / matrix.in_features**0.5)
    return prefix


@pytest.fixture(scope="module")
def prefix() -> PrefixAttention:
    return random_prefix(0, CONFIG.num_layers - 1)  # what leaves the last layer lies elsewhere than the others


@pytest.fixture(scope="module")
def bare(weights: BackboneWeights, device: str) -> CudaRunner:  # noqa: F811
    return make_runner(weights, device)


@pytest.fixture(scope="module")
def attached(weights: BackboneWeights, device: str, prefix: PrefixAttention) -> CudaRunner:  # noqa: F811
    runner = make_runner(weights, device)
    runner.attach(prefix)
    return runner


@pytest.fixture(scope="module")
def drafter(attached: CudaRunner, weights: BackboneWeights) -> CudaDrafter:  # noqa: F811
    return CudaDrafter(random_heads(), attached, weights.lm_head)


def restart(runner: CudaRunner, tokens: list[int] = PROMPT) -> Tensor:
    runner.truncate(0)
    return runner.prefill(tokens)


def own_rows(runner: CudaRunner) -> list[Tensor]:
    return [part.clone() for part in runner.committed_rows(OWN_LAYER)]


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(ones, others, strict=True))


def reference(weights: BackboneWeights, prefix: PrefixAttention, tokens: list[int]) -> tuple[Tensor, Tensor]:  # noqa: F811
    """Hidden states and what heads read behind all tokens, [tokens, hidden] each: float32, on int8 matrices' values."""

    def rounded(values: Tensor) -> Tensor:
        return Int8Weight.from_dense(values).dequantize()

    def linear(weight: Weight) -> DenseLinear:
        return DenseLinear(DenseWeight(rounded(weight.dequantize())), torch.float32)

    embed = torch.nn.Embedding.from_pretrained(weights.embedding.dequantize())
    backbone = Backbone(CONFIG, weights, embed=embed, linear=linear, lm_head=embed, dtype=torch.float32)
    cache = KVCache(replace(CONFIG, num_layers=CONFIG.num_layers + 1), "cpu", torch.float32)
    cache.reserve(len(tokens))
    same = random_prefix(*prefix.config.layers)
    for matrix in (same.query_key_value, same.output):
        matrix.weight.data = rounded(matrix.weight.detach())
    positions, attend = torch.arange(len(tokens)), attend_prefill(cache)
    with torch.inference_mode():
        hidden, *left = backbone.states(torch.tensor(tokens), positions, attend, prefix.config.layers)
        features = torch.cat([hidden, *map(feature, left)], dim=-1)
        return hidden, same(features, *backbone.angles(positions), attend, OWN_LAYER)


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.float().cpu() - want).norm() / want.norm())


def test_heads_read_what_torch_computes(
    attached: CudaRunner, weights: BackboneWeights, prefix: PrefixAttention  # noqa: F811
) -> None:  # fmt: skip
    prompt = [(5 * i + i * i) % 96 for i in range(40)]  # more than attention's near keys
    tokens = [*prompt, 7, 30, 2]
    hidden, want = reference(weights, prefix, tokens)
    last = restart(attached, prompt)
    assert distance(attached.heads_state(), want[len(prompt) - 1]) < 0.1  # float32 against bfloat16
    added = attached.heads_state() - last
    assert distance(added, (want - hidden)[len(prompt) - 1]) < 0.1
    assert float(added.norm()) > 0.3 * float(last.norm())
    states = attached.verify([7, 5, 30, 9, 2, 6], CANDIDATES)
    attached.commit([0, 2, 4])
    assert distance(attached.heads_state() - states[4], (want - hidden)[-1]) < 0.1


def test_bits_do_not_depend_on_how_a_token_came(attached: CudaRunner, prefix: PrefixAttention) -> None:
    text = [(7 * i + i * i) % 96 for i in range(75)]  # more than one chunk
    hidden, state = restart(attached, text), attached.heads_state()
    rows = own_rows(attached)
    restart(attached, text[:70])
    attached.verify([text[70]], PLAIN)
    attached.commit([0])
    draft = [text[71], 5, text[72], 8, text[73], 90]
    attached.verify(draft, CANDIDATES)
    attached.commit([0, 2, 4])
    assert torch.equal(attached.verify([text[74]], PLAIN)[0], hidden)
    attached.commit([0])
    assert attached.num_prefixed == attached.num_committed == len(text)
    assert torch.equal(attached.heads_state(), state)
    assert equal(own_rows(attached), rows) and all(part.any() for part in rows)


def test_a_captured_step_does_what_the_verbs_do(attached: CudaRunner, drafter: CudaDrafter) -> None:
    tree, text = TREES[2], decode(CapturedLoop(attached, None), PLAIN, 5, PROMPT)[0]

    def start() -> int:
        return attached.greedy(restart(attached).unsqueeze(0))[0]

    def apart() -> tuple[list[int], Tensor, list[Tensor]]:
        tokens, state = [start()], attached.heads_state()
        for _ in range(2):
            draft = drafter.draft(state, tokens[-1], tree)
            hidden = attached.verify(draft.tokens, tree)
            path, bonus = accept_exact(tree, draft.tokens, attached.greedy(hidden).__getitem__)
            attached.commit(path)
            tokens, state = [*tokens, *(draft.tokens[node] for node in path[1:]), bonus], attached.heads_state()
        return tokens, state, own_rows(attached)

    def captured(drafts: CudaDrafter | Oracle, steps: int) -> tuple[list[int], Tensor, list[Tensor]]:
        tokens = [start()]
        attached.set_root(tokens[0])
        for _ in range(steps):
            output = attached.step(tree, drafts, longest=attached.num_committed)  # type: ignore[arg-type]
            record, *_ = output.wait()
            attached.arrived(record, for_heads=output.for_heads)
            tokens.extend([*record.tokens[1:], record.bonus])
        return tokens, attached.heads_state(), own_rows(attached)

    (tokens, state, rows), (same_tokens, same_state, same_rows) = apart(), captured(drafter, 2)
    assert tokens == same_tokens
    assert torch.equal(state, same_state) and equal(rows, same_rows)
    oracle = Oracle(attached, [*PROMPT, *text, *[0] * 9])
    tokens, state, rows = captured(oracle, 1)
    assert tokens == text  # a whole path of the tree
    assert attached.num_prefixed == attached.num_committed == len(PROMPT) + len(tokens) - 1
    restart(attached, [*PROMPT, *tokens[:-1]])
    assert torch.equal(attached.heads_state(), state) and equal(own_rows(attached), rows)


def test_the_text_stays(
    bare: CudaRunner, attached: CudaRunner, drafter: CudaDrafter, weights: BackboneWeights  # noqa: F811
) -> None:  # fmt: skip
    assert torch.equal(restart(attached), restart(bare))
    assert torch.equal(attached.verify([7, 1, 2, 3], TREES[1]), bare.verify([7, 1, 2, 3], TREES[1]))
    for runner in (attached, bare):
        runner.commit([0, 1])
    layers = range(CONFIG.num_layers)
    assert all(equal([*attached.committed_rows(i)], [*bare.committed_rows(i)]) for i in layers)
    for params in (SamplingParams(), SamplingParams(temperature=0.7)):
        plain = decode(CapturedLoop(bare, None, params, 5), PLAIN, 3, PROMPT)[0]
        assert decode(CapturedLoop(attached, drafter, params, 5), PrunedTree(TREES[2], 5), 3, PROMPT)[0] == plain
        assert attached.num_prefixed == attached.num_committed
    ours, theirs = attached.memory_table(), bare.memory_table()
    assert ours["weights"] > theirs["weights"] and ours["buffers"] > theirs["buffers"]
    assert ours["cache"] * CONFIG.num_layers == theirs["cache"] * (OWN_LAYER + 1)


def test_only_steps_that_draft_launch_it(
    bare: CudaRunner, attached: CudaRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []

    def launches(runner: CudaRunner, drafts: Oracle | None) -> list[str]:
        load = runner.load

        def noting(source: str, name: str, *options: object) -> object:
            launched.append(name)
            return load(source, name, *options)

        restart(runner)
        runner.graphs.clear()
        for owner, name in ((runner, "load"), (runner.linear, "_load"), (runner._forward, "_load")):
            monkeypatch.setattr(owner, name, noting)
        if runner._forward.prefix is not None:
            monkeypatch.setattr(runner._forward.prefix, "_load", noting)
        runner.graphs._warm.clear()  # eager, also on a GPU
        launched.clear()
        runner.step(PLAIN, drafts, longest=runner.num_committed).wait()  # type: ignore[arg-type]
        monkeypatch.undo()
        return launched.copy()

    plain = launches(bare, None)
    assert launches(attached, None) == plain
    drafting = launches(attached, Oracle(attached, []))
    first = drafting.index("gather_features")
    own = drafting[first : first + 4]
    assert drafting[:first] + drafting[first + 4 :] == plain and own[2] == "attend_tree"
    assert {name.removesuffix("_resident") for name in (own[1], own[3])} == {"linear"}


def test_plain_steps_leave_a_gap(attached: CudaRunner) -> None:
    restart(attached)
    length = len(PROMPT)
    assert attached.num_prefixed == length
    hidden = attached.verify([7], PLAIN, for_heads=False)
    attached.commit([0])
    assert torch.equal(attached.heads_state(), hidden[0])
    assert (attached.num_prefixed, attached.num_committed) == (length, length + 1)
    attached.verify([7], PLAIN)
    attached.commit([0])  # behind a gap
    attached.set_root(7)
    for drafts in (Oracle(attached, [0] * 99), None):
        output = attached.step(PLAIN, drafts, longest=attached.num_committed)  # type: ignore[arg-type]
        attached.arrived(output.wait()[0], for_heads=output.for_heads)
    assert (attached.num_prefixed, attached.num_committed) == (length, length + 4)
    attached.truncate(length + 2)
    assert attached.num_prefixed == length
    attached.truncate(attached.num_prefixed)
    attached.prefill([7, 7])
    assert attached.num_prefixed == length + 2
    state = attached.heads_state()
    restart(attached, [*PROMPT, 7, 7])
    assert torch.equal(attached.heads_state(), state)
    attached.truncate(3)
    assert attached.num_prefixed == 3


def test_the_cache_grows(attached: CudaRunner) -> None:
    memory = attached.memory
    restart(attached)
    attached.verify([7], PLAIN)
    attached.commit([0])
    want, rows, full = attached.heads_state(), own_rows(attached), memory.capacity
    restart(attached)
    memory.capacity = 700
    memory.cache_keys, memory.cache_values = (
        part[:, :, :700].contiguous() for part in (memory.cache_keys, memory.cache_values)
    )
    attached._reserve(800)
    assert memory.capacity == full and memory.cache_keys.shape[0] == OWN_LAYER + 1
    attached.verify([7], PLAIN)
    attached.commit([0])
    assert torch.equal(attached.heads_state(), want) and equal(own_rows(attached), rows)


def test_launches_are_chosen(
    weights: BackboneWeights, device: str, prefix: PrefixAttention, tmp_path: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Matrices shaped like one of the backbone's are launched like it; others are measured by themselves."""
    alone: list[tuple[int, int, int]] = []

    def choose(weight, rows, *memory):  # type: ignore[no-untyped-def]
        alone.append((weight.n, weight.k, rows))
        return default_config(weight.n, weight.k, rows, weight.decode)

    monkeypatch.setattr("engine.cuda_pass_tuning.choose_config", choose)
    monkeypatch.setattr(PassTuner, "_measure", lambda tuner, weight, rows: default_config(weight.n, weight.k, rows, 2))
    runner = make_runner(weights, device)
    runner.attach(prefix)
    parts = runner._forward, runner.memory, runner.linear, runner._packed.matrices
    runner.linear.choose = PassTuner(*parts, kept=MeasuredConfigs(tmp_path / "kept.json"))
    runner.plan(TREES[1], None)
    assert not alone
    runner.plan(TREES[1], Oracle(runner, []))  # type: ignore[arg-type]
    rows = (CONFIG.num_heads + 2 * CONFIG.num_kv_heads) * CONFIG.head_dim
    assert alone == [(rows, 3 * CONFIG.hidden_size, 8)]


def test_other_backbones_prefixes_are_refused(bare: CudaRunner, device: str) -> None:  # noqa: F811
    bare.truncate(0)
    shape = PrefixConfig((0,), num_heads=2, num_kv_heads=1, head_dim=64)
    with pytest.raises(CheckpointMismatchError, match="has 2 heads, 1 of keys, of 64; the model has 4, 2, of 64"):
        bare.attach(PrefixAttention(shape, CONFIG.hidden_size))
    with pytest.raises(CheckpointMismatchError, match=r"read layers \[2\] of a model that has 2"):
        bare.attach(random_prefix(2))
    assert bare.num_prefixed == 0 and bare.memory.num_layers == CONFIG.num_layers
    deep = StepMemory(replace(CONFIG, num_layers=4), torch.bfloat16, device)
    with pytest.raises(CudaKernelsUnavailableError, match=r"at most 3 layers that heads read; .* has \(0, 1, 2, 3\)"):
        PrefixLayer(random_prefix(0, 1, 2, 3), deep, bare.linear, bare.load)
