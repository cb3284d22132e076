"""The C drafter: its guesses and probabilities are those of the heads, whatever the heads see and put out."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from small_decoder import CONFIG, random_tree, random_weights
from torch import Tensor, nn

from engine import native_drafter
from engine.block_weights import DenseWeight, quantize_q4
from engine.draft import HeadsDrafter
from engine.heads import HeadsConfig, MedusaHeads
from engine.kernels.cpu_build import CpuKernelsUnavailableError
from engine.kernels.cpu_native import NativeThreads, to_q8
from engine.native_drafter import NativeDrafter
from engine.native_runner import NativeRunner
from engine.tree import CandidateTree

HIDDEN, VOCAB = CONFIG.hidden_size, CONFIG.vocab_size
VARIANTS = [
    ("hidden", "shared", 0),
    ("root", "truncated", 70),
    ("path", "truncated", 70),
    ("path", "own", 0),
    ("root", "own_truncated", 70),
]


@pytest.fixture(scope="module")
def runner() -> NativeRunner:
    torch.manual_seed(4)
    try:
        return NativeRunner(CONFIG, random_weights(CONFIG), source_format="Q4_1", threads=NativeThreads(3))
    except CpuKernelsUnavailableError as error:
        pytest.skip(str(error))


def heads_of(sees: str, output: str, draft_vocab: int, width: int | None = 160) -> MedusaHeads:
    """Random heads of three blocks' worth of noise, with the values that 4 bits can hold."""
    config = HeadsConfig(HIDDEN, VOCAB, 3, 2, width, sees, output, draft_vocab)
    heads = MedusaHeads(config, torch.randperm(VOCAB)[:draft_vocab] if draft_vocab else None)
    for linear in [module for module in heads.modules() if isinstance(module, nn.Linear)]:
        values = torch.randn_like(linear.weight) * 1.5 / linear.in_features**0.5
        linear.weight.data = quantize_q4(values).dequantize()
    return heads


def float_drafter(heads: MedusaHeads, runner: NativeRunner) -> HeadsDrafter:
    rows = torch.arange(VOCAB) if heads.token_map is None else heads.token_map
    shared = nn.Linear(HIDDEN, len(rows), bias=False)
    shared.weight.data = runner.embed(rows)
    return HeadsDrafter(heads, runner.embed, shared)


def lm_head(runner: NativeRunner) -> DenseWeight:
    return DenseWeight(runner.embed(torch.arange(VOCAB)))


@pytest.mark.parametrize("output", ["truncated", "own_truncated"])
def test_drafts_from_the_most_used_tokens_alone(
    runner: NativeRunner, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.setattr(native_drafter, "FREQUENT_TOKENS", 20)
    torch.manual_seed(6)
    heads = heads_of("root", output, 70)
    assert heads.token_map is not None
    tree = CandidateTree.from_choices([(rank,) for rank in range(20)])
    first, whole = set(heads.token_map[:20].tolist()), set(heads.token_map.tolist())
    for is_ordered in (True, False):
        heads.config = replace(heads.config, frequent_first=is_ordered)
        drafter = NativeDrafter(heads, runner, to_q8(lm_head(runner)))
        found = {token for hidden in torch.randn(30, HIDDEN) for token in drafter.draft(hidden, 5, tree).tokens[1:]}
        assert found == first if is_ordered else found - first and found <= whole


@pytest.mark.parametrize(("sees", "output", "draft_vocab"), VARIANTS)
def test_guesses_are_those_of_the_heads(runner: NativeRunner, sees: str, output: str, draft_vocab: int) -> None:
    torch.manual_seed(8)
    heads, draw = heads_of(sees, output, draft_vocab), random.Random(1)
    native = NativeDrafter(heads, runner, to_q8(lm_head(runner)))
    reference = float_drafter(heads, runner)
    same, apart, total = 0, [], 0
    for hidden in torch.randn(60, HIDDEN):
        tree = cut(random_tree(draw, 30), 3)
        root = draw.randrange(VOCAB)
        found, expected = native.draft(hidden, root, tree), reference.draft(hidden, root, tree)
        assert found.tokens[0] == root and found.probabilities[0] == 1
        for node in range(1, tree.num_nodes):
            if path_of(found.tokens, tree, tree.parents[node]) != path_of(expected.tokens, tree, tree.parents[node]):
                continue  # another text was seen; what follows cannot be compared
            total += 1
            same += found.tokens[node] == expected.tokens[node]
            apart.append(abs(found.probabilities[node] - expected.probabilities[node]))
    assert total > 200 and same / total > 0.85
    assert sum(apart) / len(apart) < 0.01 and max(apart) < 0.15


def cut(tree: CandidateTree, depth: int) -> CandidateTree:
    return CandidateTree.from_choices({choice[:depth] for choice in tree.choices})


def path_of(tokens: Sequence[int], tree: CandidateTree, node: int) -> list[int]:
    return [tokens[step] for step in tree.path_to(node)]


def test_a_smaller_tree_gets_the_same_guesses(runner: NativeRunner) -> None:
    native = NativeDrafter(heads_of("path", "truncated", 70), runner, to_q8(lm_head(runner)))
    hidden = torch.randn(HIDDEN)
    large = CandidateTree.from_choices([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 0, 0)])
    small = CandidateTree.from_choices([(1,), (1, 0), (1, 0, 0), (0,)])
    drafts = {tree: native.draft(hidden, 7, tree) for tree in (large, small)}
    for choice in small.choices:
        node, twin = small.choices.index(choice) + 1, large.choices.index(choice) + 1
        assert drafts[small].tokens[node] == drafts[large].tokens[twin]
        assert drafts[small].probabilities[node] == drafts[large].probabilities[twin]


