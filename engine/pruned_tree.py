"""A candidate tree that is chosen anew in every step: of the nodes that the heads fill, the likeliest.

Guessing is cheap beside verifying, so the heads fill more nodes than a step verifies. What a node is worth is estimated
by the product of the heads' own probabilities on its path, as in EAGLE-2 (arXiv 2406.16858, section 4.2). A parent is
never less likely than its child and comes first among equals, so what is kept is a tree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from engine.tree import CandidateTree

__all__ = ["PrunedTree", "Tree", "by_likelihood", "path_chances"]


@dataclass(frozen=True)
class PrunedTree:
    """The `num_drafted` likeliest nodes of the tree that the heads fill."""

    filled: CandidateTree
    num_drafted: int

    def __post_init__(self) -> None:
        if not 0 < self.num_drafted < self.filled.num_drafted:
            raise ValueError(f"{self.num_drafted} of {self.filled.num_drafted} nodes; keep at least 1, and leave some.")

    @property
    def num_nodes(self) -> int:
        """Nodes with the root: the rows of one verify forward."""
        return self.num_drafted + 1

    @property
    def max_depth(self) -> int:
        """The depth of the deepest node that can be kept."""
        return self.filled.max_depth

    def kept(self, probabilities: Sequence[float]) -> tuple[int, ...]:
        """Choose by the heads' probabilities of all filled nodes: the nodes that are verified, in order, root first."""
        likeliest = by_likelihood(self.filled.parents, probabilities)
        return tuple(sorted(likeliest[: self.num_nodes]))

    def tree_of(self, kept: tuple[int, ...]) -> CandidateTree:
        """Return the tree that is left of the filled one when these nodes are kept."""
        return _left(self.filled, kept)


Tree = CandidateTree | PrunedTree


def path_chances(parents: Sequence[int], probabilities: Sequence[float]) -> list[float]:
    """Return the product of the probabilities on the path to each node; parents come before their children."""
    chances: list[float] = []
    for parent, probability in zip(parents, probabilities, strict=True):
        chances.append(1.0 if parent < 0 else chances[parent] * probability)
    return chances


def by_likelihood(parents: Sequence[int], probabilities: Sequence[float]) -> list[int]:
    """Order nodes, the likeliest path first; of equals the first in node order, so that the root leads."""
    chances = path_chances(parents, probabilities)
    return sorted(range(len(chances)), key=lambda node: -chances[node])


@lru_cache(maxsize=8192)
def _left(filled: CandidateTree, kept: tuple[int, ...]) -> CandidateTree:
    return CandidateTree(tuple(filled.choices[node - 1] for node in kept[1:]))
