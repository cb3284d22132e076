"""The candidate tree: which guesses of which head are tried together.

A node is named by its choice, the ranks on the way to it: (0, 2) is head 1's third guess after head 0's best. The tree
knows shape only; tokens, probabilities and acceptance live elsewhere. Nodes are ordered by depth, then
lexicographically, root first, so a parent always precedes its children.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["MAX_TREE_NODES", "CandidateTree", "Choice"]

Choice = tuple[int, ...]

MAX_TREE_NODES = 64  # drafted nodes; the shape that kernels and captured steps are built for


@dataclass(frozen=True)
class CandidateTree:
    """A fixed tree over `choices` (without the root), in node order."""

    choices: tuple[Choice, ...]

    @classmethod
    def from_choices(cls, choices: Iterable[Sequence[int]]) -> "CandidateTree":
        """Build the tree from choices in any order; every prefix of a choice must be there too.

        Raises ValueError for an orphan, a duplicate, an empty choice or a negative rank.
        """
        ordered = sorted((tuple(choice) for choice in choices), key=lambda choice: (len(choice), choice))
        _check(ordered)
        return cls(tuple(ordered))

    @classmethod
    def chain(cls, depth: int) -> "CandidateTree":
        """Build the tree that tries each head's best guess only."""
        return cls.from_choices((0,) * length for length in range(1, depth + 1))

    @property
    def num_nodes(self) -> int:
        """Nodes with the root: the rows of one verify forward."""
        return len(self.choices) + 1

    @property
    def num_drafted(self) -> int:
        """Nodes without the root."""
        return len(self.choices)

    @property
    def filled(self) -> "CandidateTree":
        """The tree that heads fill for it: all of it (see `engine.pruned_tree` for one of which a part is verified)."""
        return self

    @property
    def max_depth(self) -> int:
        return len(self.choices[-1]) if self.choices else 0

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Parent of each node; the root's is -1."""
        index = {choice: node for node, choice in enumerate(self._named)}
        return (-1, *(index[choice[:-1]] for choice in self.choices))

    @cached_property
    def depth(self) -> Tensor:
        """Distance from the root, int64 [nodes]."""
        return torch.tensor([len(choice) for choice in self._named])

    @cached_property
    def rank(self) -> Tensor:
        """Which guess of its head a node is (0 the best), int64 [nodes]; the root's is 0."""
        return torch.tensor([choice[-1] if choice else 0 for choice in self._named])

    @cached_property
    def ancestors(self) -> Tensor:
        """True at [i, j] where node j is i itself or above it: the tree attention mask, bool [nodes, nodes]."""
        mask = torch.eye(self.num_nodes, dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node] |= mask[parent]
        return mask

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of each node, best rank first."""
        below: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                below[parent].append(node)
        return tuple(tuple(nodes) for nodes in below)

    @cached_property
    def paths(self) -> Tensor:
        """Nodes from the root to each leaf, padded with -1, int64 [leaves, max_depth + 1]."""
        leaves = [node for node in range(self.num_nodes) if not self.children[node]]
        rows = [self.path_to(leaf) for leaf in leaves]
        return torch.tensor([row + [-1] * (self.max_depth + 1 - len(row)) for row in rows])

    @cached_property
    def depth_first(self) -> tuple[int, ...]:
        """All nodes in preorder: each node directly after its parent's subtree up to it."""
        order: list[int] = []
        pending = [0]
        while pending:
            node = pending.pop()
            order.append(node)
            pending.extend(reversed(self.children[node]))
        return tuple(order)

    @cached_property
    def ranks_by_depth(self) -> tuple[int, ...]:
        """How many guesses each head must give: 1 + the largest rank used at each depth."""
        return tuple(
            1 + max(choice[-1] for choice in self.choices if len(choice) == depth)
            for depth in range(1, self.max_depth + 1)
        )

    def path_to(self, node: int) -> list[int]:
        """Nodes from the root to `node`, both included."""
        path = [node]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return path[::-1]

    @cached_property
    def _named(self) -> tuple[Choice, ...]:
        return ((), *self.choices)


def _check(ordered: list[Choice]) -> None:
    known: set[Choice] = {()}
    for choice in ordered:
        if not choice or min(choice) < 0:
            raise ValueError(f"Choice {choice} is not a path of ranks from 0; leave out the root, it is implied.")
        if choice in known:
            raise ValueError(f"Choice {choice} is listed twice; list every node once.")
        if choice[:-1] not in known:
            raise ValueError(f"Choice {choice} has no parent; add {choice[:-1]} to the tree.")
        known.add(choice)