def test_draft_tokens_are_ids_of_the_full_vocabulary(runner: NativeRunner) -> None:
    heads = heads_of("hidden", "truncated", 5)
    native = NativeDrafter(heads, runner, to_q8(lm_head(runner)))
    tree = CandidateTree.from_choices([(rank,) for rank in range(5)])
    draft = native.draft(torch.randn(HIDDEN), 3, tree)
    assert isinstance(heads.token_map, Tensor)
    assert sorted(draft.tokens[1:]) == sorted(heads.token_map.tolist())
    assert draft.probabilities[1:] == sorted(draft.probabilities[1:], reverse=True)
    assert sum(draft.probabilities[1:]) == pytest.approx(1, abs=1e-4)


def test_wrong_calls_raise(runner: NativeRunner) -> None:
    native = NativeDrafter(heads_of("root", "truncated", 5), runner, to_q8(lm_head(runner)))
    hidden = torch.randn(HIDDEN)
    with pytest.raises(ValueError, match="depth 4 needs as many heads; these are 3"):
        native.draft(hidden, 1, CandidateTree.chain(4))
    with pytest.raises(ValueError, match="Token 211"):
        native.draft(hidden, VOCAB, CandidateTree.chain(1))
    with pytest.raises(ValueError, match="shape"):
        native.draft(torch.randn(HIDDEN + 1), 1, CandidateTree.chain(1))
    with pytest.raises(ValueError, match="rank 5"):
        native.draft(hidden, 1, CandidateTree.from_choices([(5,)]))
    with pytest.raises(CpuKernelsUnavailableError, match="narrow"):
        NativeDrafter(heads_of("hidden", "shared", 0, width=None), runner, to_q8(lm_head(runner)))


def test_memory_is_that_of_four_bit_heads(runner: NativeRunner) -> None:
    heads = heads_of("path", "own", 0)
    native = NativeDrafter(heads, runner, to_q8(lm_head(runner)))
    blocks = 160 * HIDDEN * (3 * 4 + 1 + 2 + 3)  # up and down of two blocks, and the tokens seen
    outputs = 3 * VOCAB * HIDDEN
    assert native.memory_bytes() > blocks * 20 / 32 + outputs * 34 / 32
    before = native.memory_bytes()
    native.draft(torch.randn(HIDDEN), 1, CandidateTree.from_choices([(0,), (1,), (0, 0), (1, 0)]))
    assert native.memory_bytes() - before == 2 * VOCAB * 4
