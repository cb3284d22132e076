"""Which candidate tree pays on this machine: measured step times against the tokens that each tree brings.

To choose from are the first n nodes of one order that are no deeper than d, as a depth costs a head's turn whatever its
nodes are worth: of each n and d one tree, and of these the one with the most tokens a second. Step times are measured
once and kept; tokens per step come from the heads' calibration and, more and more, from the answers given here. Where
no tree beats plain decoding the choice is 0 nodes. Texts never depend on it.
"""

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from engine.kernels.nvrtc import cache_folder
from engine.nested_tree import NestedTree
from engine.step_times import StepTimes
from engine.tree import CandidateTree

__all__ = ["Seen", "Tuner", "TuningFile", "device_name", "engine_version", "load_or_measure"]

_MIN_GAIN = 1.02  # below it a gain is noise, and a change of tree too
_PRIOR_STEPS = 2000.0  # what the calibration weighs, in steps seen
_ANSWER_STEPS = 200.0  # what one answer may weigh: an odd chat moves a figure by less than a tenth
_MOST_STEPS = 8000.0  # what all answers together may weigh; older ones fade
_STEPS_TO_JUDGE, _BUSY = 16, 0.7  # an answer of so many steps that needs less than this share of the measured time
_ENOUGH_STEPS = 500.0  # without a calibration a node counts only after so many steps

NodePath = tuple[int, ...]  # node indices of one step's accepted path


@dataclass
class Seen:
    """For each place in the nested order: in how many steps it was in the tree, and in how many it was accepted."""

    steps: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)

    def add(self, accepted: Mapping[int, float], steps: float) -> None:
        """Add one answer's counts by the places of its tree's nodes, each weighed down to what an answer may weigh."""
        weight = min(1.0, _ANSWER_STEPS / steps) if steps else 0.0
        missing = max(0, 1 + max(accepted, default=-1) - len(self.steps))
        self.steps += [0.0] * missing
        self.accepted += [0.0] * missing
        for place, count in accepted.items():
            total = self.steps[place] + weight * steps
            fade = min(1.0, _MOST_STEPS / total) if total else 1.0
            self.steps[place] = total * fade
            self.accepted[place] = (self.accepted[place] + weight * count) * fade


