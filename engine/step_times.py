"""How long one decode step takes on this machine, by the size of its tree: drafting, verifying, accepting, committing.

Measured through the loop that answers use, behind a prompt of ordinary length. What was committed before is lost.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Protocol

from engine.records import DecodeStep
from engine.tree import CandidateTree

__all__ = ["SIZES", "StepTimer", "measure_step_times"]

# Drafted nodes. With the root, sizes from 7 on fill the kernels' tiles of 8 and 16 rows: between them a smaller tree
# costs the same, so no size there could be the better choice.
SIZES = (0, 1, 2, 3, 4, 5, 7, 11, 15, 23, 31, 47, 63)
_ROUNDS = 3
_WARM_STEPS, _WARM_MS = 4, 25.0  # the first steps after a prompt find caches and clocks in another state
_STEPS, _TURN_MS = 9, 60.0  # timed steps of one size before the next one has its turn; either ends it
_AT_LEAST = 3  # sizes measured whatever it costs

Measure = Callable[[int], list[float]]  # drafted nodes -> milliseconds of a few steps


class Loop(Protocol):
    """What is asked of a decode loop."""

    def prefill(self, tokens: Sequence[int]) -> int: ...

    def steps(self, tree: CandidateTree) -> Iterator[DecodeStep]: ...


class StepTimer:
    """Times steps behind `prompt`. `loop` makes a new greedy loop, with heads or without.

    `truncate` is the runner's; a captured loop needs `warm_steps` to load, capture and fill its queue.
    """

    def __init__(
        self,
        *,
        loop: Callable[[bool], Loop],
        tree: Callable[[int], CandidateTree],
        truncate: Callable[[int], None],
        prompt: Sequence[int],
        warm_steps: int,
    ) -> None:
        self._loop, self._tree, self._truncate = loop, tree, truncate
        self._prompt, self._warm_steps = list(prompt), warm_steps
        self._is_filled = False

    def __call__(self, nodes: int) -> list[float]:
        """Return the milliseconds of a few steps with `nodes` drafted nodes."""
        loop = self._loop(nodes > 0)
        self._fill()
        loop.prefill(self._prompt[-1:])
        steps = loop.steps(self._tree(nodes))
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
    sizes: Sequence[int],
    *,
    budget_s: float,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Return milliseconds a step by drafted nodes: in rounds over `sizes`, the median of each turn, the lowest turn.

    Other programs make steps longer and never shorter, and they seldom slow all rounds. The budget begins behind the
    first three sizes; when it is spent no further size is begun, and larger ones are then missing. Times never fall
    with size: where noise says so, the smaller tree gets the larger one's time.
    """
    started = clock()
    turns: dict[int, list[float]] = {}
    for turn in range(_ROUNDS):
        for size in sizes if turn == 0 else list(turns):
            if len(turns) >= _AT_LEAST and clock() - started > budget_s:
                break
            if turn == 0:
                say(f"Measuring this machine: trees of {size} of {sizes[-1]} nodes")
            turns.setdefault(size, []).append(median(measure(size)))
            if turn == 0 and len(turns) == _AT_LEAST:
                started = clock()  # the first sizes may have compiled kernels for all of them
    return _never_falling({size: min(taken) for size, taken in turns.items()})


def _never_falling(times: dict[int, float]) -> dict[int, float]:
    lowest, found = float("inf"), {}
    for size in sorted(times, reverse=True):
        lowest = min(lowest, times[size])
        found[size] = lowest
    return {size: found[size] for size in sorted(found)}
