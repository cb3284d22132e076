"""The C decoder: trees, chunks and plain decoding give the same bits, and those are close to the float model's."""

import random
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from small_decoder import CONFIG, random_tree, random_weights
from torch import Tensor

from engine.attention import attend_prefill
from engine.backbone import Backbone, BackboneConfig, BackboneWeights
from engine.bench.cpu_step import bush, format_table, measure_steps
from engine.block_weights import DenseWeight, Weight
from engine.decode import PLAIN
from engine.errors import ContextLengthError
from engine.kernels.cpu_build import CpuKernelsUnavailableError
from engine.kernels.cpu_native import NativeThreads
from engine.kv_cache import KVCache
from engine.linear import DenseLinear
from engine.models.loader import LoadedModel
from engine.native_runner import NativeRunner
from engine.tree import CandidateTree


@pytest.fixture(scope="module")
def threads() -> NativeThreads:
    try:
        return NativeThreads(3)
    except CpuKernelsUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def weights() -> BackboneWeights:
    torch.manual_seed(1)
    return random_weights(CONFIG)


@pytest.fixture
def runner(weights: BackboneWeights, threads: NativeThreads) -> NativeRunner:
    return NativeRunner(CONFIG, weights, source_format="Q4_1", threads=threads)


def random_tokens(draw: random.Random, count: int, config: BackboneConfig = CONFIG) -> list[int]:
    return [draw.randrange(config.vocab_size) for _ in range(count)]


def decode_plainly(runner: NativeRunner, tokens: Sequence[int]) -> Tensor:
    """Feed tokens one at a time; return all hidden states."""
    rows = []
    for token in tokens:
        rows.append(runner.verify([token], PLAIN)[0])
        runner.commit([0])
    return torch.stack(rows)


def committed(runner: NativeRunner) -> list[tuple[Tensor, Tensor]]:
    return [runner.committed_rows(layer) for layer in range(runner.config.num_layers)]


def assert_same_cache(runner: NativeRunner, expected: list[tuple[Tensor, Tensor]]) -> None:
    for (keys, values), (expected_keys, expected_values) in zip(committed(runner), expected, strict=True):
        assert torch.equal(keys, expected_keys) and torch.equal(values, expected_values)


@pytest.mark.parametrize("seed", range(12))
def test_every_node_of_a_tree_is_what_plain_decoding_gives(runner: NativeRunner, seed: int) -> None:
    draw = random.Random(seed)
    length = draw.choice([1, 5, 30, 31, 32, 33, 62, 95, 127, 128, 200])
    prompt, tree = random_tokens(draw, length), random_tree(draw, draw.choice([2, 4, 9, 17, 33, 65]))
    tokens = random_tokens(draw, tree.num_nodes)
    runner.prefill(prompt)
    hidden = runner.verify(tokens, tree)
    for node in {0, tree.num_nodes - 1, *(draw.randrange(tree.num_nodes) for _ in range(6))}:
        runner.truncate(length)
        path = tree.path_to(node)
        assert torch.equal(decode_plainly(runner, [tokens[step] for step in path]), hidden[path]), node


@pytest.mark.parametrize("seed", range(6))
def test_a_text_made_of_committed_paths_has_the_cache_of_plain_decoding(runner: NativeRunner, seed: int) -> None:
    draw = random.Random(100 + seed)
    text = random_tokens(draw, draw.randrange(1, 60))
    runner.prefill(text)
    for _ in range(12):
        tree = random_tree(draw, draw.randrange(1, 40))
        tokens = random_tokens(draw, tree.num_nodes)
        runner.verify(tokens, tree)
        path = tree.path_to(draw.randrange(tree.num_nodes))[: draw.randrange(1, 9)]
        runner.commit(path)
        text += [tokens[node] for node in path]
    assert runner.num_committed == len(text)
    cache = committed(runner)
    runner.truncate(0)
    last = decode_plainly(runner, text)[-1]
    assert_same_cache(runner, cache)
    runner.truncate(0)
    assert torch.equal(runner.prefill(text), last)


