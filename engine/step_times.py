"""How long one decode step takes on this machine, by the size of its tree: drafting, verifying, accepting, committing.

Measured through the loop that answers use, behind a prompt of ordinary length. What was committed before is lost. The
heads run one after the other, so a depth costs time of its own: that of two trees of as many nodes, the deepest and the
flattest, shared out among the depths between them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import NamedTuple, Protocol

from engine.nested_tree import NestedTree
from engine.pruned_tree import Tree
from engine.records import DecodeStep
from engine.tree import CandidateTree

__all__ = ["SIZES", "StepTimer", "StepTimes", "measure_step_times"]

# Drafted nodes. With the root, sizes from 7 on fill the kernels' tiles of 8 and 16 rows: between them a smaller tree
# costs the same, so no size there could be the better choice.
SIZES = (0, 1, 2, 3, 4, 5, 7, 11, 15, 23, 31, 47, 63)
_ROUNDS = 3
_WARM_STEPS, _WARM_MS = 4, 25.0  # the first steps after a prompt find caches and clocks in another state
_STEPS, _TURN_MS = 9, 60.0  # timed steps of one size before the next one has its turn; either ends it
_AT_LEAST = 3  # trees measured whatever it costs

Measure = Callable[[Tree], list[float]]  # milliseconds of a few steps


class StepTimes(NamedTuple):
    """Milliseconds a step by drafted nodes, 0 being plain decoding; and what each depth takes of it for its head's
    turn."""

    by_nodes: dict[int, float]
    per_depth: float


class Loop(Protocol):
    """What is asked of a decode loop."""

    def prefill(self, tokens: Sequence[int]) -> int: ...

    def steps(self, tree: Tree) -> Iterator[DecodeStep]: ...


class StepTimer:
    """Times steps behind `prompt`. `loop` makes a new greedy loop, with heads or without.

    `truncate` is the runner's; a captured loop needs `warm_steps` to load, capture and fill its queue.
    """

    def __init__(
        self,
        *,
        loop: Callable[[bool], Loop],
        truncate: Callable[[int], None],
        prompt: Sequence[int],
        warm_steps: int,
    ) -> None:
        self._loop, self._truncate = loop, truncate
        self._prompt, self._warm_steps = list(prompt), warm_steps
        self._is_filled = False

    def __call__(self, tree: Tree) -> list[float]:
        """Return the milliseconds of a few steps with `tree`."""
        loop = self._loop(tree.num_drafted > 0)
        self._fill()
        loop.prefill(self._prompt[-1:])
        steps = loop.steps(tree)
        for _ in range(self._warm_steps):
            next(steps)
        _few(steps, _WARM_STEPS - self._warm_steps, _WARM_MS)
        return _few(steps, _STEPS, _TURN_MS)

    def _fill(self) -> None:
        """Bring the cache to all of the prompt but its last token."""
        if self._is_filled:
            self._truncate(len(self._prompt) - 1)
            return
        self._truncate(0)
        self._loop(False).prefill(self._prompt[:-1])
        self._is_filled = True


def _few(steps: Iterator[DecodeStep], count: int, limit_ms: float) -> list[float]:
    """Run `count` steps, or fewer where they take longer than the limit together; return their milliseconds."""
    taken: list[float] = []
    while len(taken) < count and sum(taken) < limit_ms:
        taken.append(next(steps).duration_ms)
    return taken


def measure_step_times(
    measure: Measure,
    trees: NestedTree,
    max_nodes: int,
    *,
    budget_s: float,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.perf_counter,
) -> StepTimes:
    """Measure in rounds over trees of up to `max_nodes`: of each the median of a turn, and of its turns the lowest.

    Other programs make steps longer and never shorter, and they seldom slow all rounds. The budget begins behind the
    first three trees; when it is spent no further one is begun, and larger ones are then missing. Times never fall with
    size: where noise says so, the smaller tree gets the larger one's time.
    """
    nested = [trees.pruned(size) for size in SIZES if size <= min(len(trees.order), max_nodes)]
    deep, flat = _deep_and_flat(min(trees.max_depth, max_nodes))
    started = clock()
    turns: dict[Tree, list[float]] = {}
    every: list[Tree] = list(dict.fromkeys([*nested[:_AT_LEAST], deep, flat, *nested]))
    for turn in range(_ROUNDS):
        for tree in every if turn == 0 else list(turns):
            if len(turns) >= _AT_LEAST and clock() - started > budget_s:
                break
            if turn == 0:
                say(f"Measuring this machine: trees of {tree.num_drafted} of {nested[-1].num_drafted} nodes")
            turns.setdefault(tree, []).append(median(measure(tree)))
            if turn == 0 and len(turns) == _AT_LEAST:
                started = clock()  # the first trees may have compiled kernels for all of them
    lowest = {tree: min(taken) for tree, taken in turns.items()}
    by_nodes = _never_falling({tree.num_drafted: lowest[tree] for tree in nested if tree in lowest})
    return StepTimes(by_nodes, _per_depth(lowest, deep, flat, by_nodes))


def _deep_and_flat(depth: int) -> tuple[CandidateTree, CandidateTree]:
    """Two trees of `depth` nodes: each head's best guess, and the first head's best guesses."""
    return CandidateTree.chain(depth), CandidateTree.from_choices((rank,) for rank in range(depth))


def _per_depth(
    lowest: dict[Tree, float], deep: CandidateTree, flat: CandidateTree, by_nodes: dict[int, float]
) -> float:
    """Return a depth's share of the deep tree's time, and 0 where it was not measured.

    One drafted node takes a depth and a row more than none, so that noise cannot make a depth cost more than both.
    """
    if deep.max_depth < 2 or not {deep, flat} <= lowest.keys():
        return 0.0
    share = (lowest[deep] - lowest[flat]) / (deep.max_depth - 1)
    return max(0.0, min(share, by_nodes.get(1, float("inf")) - by_nodes[0]))


def _never_falling(times: dict[int, float]) -> dict[int, float]:
    lowest, found = float("inf"), {}
    for size in sorted(times, reverse=True):
        lowest = min(lowest, times[size])
        found[size] = lowest
    return {size: found[size] for size in sorted(found)}
