"""The nested candidate trees of a set of heads: one order of nodes, of which a tree of n nodes is the first n.

The order lies as JSON beside the heads (`NAME.tree.json`), written by calibration.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

from engine.errors import CheckpointMismatchError
from engine.tree import MAX_TREE_NODES, CandidateTree, Choice

__all__ = ["NestedTree", "tree_file"]

# Head-by-rank accuracies of the first trained heads of the bundled model; the order for heads without calibration.
_TYPICAL = ((0.45, 0.13, 0.07, 0.05, 0.03, 0.03), (0.25, 0.10, 0.06, 0.04, 0.03), (0.17, 0.08, 0.05), (0.13, 0.06))
_DEFAULT_NODES = {"cpu": 2, "cuda": 16}  # the fastest of 2, 3, 4 and 6 on two AVX512 cores; on a GPU a guess


def tree_file(heads: Path) -> Path:
    """Return the calibration's place beside a heads file."""
    return heads.with_suffix(".tree.json")


@dataclass(frozen=True)
class NestedTree:
    """An order of choices in which every prefix is a tree; `expected[n]` tokens per step for n nodes, if measured."""

    order: tuple[Choice, ...]
    expected: tuple[float, ...] = ()

    @classmethod
    def default(cls) -> "NestedTree":
        """Return the order for heads that nobody calibrated."""
        return cls(order_by_likelihood(_TYPICAL))

    @classmethod
    def beside(cls, heads: Path) -> "NestedTree":
        """Read the calibration of a heads file; without one, the default order."""
        path = tree_file(heads)
        if not path.is_file():
            return cls.default()
        try:
            content = json.loads(path.read_text())
            order = tuple(tuple(int(rank) for rank in choice) for choice in content["order"])
            return cls(order, tuple(float(value) for value in content["expected_tokens_per_step"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointMismatchError(
                f"{path.name} is not a calibration ({error}); run calibrate again."
            ) from error

    @property
    def default_nodes(self) -> dict[str, int]:
        return _DEFAULT_NODES

    def limited(self, num_heads: int) -> "NestedTree":
        """Leave out nodes deeper than there are heads; the measured figures hold for the whole order only."""
        kept = tuple(choice for choice in self.order if len(choice) <= num_heads)
        return NestedTree(kept, self.expected if kept == self.order else ())

    @property
    def max_depth(self) -> int:
        return max((len(choice) for choice in self.order), default=0)

    def first(self, nodes: int, depth: int | None = None) -> CandidateTree:
        """Return the tree of the first `nodes` drafted nodes, or of all where there are fewer; with `depth`, of the
        first that are no deeper."""
        order = self.order if depth is None else tuple(choice for choice in self.order if len(choice) <= depth)
        return _tree(order[:nodes])


@lru_cache(maxsize=128)
def _tree(choices: tuple[Choice, ...]) -> CandidateTree:
    return CandidateTree.from_choices(choices)


def order_by_likelihood(accuracies: tuple[tuple[float, ...], ...]) -> tuple[Choice, ...]:
    """Order nodes by the product of their heads' rank accuracies, heads taken as independent (paper, section 2.3.3)."""
    chances: dict[Choice, float] = {}
    for depth in range(1, len(accuracies) + 1):
        for choice in product(*(range(len(ranks)) for ranks in accuracies[:depth])):
            chance = 1.0
            for head, rank in enumerate(choice):
                chance *= accuracies[head][rank]
            chances[choice] = chance
    ordered = sorted(chances, key=lambda choice: (-chances[choice], len(choice), choice))
    return tuple(ordered[:MAX_TREE_NODES])
