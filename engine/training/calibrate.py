"""From measured ranks to a nested order of tree nodes, and what each size of tree is worth.

The heads fill the first nodes of one order, chosen greedily by the estimated chance that a node is accepted. Three
estimators compete: independent heads (MEDUSA, appendix), each depth given its parent's rank, and plain counts of whole
paths. The winner is the one whose trees accept most on answers it has not seen. Worth is simulated: a step starts
where the last one ended, so places with long acceptance are not counted too often.
"""

import heapq
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from engine.training.ranks import MISSED, AnswerRanks
from engine.tree import MAX_TREE_NODES, Choice

__all__ = [
    "ESTIMATORS",
    "Calibration",
    "calibrate",
    "expected_worth",
    "mean_accepted",
    "node_order",
    "tokens_per_step",
    "write_calibration",
]

NEVER = 1 << 20  # nodes needed where no tree would do
Chance = Callable[[Choice], float]  # of a node's path being accepted


@dataclass(frozen=True)
class Calibration:
    """The chosen order and figures; `scores` are tokens per step by estimator at a few sizes, on unseen answers.

    `expected` are tokens per step of the first n nodes; `by_depth` those of trees that steps prune, by depth and nodes,
    if they were measured (`engine.training.pruned_worth`), and `by_depth_of_frequent` the same where heads guess among
    the `frequent` most used draft tokens alone.
    """

    order: list[Choice]
    expected: list[float]
    estimator: str
    scores: dict[str, dict[int, float]]
    accuracy: list[list[float]]
    num_answers: int
    num_positions: int
    by_depth: Sequence[Sequence[float]] = ()
    frequent: int = 0
    by_depth_of_frequent: Sequence[Sequence[float]] = ()


def independent(ranks: np.ndarray) -> Chance:
    """Each head's rank accuracies, multiplied along the path."""
    shares = [_shares(column) for column in ranks.T]
    return lambda path: float(np.prod([shares[depth][rank] for depth, rank in enumerate(path)]))


def conditional(ranks: np.ndarray) -> Chance:
    """Each depth's rank accuracies given that the path was right so far and at which rank its parent was."""
    tables: list[np.ndarray] = []
    alive = np.ones(len(ranks), dtype=bool)
    for depth in range(ranks.shape[1]):
        parent = ranks[:, depth - 1] if depth else np.zeros(len(ranks), dtype=np.uint8)
        counts = np.zeros((MISSED + 1, MISSED + 1))
        np.add.at(counts, (parent[alive], ranks[alive, depth]), 1)
        tables.append(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
        alive &= ranks[:, depth] < MISSED
    return lambda path: float(
        np.prod([tables[depth][path[depth - 1] if depth else 0, rank] for depth, rank in enumerate(path)])
    )


def joint(ranks: np.ndarray) -> Chance:
    """How often the whole path was right."""
    counts: dict[tuple[int, int], int] = {}
    for depth, codes in enumerate(_path_codes(ranks).T, start=1):
        paths, number = np.unique(codes, return_counts=True)
        counts.update(zip(((depth, code) for code in paths.tolist()), number.tolist(), strict=True))
    return lambda path: counts.get((len(path), _code(path)), 0) / max(1, len(ranks))


ESTIMATORS: dict[str, Callable[[np.ndarray], Chance]] = {
    "independent": independent,
    "conditional": conditional,
    "joint": joint,
}


def node_order(chance: Chance, num_heads: int, size: int = MAX_TREE_NODES) -> list[Choice]:
    """Return the `size` likeliest nodes, parents before children, likeliest first."""
    order: list[Choice] = []
    waiting = [(-chance((rank,)), (rank,)) for rank in range(MISSED)]
    heapq.heapify(waiting)
    while waiting and len(order) < size:
        _, node = heapq.heappop(waiting)
        order.append(node)
        if len(node) < num_heads:
            for rank in range(MISSED):
                heapq.heappush(waiting, (-chance((*node, rank)), (*node, rank)))
    return order


def tokens_per_step(order: Sequence[Choice], measured: AnswerRanks, sizes: Sequence[int]) -> list[float]:
    """Return 1 + the mean number of accepted tokens for the first n nodes of `order`, for each n in `sizes`."""
    need = _nodes_needed(order, measured.ranks.numpy())
    return [1 + float(_simulate((need <= size).sum(axis=1), measured)[0]) for size in sizes]


def mean_accepted(accepted: Tensor, measured: AnswerRanks) -> float:
    """Return the mean tokens that a step accepts if it accepts so many at each anchor, int64 [anchors]."""
    return _simulate(accepted.numpy(), measured)[0]


def step_starts(order: Sequence[Choice], measured: AnswerRanks, size: int) -> np.ndarray:
    """Return which anchors a decode with the first `size` nodes starts steps at, bool [anchors]."""
    return _simulate((_nodes_needed(order, measured.ranks.numpy()) <= size).sum(axis=1), measured)[1]


def calibrate(measured: AnswerRanks, sizes: Sequence[int] = (4, 8, 16, 63)) -> Calibration:
    """Compare the estimators on two halves of the answers, then order the nodes by the best on all of them."""
    heads = measured.ranks.shape[1]
    first, second = measured.halves()
    scores = {}
    for name, estimator in ESTIMATORS.items():
        order = node_order(estimator(first.ranks.numpy()), heads)
        scores[name] = dict(zip(sizes, tokens_per_step(order, second, sizes), strict=True))
        started = first.ranks.numpy()[step_starts(order, first, sizes[1])]
        order = node_order(estimator(started), heads)
        scores[name + " at step starts"] = dict(zip(sizes, tokens_per_step(order, second, sizes), strict=True))
    best = max(scores, key=lambda name: sum(scores[name].values()))
    estimator, ranks = ESTIMATORS[best.removesuffix(" at step starts")], measured.ranks.numpy()
    order = node_order(estimator(ranks), heads)
    if best.endswith(" at step starts"):
        order = node_order(estimator(ranks[step_starts(order, measured, sizes[1])]), heads)
    return Calibration(
        order=order,
        expected=[1.0, *tokens_per_step(order, measured, range(1, len(order) + 1))],
        estimator=best,
        scores=scores,
        accuracy=[_shares(column)[:10].tolist() for column in ranks.T],
        num_answers=measured.num_answers,
        num_positions=len(ranks),
    )


def expected_worth(calibration: Calibration) -> str:
    """Return what trees of a few sizes are worth, for people."""
    expected = calibration.by_depth[-1] if calibration.by_depth else calibration.expected
    sizes = [size for size in (4, 8, 16, 63) if size < len(expected)]
    figures = ", ".join(f"{expected[size]:.2f} with {size}" for size in sizes)
    return f"expected tokens per step {figures} nodes, measured on {calibration.num_positions:,} positions"


def write_calibration(path: Path, calibration: Calibration, about: Mapping[str, object] | None = None) -> None:
    """Write the order and its figures as JSON beside the heads."""
    content = {
        "version": 1,
        **(about or {}),
        "order": [list(node) for node in calibration.order],
        "expected_tokens_per_step": [round(value, 4) for value in calibration.expected],
        "expected_by_depth": _rounded(calibration.by_depth),
        "frequent_tokens": calibration.frequent,
        "expected_by_depth_of_frequent": _rounded(calibration.by_depth_of_frequent),
        "estimator": calibration.estimator,
        "estimator_scores": {
            name: {str(size): round(value, 4) for size, value in row.items()}
            for name, row in calibration.scores.items()
        },
        "acceptance_by_rank": [[round(value, 4) for value in row] for row in calibration.accuracy],
        "prompts": calibration.num_answers,
        "positions": calibration.num_positions,
    }
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(content) + "\n")
    os.replace(unfinished, path)


