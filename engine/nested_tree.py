"""The candidate trees of a set of heads: one order of nodes, of which the heads fill the first, and a step verifies the
likeliest of those.

The order lies as JSON beside the heads (`NAME.tree.json`), written by calibration.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise, product
from pathlib import Path

from engine.errors import CheckpointMismatchError
from engine.pruned_tree import PrunedTree, Tree
from engine.tree import MAX_TREE_NODES, CandidateTree, Choice

__all__ = ["MAX_FILLED", "NestedTree", "tree_file"]

MAX_FILLED = MAX_TREE_NODES - 1  # with the root as many rows as a captured step has room for

# Head-by-rank accuracies of the first trained heads of the bundled model; the order for heads without calibration.
_TYPICAL = ((0.45, 0.13, 0.07, 0.05, 0.03, 0.03), (0.25, 0.10, 0.06, 0.04, 0.03), (0.17, 0.08, 0.05), (0.13, 0.06))
# Filled nodes for each that is verified. With the bundled heads, 80 prompts x 256 tokens, trees of 4, 7, 15 nodes bring
# 2.23, 2.51, 2.79 tokens a step if they are always the same; 2.36, 2.64, 2.93 of twice and 2.38, 2.66, 2.96 of six
# times as many.
_FILLED = 2
_DEFAULT_NODES = {"cpu": 2, "cuda": 16}  # the fastest of 2, 3, 4 and 6 on two AVX512 cores; on a GPU a guess


def tree_file(heads: Path) -> Path:
    """Return the calibration's place beside a heads file."""
    return heads.with_suffix(".tree.json")


@dataclass(frozen=True)
class NestedTree:
    """An order of choices in which every prefix is a tree.

    `expected[depth - 1][n]` are the tokens per step of `pruned(n, depth)`, if they were measured.
    """

    order: tuple[Choice, ...]
    expected: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def default(cls) -> "NestedTree":
        """Return the order for heads that nobody calibrated."""
        return cls(order_by_likelihood(_TYPICAL))

    @classmethod
    def beside(cls, heads: Path, num_scored: int = 0) -> "NestedTree":
        """Read the calibration of a heads file; without one, the default order.

        `num_scored` are the draft tokens among which heads guess here, 0 for all: what that brings may be known too.
        """
        path = tree_file(heads)
        if not path.is_file():
            return cls.default()
        try:
            content = json.loads(path.read_text())
            order = tuple(tuple(int(rank) for rank in choice) for choice in content["order"])
            if not content.get("expected_by_depth"):  # only what trees bring that are always the same
                return cls(order, _of_fixed_trees(order, [float(x) for x in content["expected_tokens_per_step"]]))
            is_cut = num_scored > 0 and num_scored == content.get("frequent_tokens")
            expected = content["expected_by_depth_of_frequent" if is_cut else "expected_by_depth"]
            return cls(order, tuple(tuple(float(value) for value in row) for row in expected))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointMismatchError(
                f"{path.name} is not a calibration ({error}); run calibrate again."
            ) from error

    @property
    def default_nodes(self) -> dict[str, int]:
        return _DEFAULT_NODES

    def limited(self, num_heads: int) -> "NestedTree":
        """Leave out nodes deeper than there are heads; the figures of the depths that are left still hold."""
        return NestedTree(self._no_deeper(num_heads), self.expected[:num_heads])

    @property
    def max_depth(self) -> int:
        return max((len(choice) for choice in self.order), default=0)

    def first(self, nodes: int, depth: int | None = None) -> CandidateTree:
        """Return the tree of the first `nodes` drafted nodes, or of all where there are fewer; with `depth`, of the
        first that are no deeper."""
        return _tree(self._no_deeper(depth)[:nodes])

    def pruned(self, nodes: int, depth: int | None = None) -> Tree:
        """Return the tree of the `nodes` likeliest of about twice as many; with `depth`, none of them is deeper.

        Of so many nodes none lies deeper than there are nodes. Where there are no more than `nodes`, all are verified.
        """
        order = self._no_deeper(min(nodes, self.max_depth if depth is None else depth))
        filled = _tree(order[: max(nodes, min(_FILLED * nodes, MAX_FILLED))])
        return PrunedTree(filled, nodes) if 1 < nodes < filled.num_drafted else self.first(nodes, depth)

    def _no_deeper(self, depth: int | None) -> tuple[Choice, ...]:
        return self.order if depth is None else tuple(choice for choice in self.order if len(choice) <= depth)


@lru_cache(maxsize=128)
def _tree(choices: tuple[Choice, ...]) -> CandidateTree:
    return CandidateTree.from_choices(choices)


def _of_fixed_trees(order: Sequence[Choice], expected: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Return by depth what the first nodes that are no deeper bring, from what the first of all bring."""
    gains = [after - before for before, after in pairwise(expected)]

    def of_depth(depth: int) -> tuple[float, ...]:
        kept = (gain for choice, gain in zip(order, gains, strict=True) if len(choice) <= depth)
        return tuple(accumulate(kept, initial=1.0))

    return tuple(of_depth(depth) for depth in range(1, 1 + max(map(len, order), default=0)))


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