@pytest.mark.parametrize("pieces", [(150,), (1, 149), (64, 86), (31, 2, 1, 66, 50), (100, 50)])
def test_a_prompt_in_any_pieces_gives_the_same_bits(runner: NativeRunner, pieces: tuple[int, ...]) -> None:
    tokens = random_tokens(random.Random(7), 150)
    plain = decode_plainly(runner, tokens)
    expected = committed(runner)
    runner.truncate(0)
    start = 0
    for size in pieces:
        last = runner.prefill(tokens[start : start + size])
        start += size
        assert torch.equal(last, plain[start - 1])
    assert_same_cache(runner, expected)


def test_truncating_forgets_and_a_dropped_tree_leaves_no_trace(runner: NativeRunner) -> None:
    draw = random.Random(3)
    tokens = random_tokens(draw, 140)
    last = runner.prefill(tokens)
    runner.truncate(131)
    runner.verify(random_tokens(draw, 65), random_tree(draw, 65))
    runner.verify(random_tokens(draw, 10), CandidateTree.chain(9))
    assert runner.num_committed == 131
    assert torch.equal(runner.prefill(tokens[131:]), last)


def test_threads_do_not_change_a_bit(weights: BackboneWeights, runner: NativeRunner) -> None:
    draw = random.Random(5)
    prompt, tree = random_tokens(draw, 70), random_tree(draw, 20)
    tokens = random_tokens(draw, 20)
    alone = NativeRunner(CONFIG, weights, source_format="Q4_1", threads=NativeThreads(1))
    runner.prefill(prompt)
    alone.prefill(prompt)
    assert torch.equal(runner.verify(tokens, tree), alone.verify(tokens, tree))


def float_hidden(config: BackboneConfig, weights: BackboneWeights, tokens: Sequence[int]) -> Tensor:
    """Hidden states of the dequantised model in float32."""

    def linear(weight: Weight) -> DenseLinear:
        return DenseLinear(weight, torch.float32)

    embed = torch.nn.Embedding.from_pretrained(weights.embedding.dequantize())
    backbone = Backbone(
        config, weights, embed=embed, linear=linear, lm_head=linear(weights.lm_head), dtype=torch.float32
    )
    cache = KVCache(config, "cpu", torch.float32)
    cache.reserve(len(tokens))
    with torch.inference_mode():
        return backbone(torch.tensor(tokens), torch.arange(len(tokens)), attend_prefill(cache))


def test_hidden_states_are_close_to_the_float_model(runner: NativeRunner, weights: BackboneWeights) -> None:
    tokens = random_tokens(random.Random(9), 100)
    expected = float_hidden(CONFIG, weights, tokens)
    hidden = decode_plainly(runner, tokens)
    cosine = torch.nn.functional.cosine_similarity(hidden, expected, dim=-1)
    assert cosine.min() > 0.98 and cosine.mean() > 0.995


@pytest.mark.slow
def test_the_bundled_model_predicts_what_the_float_model_predicts(bundled: LoadedModel, threads: NativeThreads) -> None:
    prompt = "Rain falls on the hills, runs into streams, and the streams join a river that finds the sea. " * 3
    tokens = bundled.tokenizer.encode(prompt)
    runner = NativeRunner(bundled.config, bundled.weights, source_format="Q4_1", threads=threads)
    logits = runner.logits(decode_plainly(runner, tokens))
    expected = float_hidden(bundled.config, bundled.weights, tokens) @ bundled.weights.lm_head.dequantize().T
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert divergence.mean() < 0.01
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.93
    assert runner.greedy(decode_again(runner, tokens)) == logits.argmax(-1).tolist()


def decode_again(runner: NativeRunner, tokens: Sequence[int]) -> Tensor:
    runner.truncate(0)
    return decode_plainly(runner, tokens)


def test_logits_greedy_and_embeddings_are_those_of_the_weights(runner: NativeRunner, weights: BackboneWeights) -> None:
    hidden = runner.verify([3, 5], CandidateTree.chain(1))
    logits = runner.logits(hidden)
    exact = hidden.double() @ weights.lm_head.dequantize().double().T
    assert (logits - exact).norm() / exact.norm() < 0.01
    assert runner.greedy(hidden) == logits.argmax(-1).tolist()
    tokens = torch.tensor([[0, 210], [17, 0]])
    assert torch.equal(runner.embed(tokens), weights.embedding.dequantize()[tokens])


