"""Acceptance rules: which path of a verified tree becomes text. Pure functions over plain values.

Paths are node lists, root first. The walk follows real children only, so the padding of `CandidateTree.paths` can
never be accepted, whatever token has the id 0.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.tree import CandidateTree

__all__ = ["accept_exact", "accept_typical", "typical_threshold"]


def accept_exact(
    tree: CandidateTree, node_tokens: Sequence[int], target: Callable[[int], int]
) -> tuple[list[int], int]:
    """Follow the children that plain decoding would have chosen; return the path and the bonus token.

    `target(node)` is the backbone's own token after `node`; it is asked for the nodes on the path only.
    """
    path = [0]
    while True:
        token = target(path[-1])
        child = next((child for child in tree.children[path[-1]] if node_tokens[child] == token), None)
        if child is None:
            return path, token
        path.append(child)


def typical_threshold(probabilities: Tensor, epsilon: float | Tensor, delta: float | Tensor) -> Tensor:
    """min(epsilon, delta * exp(-entropy)) of each row (arXiv 2401.10774, section 2.3.1): [..., vocab] -> [...]."""
    entropy = torch.special.entr(probabilities).sum(-1)
    threshold = delta * torch.exp(-entropy)
    return torch.where(threshold < epsilon, threshold, epsilon)


def accept_typical(
    tree: CandidateTree,
    node_tokens: Sequence[int],
    probabilities: Callable[[int], Tensor],
    epsilon: float,
    delta: float,
) -> list[int]:
    """Return the longest path whose every drafted token is typical of the backbone; of equals the likelier one.

    `probabilities(node)` is the tempered distribution [vocab] after a node; it is asked for nodes with children on
    typical paths only. A token x under parent p is typical if P(x | p) > min(epsilon, delta * exp(-H(p))), strictly.
    The root is text already. Of paths alike in both respects the first in node order is taken.
    """
    likelihood: dict[int, float] = {0: 0.0}
    for node in range(tree.num_nodes):
        if node not in likelihood or not tree.children[node]:
            continue
        row = probabilities(node)
        threshold = float(typical_threshold(row, epsilon, delta))
        for child in tree.children[node]:
            chance = float(row[node_tokens[child]])
            if chance > threshold:
                likelihood[child] = likelihood[node] + math.log(chance)
    depths = tree.depth.tolist()
    best = max(sorted(likelihood), key=lambda node: (depths[node], likelihood[node]))
    return tree.path_to(best)
