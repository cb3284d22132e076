"""The prefix attention on the C kernels: close to the module's, the same bits in any shape of step, and no part of the
text."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from small_decoder import CONFIG, random_tree, random_weights
from torch import Tensor, nn
from torch.nn import functional as F

from engine.attention import attend_prefill
from engine.backbone import Backbone, BackboneWeights, rotary_tables
from engine.block_weights import Weight, quantize_q4
from engine.build import Built, build_drafter
from engine.decode import PLAIN
from engine.draft import HeadsDrafter
from engine.errors import CheckpointMismatchError
from engine.heads import HeadsConfig, MedusaHeads
from engine.kernels.cpu_build import CpuKernelsUnavailableError
from engine.kernels.cpu_native import NativeThreads
from engine.kv_cache import KVCache
from engine.linear import DenseLinear
from engine.native_drafter import NativeDrafter
from engine.native_runner import NativeRunner
from engine.prefix_attention import PrefixAttention, PrefixConfig, feature
from engine.tree import CandidateTree

SHAPE = PrefixConfig((0, 2), CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim)
LAYER = CONFIG.num_layers  # the prefix attention's, after the last


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


def random_prefix(config: PrefixConfig = SHAPE, hidden_size: int = CONFIG.hidden_size) -> PrefixAttention:
    """A prefix attention that adds about as much as there is, of values that 4 bits hold nearly."""
    prefix = PrefixAttention(config, hidden_size)
    for linear in (prefix.query_key_value, prefix.output):
        values = torch.randn_like(linear.weight) * 2.0 / linear.in_features**0.5
        linear.weight.data = quantize_q4(values).dequantize()
    return prefix


@pytest.fixture(scope="module")
def prefix() -> PrefixAttention:
    torch.manual_seed(2)
    return random_prefix()


@pytest.fixture
def bare(weights: BackboneWeights, threads: NativeThreads) -> NativeRunner:
    return NativeRunner(CONFIG, weights, source_format="Q4_1", threads=threads)


@pytest.fixture
def runner(weights: BackboneWeights, threads: NativeThreads, prefix: PrefixAttention) -> NativeRunner:
    made = NativeRunner(CONFIG, weights, source_format="Q4_1", threads=threads)
    made.attach(prefix)
    return made


def random_tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(CONFIG.vocab_size) for _ in range(count)]


def decode(runner: NativeRunner, tokens: Sequence[int], *, for_heads: bool = True) -> Tensor:
    """Feed tokens one at a time; return what heads read behind each."""
    states = []
    for token in tokens:
        runner.verify([token], PLAIN, for_heads=for_heads)
        runner.commit([0])
        states.append(runner.heads_state())
    return torch.stack(states)


def assert_same_rows(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def native_features(
    weights: BackboneWeights, threads: NativeThreads, layers: Sequence[int], tokens: Sequence[int]
) -> Tensor:
    """The C decoder's own states [tokens, features x hidden]: a middle layer's are those of a model that ends there."""
    states = []
    for last in (LAYER - 1, *layers):
        config, part = replace(CONFIG, num_layers=last + 1), replace(weights, layers=weights.layers[: last + 1])
        states.append(decode(NativeRunner(config, part, source_format="Q4_1", threads=threads), tokens))
    hidden, *left = states
    return torch.cat([hidden, *(normed / weights.norm for normed in left)], dim=-1)


@torch.inference_mode()
def module_states(prefix: PrefixAttention, features: Tensor) -> Tensor:
    """What the module makes of features [tokens, features x hidden], in float32."""
    cache = KVCache(replace(CONFIG, num_layers=1), "cpu", torch.float32)
    cache.reserve(len(features))
    cos, sin = (table[: len(features)].unsqueeze(-2) for table in rotary_tables(CONFIG, torch.float32))
    return prefix(features, cos, sin, attend_prefill(cache))


@pytest.mark.parametrize("layers", [(0, 2), (1,), (), (0, 1, 2)])
def test_heads_read_what_the_module_makes(
    bare: NativeRunner, weights: BackboneWeights, threads: NativeThreads, layers: tuple[int, ...]
) -> None:
    torch.manual_seed(3)
    prefix, tokens = random_prefix(replace(SHAPE, layers=layers)), random_tokens(random.Random(9), 100)
    bare.attach(prefix)
    features = native_features(weights, threads, layers, tokens)
    hidden = features[:, : CONFIG.hidden_size]
    expected, states = module_states(prefix, features) - hidden, decode(bare, tokens) - hidden
    assert expected.norm() > hidden.norm()
    assert F.cosine_similarity(states, expected, dim=-1).min() > 0.998
    assert ((states - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 0.06


@torch.inference_mode()
def float_features(weights: BackboneWeights, layers: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """States of the dequantised model in float32, [tokens, features x hidden]."""

    def linear(weight: Weight) -> DenseLinear:
        return DenseLinear(weight, torch.float32)

    embed = nn.Embedding.from_pretrained(weights.embedding.dequantize())
    backbone = Backbone(
        CONFIG, weights, embed=embed, linear=linear, lm_head=linear(weights.lm_head), dtype=torch.float32
    )
    cache = KVCache(CONFIG, "cpu", torch.float32)
    cache.reserve(len(tokens))
    positions = torch.arange(len(tokens))
    hidden, *left = backbone.states(torch.tensor(tokens), positions, attend_prefill(cache), layers)
    return torch.cat([hidden, *(feature(x) for x in left)], dim=-1)


def test_heads_read_about_what_the_float_model_gives(
    runner: NativeRunner, weights: BackboneWeights, prefix: PrefixAttention
) -> None:
    tokens = random_tokens(random.Random(9), 100)
    expected = module_states(prefix, float_features(weights, SHAPE.layers, tokens))
    cosine = F.cosine_similarity(decode(runner, tokens), expected, dim=-1)
    assert cosine.min() > 0.9 and cosine.mean() > 0.98  # the states read are apart by 0.99 and 0.998 themselves


@pytest.mark.parametrize("seed", range(8))
def test_every_node_of_a_tree_is_what_a_chain_gives(runner: NativeRunner, seed: int) -> None:
    draw = random.Random(seed)
    length = draw.choice([1, 5, 30, 31, 32, 33, 95, 127, 128, 200])
    prompt, tree = random_tokens(draw, length), random_tree(draw, draw.choice([2, 4, 9, 33, 65]))
    tokens = random_tokens(draw, tree.num_nodes)
    for node in {0, tree.num_nodes - 1, *(draw.randrange(tree.num_nodes) for _ in range(4))}:
        path = tree.path_to(node)
        runner.truncate(0)
        runner.prefill(prompt)
        runner.verify(tokens, tree)
        runner.commit(path)
        state, rows = runner.heads_state(), runner.committed_rows(LAYER)
        runner.truncate(length)
        assert torch.equal(decode(runner, [tokens[step] for step in path])[-1], state)
        assert_same_rows(runner.committed_rows(LAYER), rows)


@pytest.mark.parametrize("pieces", [(150,), (1, 149), (31, 2, 1, 66, 50)])
def test_a_prompt_in_any_pieces_gives_the_same_bits(runner: NativeRunner, pieces: tuple[int, ...]) -> None:
    tokens = random_tokens(random.Random(7), 150)
    states = decode(runner, tokens)
    rows = runner.committed_rows(LAYER)
    runner.truncate(0)
    start = 0
    for size in pieces:
        runner.prefill(tokens[start : start + size])
        start += size
        assert torch.equal(runner.heads_state(), states[start - 1]) and runner.num_prefixed == start
    assert_same_rows(runner.committed_rows(LAYER), rows)


def test_a_text_of_committed_paths_goes_on_as_if_it_had_been_a_prompt(runner: NativeRunner) -> None:
    draw = random.Random(11)
    text = random_tokens(draw, 20)
    runner.prefill(text)
    for _ in range(10):
        tree = random_tree(draw, draw.randrange(1, 40))
        tokens = random_tokens(draw, tree.num_nodes)
        runner.verify(tokens, tree)
        path = tree.path_to(draw.randrange(tree.num_nodes))[: draw.randrange(1, 9)]
        runner.commit(path)
        text += [tokens[node] for node in path]
    state, rows = runner.heads_state(), runner.committed_rows(LAYER)
    assert runner.num_prefixed == runner.num_committed == len(text)
    runner.truncate(0)
    runner.prefill(text)
    assert torch.equal(runner.heads_state(), state)
    assert_same_rows(runner.committed_rows(LAYER), rows)


def test_threads_do_not_change_a_bit(weights: BackboneWeights, runner: NativeRunner, prefix: PrefixAttention) -> None:
    alone = NativeRunner(CONFIG, weights, source_format="Q4_1", threads=NativeThreads(1))
    alone.attach(prefix)
    tokens = random_tokens(random.Random(4), 90)
    runner.prefill(tokens)
    alone.prefill(tokens)
    assert torch.equal(runner.heads_state(), alone.heads_state())


def test_the_text_does_not_know_of_it(runner: NativeRunner, bare: NativeRunner) -> None:
    draw = random.Random(5)
    prompt = random_tokens(draw, 70)
    assert torch.equal(runner.prefill(prompt), bare.prefill(prompt))
    for step in range(6):
        tree = random_tree(draw, draw.choice([1, 5, 20]))
        tokens = random_tokens(draw, tree.num_nodes)
        assert torch.equal(runner.verify(tokens, tree, for_heads=step < 3), bare.verify(tokens, tree))
        path = tree.path_to(tree.num_nodes - 1)
        runner.commit(path)
        bare.commit(path)
    for layer in range(CONFIG.num_layers):
        assert_same_rows(runner.committed_rows(layer), bare.committed_rows(layer))


def test_plain_steps_leave_it_behind_until_the_text_is_cut_back(runner: NativeRunner) -> None:
    draw = random.Random(6)
    text = random_tokens(draw, 75)
    runner.prefill(text[:40])
    hidden = runner.verify(text[40:44], CandidateTree.chain(3), for_heads=False)
    runner.commit([0, 1, 2])
    assert (runner.num_committed, runner.num_prefixed) == (43, 40)
    assert torch.equal(runner.heads_state(), hidden[2])
    hidden = runner.verify(text[43:50], CandidateTree.from_choices([(rank,) for rank in range(6)]))
    runner.commit([0, 4])  # it sees nothing behind rows that it has not seen
    assert (runner.num_committed, runner.num_prefixed) == (45, 40)
    assert torch.equal(runner.heads_state(), hidden[4])
    assert torch.equal(runner.prefill([7, 8]), runner.heads_state())
    assert (runner.num_committed, runner.num_prefixed) == (47, 40)
    runner.truncate(44)
    assert runner.num_prefixed == 40
    runner.truncate(39)
    assert runner.num_prefixed == 39
    runner.prefill(text[39:])
    assert runner.num_prefixed == runner.num_committed == 75
    state, rows = runner.heads_state(), runner.committed_rows(LAYER)
    runner.truncate(0)
    assert torch.equal(decode(runner, text)[-1], state)
    assert_same_rows(runner.committed_rows(LAYER), rows)


def test_without_one_heads_read_the_hidden_state(bare: NativeRunner) -> None:
    last = bare.prefill([1, 2, 3])
    assert torch.equal(bare.heads_state(), last) and bare.num_prefixed == 3
    hidden = bare.verify([4, 5, 6], CandidateTree.from_choices([(0,), (1,)]), for_heads=False)
    bare.commit([0, 2])
    assert torch.equal(bare.heads_state(), hidden[2]) and bare.num_prefixed == 5
    with pytest.raises(IndexError, match=r"Layer 3 is not in 0\.\.2"):
        bare.committed_rows(LAYER)


def test_heads_state_is_of_the_last_token_or_an_error(runner: NativeRunner) -> None:
    with pytest.raises(ValueError, match="behind 0 tokens is not kept"):
        runner.heads_state()
    runner.prefill([1, 2, 3])
    state = runner.heads_state()
    runner.verify([4, 5], CandidateTree.chain(1))
    assert torch.equal(runner.heads_state(), state)
    runner.truncate(3)  # drops the tree alone
    assert torch.equal(runner.heads_state(), state)
    runner.truncate(2)
    with pytest.raises(ValueError, match="behind 2 tokens is not kept"):
        runner.heads_state()


def test_wrong_attachments_raise(runner: NativeRunner, bare: NativeRunner, prefix: PrefixAttention) -> None:
    with pytest.raises(CheckpointMismatchError, match="3 heads"):
        bare.attach(random_prefix(replace(SHAPE, num_heads=3)))
    with pytest.raises(CheckpointMismatchError, match="layers \\[3\\]"):
        bare.attach(random_prefix(replace(SHAPE, layers=(3,))))
    with pytest.raises(CheckpointMismatchError, match="states of 64; the model's are of 96"):
        bare.attach(random_prefix(hidden_size=64))
    with pytest.raises(ValueError, match="one is attached already"):
        runner.attach(prefix)
    bare.prefill([1, 2])
    with pytest.raises(ValueError, match="2 tokens are committed"):
        bare.attach(prefix)
    bare.truncate(0)
    bare.attach(prefix)
    bare.prefill([1, 2])
    with pytest.raises(IndexError, match=r"Layer 4 is not in 0\.\.3"):
        bare.committed_rows(LAYER + 1)


def test_memory_is_matrices_rows_and_one_more_layer_of_cache(bare: NativeRunner, prefix: PrefixAttention) -> None:
    empty = bare.memory_bytes()
    bare.attach(prefix)
    attached = bare.memory_bytes()
    values = sum(parameter.numel() for parameter in prefix.parameters())
    inputs = 3 * CONFIG.hidden_size // 32 * 80 * 44  # quantised rows of a step
    assert 0 <= attached - empty - values * 20 / 32 - inputs < 1024
    decode(bare, [1] * 3)
    page = 128 * (CONFIG.num_layers + 1) * CONFIG.num_kv_heads * CONFIG.head_dim * 2 * 2
    assert 0 <= bare.memory_bytes() - attached - page < 250_000


def test_its_time_is_a_part_of_its_own(runner: NativeRunner) -> None:
    with runner.measure() as parts:
        runner.prefill([1] * 20)
    assert list(parts)[-1] == "prefix" and parts["prefix"] > 0
    with runner.measure() as parts:
        runner.verify([1], PLAIN, for_heads=False)
    assert parts["prefix"] == 0 and parts["qkv"] > 0


@pytest.mark.parametrize(("width", "kind"), [(160, NativeDrafter), (None, HeadsDrafter)])
def test_heads_bring_it_to_the_runner(
    bare: NativeRunner,
    runner: NativeRunner,
    weights: BackboneWeights,
    prefix: PrefixAttention,
    width: int | None,
    kind: type,
) -> None:
    heads = MedusaHeads(HeadsConfig(CONFIG.hidden_size, CONFIG.vocab_size, 2, 1, width, prefix=SHAPE))
    heads.load_state_dict(prefix.state_dict(prefix="prefix."), strict=False)
    built = Built(bare, partial(DenseLinear, dtype=torch.float32))
    drafter, _ = build_drafter(heads, built, weights.lm_head)
    assert isinstance(drafter, kind)
    assert heads.prefix is None and bare.memory_bytes() == runner.memory_bytes()  # it is the runner's alone
    for each in (bare, runner):
        each.prefill([3, 1, 4, 1, 5])
    assert torch.equal(bare.heads_state(), runner.heads_state())