def test_memory_is_weights_and_the_pages_in_use(runner: NativeRunner) -> None:
    empty = runner.memory_bytes()
    runner.prefill([1] * 129)
    page = 128 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 2 * 2
    assert 0 <= runner.memory_bytes() - empty - 2 * page < 250_000  # the rest is the threads' score buffers
    grown = runner.memory_bytes()
    runner.truncate(128)
    assert runner.memory_bytes() == grown - page


def test_dense_weights_are_rounded_and_said_so(weights: BackboneWeights, threads: NativeThreads) -> None:
    dense = [replace(layer, down=DenseWeight(layer.down.dequantize())) for layer in weights.layers]
    runner = NativeRunner(CONFIG, replace(weights, layers=dense), source_format="F16", threads=threads)
    assert runner.weights.startswith("F16 rounded to int8 on ")
    untouched = NativeRunner(CONFIG, weights, source_format="Q4_1", threads=threads)
    assert untouched.weights.startswith("Q4_1 on ") and untouched.weights.endswith("3 threads")


def test_wrong_calls_raise(runner: NativeRunner, weights: BackboneWeights) -> None:
    with pytest.raises(ValueError, match="2 tokens for a tree of 4"):
        runner.verify([1, 2], CandidateTree.chain(3))
    with pytest.raises(ValueError, match=r"Token 211 is not in 0\.\.210"):
        runner.verify([211], PLAIN)
    with pytest.raises(ValueError, match="not a path"):
        runner.commit([0])  # nothing was verified
    runner.verify([1, 2, 3], CandidateTree.from_choices([(0,), (1,)]))
    for path in ([1], [0, 1, 2], [0, 3], [-1]):
        with pytest.raises(ValueError, match="not a path"):
            runner.commit(path)
    runner.commit([0, 2])
    for length in (-1, 3):
        with pytest.raises(ValueError, match="Cannot truncate 2"):
            runner.truncate(length)
    with pytest.raises(ValueError, match="no tokens"):
        runner.prefill([])
    with pytest.raises(ContextLengthError, match="400 positions"):
        runner.prefill([1] * 399)
    assert runner.num_committed == 2
    with pytest.raises(IndexError, match="Layer 3"):
        runner.committed_rows(3)
    with pytest.raises(CpuKernelsUnavailableError, match="head size"):
        NativeRunner(replace(CONFIG, head_dim=20), weights, source_format="Q4_1")


def test_the_last_position_can_be_used_and_no_other(runner: NativeRunner) -> None:
    runner.prefill([1] * 398)
    tree = CandidateTree.from_choices([(0,), (1,), (2,)])
    runner.verify([1, 2, 3, 4], tree)
    runner.commit([0, 3])
    assert runner.num_committed == 400
    with pytest.raises(ContextLengthError, match="400 tokens and 1 more"):
        runner.verify([1], PLAIN)


def test_measured_parts_fit_the_step(runner: NativeRunner) -> None:
    started = time.perf_counter()
    with runner.measure() as parts:
        runner.prefill([1] * 20)
    elapsed = time.perf_counter() - started
    assert list(parts) == ["norms", "qkv", "attention", "output", "gate_up", "down"]
    assert all(seconds > 0 for seconds in parts.values()) and sum(parts.values()) < elapsed
    runner.prefill([1])  # nothing is measured after the block


def test_step_times_come_as_a_table(runner: NativeRunner) -> None:
    times = measure_steps(runner, contexts=[40], rows=[1, 3], repeats=2)
    assert [(item.context, item.rows) for item in times] == [(40, 1), (40, 3)]
    for item in times:
        assert 0 < item.linears_ms < item.total_ms and item.best_ms <= item.total_ms
    table = format_table(times).splitlines()
    assert len(table) == 4 and table[2].endswith("| 1.00x |")


@pytest.mark.parametrize("num_nodes", [1, 2, 4, 5, 64])
def test_bush_has_the_size_asked_for(num_nodes: int) -> None:
    assert bush(num_nodes).num_nodes == num_nodes
