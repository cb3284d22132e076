"""A candidate tree as the kernels read it: small tables on the device, and what each draft head is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.tree_attention import ancestor_table
from engine.tree import CandidateTree

__all__ = ["Round", "TreePlan"]


@dataclass(frozen=True)
class Round:
    """One head's turn: it runs on the rows of `row_nodes` and fills `nodes` with its `guesses` best."""

    head: int
    row_nodes: Tensor  # int32 [rows]: the node behind whose path a row guesses
    nodes: range
    guesses: int

    @property
    def num_rows(self) -> int:
        return len(self.row_nodes)


class TreePlan:
    """Tables int32 [nodes] (ancestor_at [nodes, 16], is_above bool [nodes, nodes]) of one tree on one device.

    Where heads do not see the path, all nodes of a depth share one row.
    """

    def __init__(self, tree: CandidateTree, device: torch.device | str, *, sees_path: bool) -> None:
        self.tree = tree
        self.num_nodes = tree.num_nodes
        self.depth = tree.depth.int().to(device)
        self.parents = _int32(tree.parents, device)
        self.rank = tree.rank.int().to(device)
        self.ancestor_at = ancestor_table(tree.ancestors, tree.depth).to(device)
        self.is_above = tree.ancestors.to(device)
        depths = tree.depth.tolist()
        rows = [0] * tree.num_nodes
        rounds = []
        for head, guesses in enumerate(tree.ranks_by_depth):
            first = depths.index(head + 1)
            nodes = range(first, first + depths.count(head + 1))
            parents = list(dict.fromkeys(tree.parents[node] for node in nodes)) if sees_path else [0]
            for node in nodes:
                rows[node] = parents.index(tree.parents[node]) if sees_path else 0
            rounds.append(Round(head, _int32(parents, device), nodes, guesses))
        self.row_of = _int32(rows, device)
        self.rounds = tuple(rounds)


def _int32(values: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).to(device)
