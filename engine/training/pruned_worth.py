"""What trees bring that are pruned in every step by the heads' own chances (`engine.pruned_tree`).

Which nodes a step keeps depends on guesses that turn out wrong as well, so the heads are asked for whole trees, at
every place where a step could start; then steps are simulated as in calibration.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.heads import MedusaHeads
from engine.nested_tree import NestedTree
from engine.pruned_tree import PrunedTree
from engine.training.calibrate import Calibration, mean_accepted
from engine.training.dataset import HiddenCache
from engine.training.medusa1 import Vocabulary
from engine.training.ranks import AnswerRanks
from engine.tree import CandidateTree, Choice

__all__ = ["NodeChances", "expected_by_depth", "measure_chances", "with_pruned"]


@dataclass(frozen=True)
class NodeChances:
    """For all nodes of an order at every anchor, [anchors, nodes] on the CPU.

    `chance` float32 is the product of the heads' probabilities on the way to a node, `is_true` bool says whether its
    path is what really followed.
    """

    chance: Tensor
    is_true: Tensor


def with_pruned(
    calibration: Calibration,
    measured: AnswerRanks,
    heads: MedusaHeads,
    cache: HiddenCache,
    vocabulary: Vocabulary,
    frequent: int = 0,
) -> Calibration:
    """Add to a calibration what pruned trees of its order bring on the same answers.

    Also where a machine guesses among the `frequent` first draft tokens alone, if their order is that of use.
    """

    def expected(vocabulary: Vocabulary) -> list[list[float]]:
        chances = measure_chances(heads, cache, vocabulary, calibration.order)
        return expected_by_depth(calibration.order, chances, measured)

    calibration = replace(calibration, by_depth=expected(vocabulary))
    if not heads.config.frequent_first or not 0 < frequent < heads.config.draft_vocab:
        return calibration
    return replace(calibration, frequent=frequent, by_depth_of_frequent=expected(vocabulary.first(frequent)))


@torch.no_grad()
def measure_chances(
    heads: MedusaHeads, cache: HiddenCache, vocabulary: Vocabulary, order: Sequence[Choice], chunk: int = 2048
) -> NodeChances:
    """Have the heads fill the tree of `order` at all anchors of the cache."""
    tree = CandidateTree.from_choices(order)
    outputs = [vocabulary.output_of(heads, head).float() for head in range(heads.config.num_heads)]
    parts = [_fill(heads, cache, vocabulary, outputs, tree, anchors) for anchors in cache.anchors().split(chunk)]
    places = [tree.choices.index(choice) + 1 for choice in order]
    chance, is_true = (torch.cat(part)[:, places].cpu() for part in zip(*parts, strict=True))
    return NodeChances(chance, is_true)


def expected_by_depth(order: Sequence[Choice], chances: NodeChances, measured: AnswerRanks) -> list[list[float]]:
    """Return tokens per step of `NestedTree.pruned` for every depth, each by nodes from 0 on."""
    nested = NestedTree(tuple(order))
    return [
        [
            1 + mean_accepted(_accepted(nested, nodes, depth, chances), measured)
            for nodes in range(1 + sum(len(choice) <= depth for choice in order))
        ]
        for depth in range(1, nested.max_depth + 1)
    ]


def _accepted(nested: NestedTree, nodes: int, depth: int, chances: NodeChances) -> Tensor:
    """Return how many tokens a step with this tree would accept at every anchor, int64 [anchors]."""
    tree = nested.pruned(nodes, depth)
    places = [nested.order.index(choice) for choice in tree.filled.choices]  # in node order, which decides among equals
    is_true = chances.is_true[:, places]
    if isinstance(tree, PrunedTree):
        likeliest = chances.chance[:, places].sort(dim=1, descending=True, stable=True).indices[:, :nodes]
        is_true = is_true.gather(1, likeliest)
    return is_true.sum(1)


def _fill(
    heads: MedusaHeads,
    cache: HiddenCache,
    vocabulary: Vocabulary,
    outputs: list[Tensor],
    tree: CandidateTree,
    anchors: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return chance and truth of all nodes, the root included, [anchors, nodes] each."""
    count, last = len(anchors), cache.num_tokens - 1
    tokens = torch.zeros(count, tree.num_nodes, dtype=torch.int64, device=anchors.device)
    chance = torch.ones(count, tree.num_nodes, device=anchors.device)
    is_true = torch.ones(count, tree.num_nodes, dtype=torch.bool, device=anchors.device)
    tokens[:, 0] = cache.tokens[(anchors + 1).clamp(max=last)]
    for parent, children in enumerate(tree.children):
        if not children:
            continue
        path = tree.path_to(parent)
        head = len(path) - 1
        guesses, chances = _guess(heads, vocabulary, outputs[head], head, cache.hidden[anchors], tokens[:, path], tree)
        gold = cache.tokens[(anchors + head + 2).clamp(max=last)]
        follows = is_true[:, parent] & (cache.run[anchors + 1] >= head + 2)
        for child in children:
            rank = tree.choices[child - 1][-1]
            tokens[:, child], chance[:, child] = guesses[:, rank], chance[:, parent] * chances[:, rank]
            is_true[:, child] = follows & (guesses[:, rank] == gold)
    return chance, is_true


def _guess(
    heads: MedusaHeads,
    vocabulary: Vocabulary,
    output: Tensor,
    head: int,
    hidden: Tensor,
    path: Tensor,
    tree: CandidateTree,
) -> tuple[Tensor, Tensor]:
    """Return the best tokens of `head` behind each path [anchors, head + 1], and their probabilities."""
    num_seen = heads.config.num_seen(head)
    seen = vocabulary.embeddings[path[:, :num_seen]] if num_seen else None
    with torch.autocast(hidden.device.type, torch.bfloat16):
        features = heads.features(head, hidden, seen)
    scores = features.float() @ output.T
    best = scores.topk(min(tree.ranks_by_depth[head], scores.shape[1]), dim=1)
    chances = torch.exp(best.values - scores.logsumexp(1, keepdim=True))
    tokens = best.indices if vocabulary.token_map is None else vocabulary.token_map[best.indices]
    return tokens, chances
