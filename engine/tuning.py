"""Which candidate tree pays on this machine: measured step times against the tokens that each tree brings.

To choose from are trees of n nodes that are no deeper than d, as a depth costs a head's turn whatever its nodes are
worth: of each n and d one tree, and of these the one with the most tokens a second. Step times are measured once and
kept; tokens per step come from the heads' calibration and, more and more, from the answers given here. Where no tree
beats plain decoding the choice is 0 nodes. Texts never depend on it.
"""

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from engine.kernels.nvrtc import cache_folder
from engine.nested_tree import NestedTree
from engine.pruned_tree import Tree
from engine.records import DecodeStep
from engine.seen_steps import SeenSteps
from engine.step_times import StepTimes

__all__ = ["Tuner", "TuningFile", "device_name", "engine_version", "load_or_measure"]

_MIN_GAIN = 1.02  # below it a gain is noise, and a change of tree too
_PRIOR_STEPS = 2000.0  # what the calibration weighs, in steps seen
_STEPS_TO_JUDGE, _BUSY = 16, 0.7  # an answer of so many steps that needs less than this share of the measured time
_ENOUGH_STEPS = 500.0  # without a calibration a node counts only after so many steps


class TuningFile:
    """What was measured and seen, kept as JSON; a file that cannot be read or written only costs a new measurement."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[StepTimes, SeenSteps] | None:
        try:
            content = json.loads(self.path.read_text())
            by_nodes = {int(size): float(ms) for size, ms in content["step_ms"].items()}
            times = StepTimes(by_nodes, float(content["depth_ms"]))
            seen = SeenSteps.of_json(content["seen"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        is_sound = 0 in by_nodes and min(by_nodes.values()) > 0 and times.per_depth >= 0
        return (times, seen) if is_sound else None

    def write(self, times: StepTimes, seen: SeenSteps) -> None:
        content = {
            "step_ms": times.by_nodes,
            "depth_ms": times.per_depth,
            "seen": seen.to_json(),
        }
        unfinished = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(content))
            unfinished.replace(self.path)
        except OSError:
            return

    def forget(self) -> None:
        """Have the next start measure anew."""
        with contextlib.suppress(OSError):
            self.path.unlink()


class Tuner:
    """The choice, `tree`, and what it rests on. `times` must hold 0 nodes, plain decoding."""

    def __init__(
        self,
        trees: NestedTree,
        times: StepTimes,
        *,
        default_nodes: int,
        seen: SeenSteps | None = None,
        file: TuningFile | None = None,
    ) -> None:
        self._trees, self._times, self._default_nodes = trees, times, default_nodes
        self._seen, self._file = seen or SeenSteps(), file
        self._step_ms = self._candidates()
        self._tokens: dict[Tree, float] = {}
        self._plain: Tree = trees.first(0)
        self.tree = self._plain
        self._choose(first=True)

    @property
    def is_known(self) -> bool:
        """Whether what trees bring is known: from a calibration, or from enough answers."""
        return len(self._tokens) > 1

    @property
    def best(self) -> Tree:
        """The tree with the most tokens a second, also where plain decoding has more; the default if none is known."""
        drafting = [tree for tree in self._tokens if tree.num_drafted]
        return max(drafting, key=self._gain) if drafting else self._trees.pruned(self._default_nodes)

    def learn(self, tree: Tree, steps: Sequence[DecodeStep]) -> None:
        """Take note of one answer's steps with `tree` (exact acceptance)."""
        if not self._seen.add(steps, tree.max_depth):
            return
        self._choose()
        if self._file is not None:
            self._file.write(self._times, self._seen)

    def check_times(self, tree: Tree, step_ms: Sequence[float]) -> None:
        """Compare an answer's steps with what was measured: far faster ones tell that the machine was busy then.

        The next start will measure again.
        """
        measured = self._step_ms.get(tree)
        if self._file is None or measured is None or len(step_ms) < _STEPS_TO_JUDGE:
            return
        if median(step_ms) < _BUSY * measured:
            self._file.forget()
            self._file = None

    def report(self) -> dict[str, Any]:
        """Return the curve, the choice and its reason as plain values; of each number of drafted nodes the best tree.

        `depths` says how deep these trees are.
        """
        shown = {tree.num_drafted: tree for tree in sorted(self._step_ms, key=self._shown_last)}
        tokens = {nodes: self._tokens[tree] for nodes, tree in shown.items() if tree in self._tokens}
        return {
            "nodes": list(shown),
            "depths": {nodes: tree.max_depth for nodes, tree in shown.items()},
            "step_ms": {nodes: round(self._step_ms[tree], 4) for nodes, tree in shown.items()},
            "tokens_per_step": {nodes: round(value, 3) for nodes, value in tokens.items()},
            "depth_ms": round(self._times.per_depth, 4),
            "chosen": self.tree.num_drafted,
            "reason": self._reason(),
            "expected_gain": round(self._gain(self.tree), 3) if self.is_known and self.tree in self._tokens else None,
        }

    def _shown_last(self, tree: Tree) -> tuple[int, bool, float, int]:
        """Sort by nodes, and among as many the one to show last: the choice, or the best, or the deepest."""
        return tree.num_drafted, tree == self.tree, self._gain(tree) if tree in self._tokens else 0.0, tree.max_depth

    def _candidates(self) -> dict[Tree, float]:
        """Return all trees to choose from, with their milliseconds a step: those of as many nodes of any depth, less
        the depths that are left out."""
        found: dict[Tree, float] = {}
        by_nodes, per_depth = self._times
        for nodes, ms in by_nodes.items():
            deepest = self._trees.pruned(nodes)
            for depth in range(deepest.max_depth + 1):
                tree = self._trees.pruned(nodes, depth)
                if tree.num_drafted == nodes:
                    found[tree] = max(by_nodes[0], ms - per_depth * (deepest.max_depth - tree.max_depth))
        return found

    def _choose(self, first: bool = False) -> None:
        chances = self._chances()
        self._tokens = {self._plain: 1.0}
        for tree in self._step_ms:
            if 0 < tree.max_depth <= len(chances):
                known = chances[tree.max_depth - 1][: tree.num_drafted]
                if len(known) == tree.num_drafted:
                    self._tokens[tree] = 1.0 + sum(known)
        if not self.is_known:
            self.tree = self.best
        elif self._gain(self.best) < _MIN_GAIN:
            self.tree = self._plain
        elif first or self.tree not in self._tokens or self._gain(self.best) > _MIN_GAIN * self._gain(self.tree):
            self.tree = self.best

    def _gain(self, tree: Tree) -> float:
        """Speed with a candidate over plain decoding's."""
        return self._tokens[tree] * self._step_ms[self._plain] / self._step_ms[tree]

    def _reason(self) -> str:
        if not self.is_known:
            return (
                "What these heads' trees bring is not known, so the size is a default; "
                "python launcher.py calibrate measures it."
            )
        if self.tree.num_drafted:
            return f"{self._worth(self.tree)}."
        return f"No tree pays here, so decoding is plain. The best: {self._worth(self.best)}."

    def _worth(self, tree: Tree) -> str:
        nodes = f"{tree.num_drafted} drafted nodes, at most {tree.max_depth} deep, bring"
        return (
            f"{'1 drafted node brings' if tree.num_drafted == 1 else nodes} {self._tokens[tree]:.2f} tokens a step for "
            f"{self._step_ms[tree] / self._step_ms[self._plain]:.2f}x the time of a plain one: "
            f"{self._gain(tree):.2f}x the speed"
        )

    def _chances(self) -> list[list[float]]:
        """How likely the first, second, ... likeliest node of a step is accepted, by depth, as far as it is known."""
        if not self._trees.expected:
            enough = _ENOUGH_STEPS * 0.999  # fading rounds
            return [
                [count / steps for steps, count in zip(row.steps, row.accepted, strict=True) if steps >= enough]
                for row in self._seen.depths
            ]
        priors = [[max(0.0, after - before) for before, after in pairwise(row)] for row in self._trees.expected]
        blended = {
            (depth, place): (_PRIOR_STEPS * priors[depth][place] + count) / (_PRIOR_STEPS + steps)
            for depth, place, steps, count in self._counts()
            if depth < len(priors) and place < len(priors[depth])
        }
        calibrated = sum(priors[depth][place] for depth, place in blended)
        scale = sum(blended.values()) / calibrated if calibrated > 0 else 1.0  # for what is unseen
        return [
            [blended.get((depth, place), scale * chance) for place, chance in enumerate(row)]
            for depth, row in enumerate(priors)
        ]

    def _counts(self) -> Iterator[tuple[int, int, float, float]]:
        """Give each depth (from 0) and place with the steps that had such a node, and those that accepted it."""
        for depth, row in enumerate(self._seen.depths):
            for place, (steps, count) in enumerate(zip(row.steps, row.accepted, strict=True)):
                yield depth, place, steps, count


def load_or_measure(
    trees: NestedTree,
    *,
    identity: Sequence[str],
    measure: Callable[[], StepTimes],
    default_nodes: int,
    folder: Path | None = None,
) -> Tuner:
    """Return the tuner of what `identity` names (device, model, format, heads, version); measure where none is kept."""
    key = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:24]
    file = TuningFile((folder or cache_folder()) / f"tree-{key}.json")
    kept = file.read()
    if kept is None:
        kept = measure(), SeenSteps()
        file.write(*kept)
    times, seen = kept
    return Tuner(trees, times, default_nodes=default_nodes, seen=seen, file=file)


def device_name(device: str) -> str:
    """Return what tells this machine's speed from another's."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return f"{', '.join(sorted(models)) or platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"


@cache
def engine_version() -> str:
    """Return a fingerprint of the engine's sources and of torch: other code has other step times."""
    digest, here = hashlib.sha256(torch.__version__.encode()), Path(__file__).parent
    for folder in (here, here / "kernels", here / "kernels" / "cpu", here / "kernels" / "cuda"):
        for path in sorted(folder.glob("*.*")):
            if path.suffix in (".py", ".c", ".h", ".cu", ".cuh"):
                digest.update(path.read_bytes())
    return digest.hexdigest()
