"""A candidate tree as the kernels read it: small tables on the device, and what each draft head is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.cuda_memory import StepMemory
from engine.kernels.draft_guesses import Guessed
from engine.kernels.draft_prune import KeptTables
from engine.kernels.tree_attention import ancestor_table
from engine.pruned_tree import PrunedTree, Tree
from engine.tree import CandidateTree

__all__ = ["Round", "TreePlan", "VerifiedNodes", "copy_tables"]


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


@dataclass(frozen=True)
class VerifiedNodes:
    """What a step's launches read of the nodes that it verifies: int32 [nodes], ancestor_at [nodes, 16] as
    `ancestor_table`, and is_above bool [nodes, nodes]."""

    tokens: Tensor
    depth: Tensor
    parents: Tensor
    ancestor_at: Tensor
    is_above: Tensor

    @property
    def num_nodes(self) -> int:
        return len(self.tokens)


def copy_tables(tree: CandidateTree, memory: StepMemory) -> VerifiedNodes:
    """Put a tree's tables where those of kept nodes lie: launches over them serve all trees of as many nodes."""
    kept = memory.kept.of(tree.num_nodes)
    kept.depth.copy_(tree.depth)
    kept.parents.copy_(torch.tensor(tree.parents))
    kept.ancestor_at.copy_(ancestor_table(tree.ancestors, tree.depth))
    kept.is_above.copy_(tree.ancestors)
    return VerifiedNodes(kept.tokens, kept.depth, kept.parents, kept.ancestor_at, kept.is_above)


class TreePlan:
    """Tables of one tree over a step's memory: of the nodes that the heads fill, and of those that are `verified`.

    Int32 [nodes], ancestor_at [nodes, 16]. All nodes are verified, or of a pruned tree those that a launch keeps
    (`kept`, None otherwise). Where heads do not see the path, all nodes of a depth share one row.
    """

    def __init__(self, given: Tree, memory: StepMemory, *, sees_path: bool) -> None:
        device = memory.device
        self.tree = tree = given.filled
        self.num_nodes = tree.num_nodes
        self.depth = tree.depth.int().to(device)
        self.rank = tree.rank.int().to(device)
        self.ancestor_at = ancestor_table(tree.ancestors, tree.depth).to(device)
        self.kept: KeptTables | None = None
        if isinstance(given, PrunedTree):
            self.kept = kept = memory.kept.of(given.num_nodes)
            self.verified = VerifiedNodes(kept.tokens, kept.depth, kept.parents, kept.ancestor_at, kept.is_above)
        else:
            parents, tokens = _int32(tree.parents, device), memory.tokens[: tree.num_nodes]
            self.verified = VerifiedNodes(tokens, self.depth, parents, self.ancestor_at, tree.ancestors.to(device))
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
        self.filled = Guessed(self.row_of, self.rank, memory.tokens, memory.chances, range(1, tree.num_nodes))


def _int32(values: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).to(device)