def _rounded(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in rows]


def _shares(ranks: np.ndarray) -> np.ndarray:
    return np.bincount(ranks, minlength=MISSED + 1) / max(1, len(ranks))


def _nodes_needed(order: Sequence[Choice], ranks: np.ndarray) -> np.ndarray:
    """Return how large a tree must be to hold each anchor's true path to each depth, int64 [anchors, heads]."""
    need = np.full(ranks.shape, NEVER, dtype=np.int64)
    for depth, codes in enumerate(_path_codes(ranks).T, start=1):
        nodes = sorted((_code(node), place) for place, node in enumerate(order, start=1) if len(node) == depth)
        if not nodes:
            continue
        known, places = np.array(nodes).T
        found = np.searchsorted(known, codes).clip(max=len(known) - 1)
        need[:, depth - 1] = np.where(known[found] == codes, places[found], NEVER)
    return need


def _path_codes(ranks: np.ndarray) -> np.ndarray:
    """Number the path to each depth, int64 [anchors, heads]; a missed token anywhere is in the number too."""
    codes = np.zeros(ranks.shape, dtype=np.int64)
    so_far = np.zeros(len(ranks), dtype=np.int64)
    for depth in range(ranks.shape[1]):
        so_far = so_far * (MISSED + 1) + ranks[:, depth]
        codes[:, depth] = so_far
    return codes


def _code(path: Choice) -> int:
    code = 0
    for rank in path:
        code = code * (MISSED + 1) + rank
    return code


def _simulate(accepted: np.ndarray, measured: AnswerRanks) -> tuple[float, np.ndarray]:
    """Decode all answers at once: return (mean accepted tokens a step, where steps started)."""
    answer = measured.answer.numpy()
    is_start = np.zeros(len(answer), dtype=bool)
    bounds = np.searchsorted(answer, np.arange(measured.num_answers + 1))
    place, stop = bounds[:-1].copy(), bounds[1:] - 1  # the last anchor's root ends the answer: no step starts there
    running = np.flatnonzero(place < stop)
    while running.size:
        is_start[place[running]] = True
        place[running] += 1 + accepted[place[running]]
        running = running[place[running] < stop[running]]
    return float(accepted[is_start].mean()) if is_start.any() else 0.0, is_start