class TuningFile:
    """What was measured and seen, kept as JSON; a file that cannot be read or written only costs a new measurement."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[StepTimes, Seen] | None:
        try:
            content = json.loads(self.path.read_text())
            by_nodes = {int(size): float(ms) for size, ms in content["step_ms"].items()}
            times = StepTimes(by_nodes, float(content["depth_ms"]))
            seen = Seen([float(x) for x in content["seen_steps"]], [float(x) for x in content["seen_accepted"]])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        is_sound = 0 in by_nodes and min(by_nodes.values()) > 0 and times.per_depth >= 0
        return (times, seen) if is_sound and len(seen.steps) == len(seen.accepted) else None

    def write(self, times: StepTimes, seen: Seen) -> None:
        content = {
            "step_ms": times.by_nodes,
            "depth_ms": times.per_depth,
            "seen_steps": [round(count, 2) for count in seen.steps],
            "seen_accepted": [round(count, 2) for count in seen.accepted],
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
        seen: Seen | None = None,
        file: TuningFile | None = None,
    ) -> None:
        self._trees, self._times, self._default_nodes = trees, times, default_nodes
        self._seen, self._file = seen or Seen(), file
        self._place = {choice: place for place, choice in enumerate(trees.order)}
        self._step_ms = self._candidates()
        self._tokens: dict[CandidateTree, float] = {}
        self.tree = self._plain = trees.first(0)
        self._choose(first=True)

    @property
    def is_known(self) -> bool:
        """Whether what trees bring is known: from a calibration, or from enough answers."""
        return len(self._tokens) > 1

    @property
    def best(self) -> CandidateTree:
        """The tree with the most tokens a second, also where plain decoding has more; the default if none is known."""
        drafting = [tree for tree in self._tokens if tree.num_drafted]
        return max(drafting, key=self._gain) if drafting else self._trees.first(self._default_nodes)

    def learn(self, tree: CandidateTree, paths: Iterable[NodePath]) -> None:
        """Take note of one answer's steps with `tree` (exact acceptance): each step's accepted path, root first."""
        places, steps = [self._place[choice] for choice in tree.choices], 0
        accepted = dict.fromkeys(places, 0.0)
        for path in paths:
            steps += 1
            for node in path[1:]:
                accepted[places[node - 1]] += 1
        if not steps or not accepted:
            return
        self._seen.add(accepted, steps)
        self._choose()
        if self._file is not None:
            self._file.write(self._times, self._seen)

    def check_times(self, tree: CandidateTree, step_ms: Sequence[float]) -> None:
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

    def _shown_last(self, tree: CandidateTree) -> tuple[int, bool, float, int]:
        """Sort by nodes, and among as many the one to show last: the choice, or the best, or the deepest."""
        return tree.num_drafted, tree == self.tree, self._gain(tree) if tree in self._tokens else 0.0, tree.max_depth

    def _candidates(self) -> dict[CandidateTree, float]:
        """Return all trees to choose from, with their milliseconds a step: those of as many nodes in nested order, less
        the depths that are left out."""
        found: dict[CandidateTree, float] = {}
        by_nodes, per_depth = self._times
        for nodes, ms in by_nodes.items():
            nested = self._trees.first(nodes)
            for depth in range(nested.max_depth + 1):
                tree = self._trees.first(nodes, depth)
                if tree.num_drafted == nodes:
                    found[tree] = max(by_nodes[0], ms - per_depth * (nested.max_depth - tree.max_depth))
        return found

    def _choose(self, first: bool = False) -> None:
        chances = self._chances()
        places = {tree: [self._place[choice] for choice in tree.choices] for tree in self._step_ms}
        self._tokens = {
            tree: 1.0 + sum(chances[place] for place in nodes)
            for tree, nodes in places.items()
            if chances.keys() >= set(nodes)
        }
        if not self.is_known:
            self.tree = self.best
        elif self._gain(self.best) < _MIN_GAIN:
            self.tree = self._plain
        elif first or self.tree not in self._tokens or self._gain(self.best) > _MIN_GAIN * self._gain(self.tree):
            self.tree = self.best

    def _gain(self, tree: CandidateTree) -> float:
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

    def _worth(self, tree: CandidateTree) -> str:
        nodes = f"{tree.num_drafted} drafted nodes, at most {tree.max_depth} deep, bring"
        return (
            f"{'1 drafted node brings' if tree.num_drafted == 1 else nodes} {self._tokens[tree]:.2f} tokens a step for "
            f"{self._step_ms[tree] / self._step_ms[self._plain]:.2f}x the time of a plain one: "
            f"{self._gain(tree):.2f}x the speed"
        )

    def _chances(self) -> dict[int, float]:
        """How likely each node is accepted, by its place in the nested order, as far as it is known."""
        prior = [after - before for before, after in pairwise(self._trees.expected)]
        seen = {
            place: (steps, count)
            for place, (steps, count) in enumerate(zip(self._seen.steps, self._seen.accepted, strict=True))
            if steps > 0
        }
        if not prior:
            enough = _ENOUGH_STEPS * 0.999  # fading rounds
            return {place: count / steps for place, (steps, count) in seen.items() if steps >= enough}
        blended = {
            place: (_PRIOR_STEPS * prior[place] + count) / (_PRIOR_STEPS + steps)
            for place, (steps, count) in seen.items()
            if place < len(prior)
        }
        calibrated = sum(prior[place] for place in blended)
        scale = sum(blended.values()) / calibrated if calibrated > 0 else 1.0
        return {place: blended.get(place, scale * chance) for place, chance in enumerate(prior)}  # unseen: as the seen


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
        kept = measure(), Seen()
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
