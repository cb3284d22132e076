"""Which candidate tree pays on this machine: measured step times against the tokens that each size of tree brings.

A tree of n nodes is the first n of one order, so a size is all there is to choose: the one with the most tokens a
second. Step times are measured once and kept; tokens per step come from the heads' calibration and, more and more,
from the answers given here. Where no tree beats plain decoding the choice is 0 nodes. Texts never depend on it.
"""

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

from engine.kernels.nvrtc import cache_folder
from engine.nested_tree import NestedTree
from engine.tree import CandidateTree

__all__ = ["Seen", "Tuner", "TuningFile", "device_name", "engine_version", "load_or_measure"]

_MIN_GAIN = 1.02  # below it a gain is noise, and a change of size too
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

    def add(self, accepted: Sequence[float], steps: float) -> None:
        """Add one answer's counts for the first nodes of the order, each weighed down to what an answer may weigh."""
        weight = min(1.0, _ANSWER_STEPS / steps) if steps else 0.0
        missing = max(0, len(accepted) - len(self.steps))
        self.steps += [0.0] * missing
        self.accepted += [0.0] * missing
        for place, count in enumerate(accepted):
            total = self.steps[place] + weight * steps
            fade = min(1.0, _MOST_STEPS / total) if total else 1.0
            self.steps[place] = total * fade
            self.accepted[place] = (self.accepted[place] + weight * count) * fade


class TuningFile:
    """What was measured and seen, kept as JSON; a file that cannot be read or written only costs a new measurement."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[dict[int, float], Seen] | None:
        try:
            content = json.loads(self.path.read_text())
            step_ms = {int(size): float(ms) for size, ms in content["step_ms"].items()}
            seen = Seen([float(x) for x in content["seen_steps"]], [float(x) for x in content["seen_accepted"]])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        is_sound = 0 in step_ms and min(step_ms.values()) > 0 and len(seen.steps) == len(seen.accepted)
        return (step_ms, seen) if is_sound else None

    def write(self, step_ms: Mapping[int, float], seen: Seen) -> None:
        content = {
            "step_ms": dict(step_ms),
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
    """The choice, and what it rests on. `step_ms` by drafted nodes must hold 0, plain decoding."""

    def __init__(
        self,
        trees: NestedTree,
        step_ms: Mapping[int, float],
        *,
        default_nodes: int,
        seen: Seen | None = None,
        file: TuningFile | None = None,
    ) -> None:
        self._trees, self._default_nodes = trees, default_nodes
        self._step_ms = {size: ms for size, ms in sorted(step_ms.items()) if size <= len(trees.order)}
        self._seen, self._file = seen or Seen(), file
        self._place = {choice: place for place, choice in enumerate(trees.order)}
        self.chosen = 0
        self._choose(first=True)

    @property
    def tokens_per_step(self) -> dict[int, float]:
        """Expected tokens a step by drafted nodes, for the measured sizes of which it is known."""
        totals = [1.0]
        for chance in self._chances():
            totals.append(totals[-1] + chance)
        return {size: totals[size] for size in self._step_ms if size < len(totals)}

    @property
    def is_known(self) -> bool:
        """Whether what trees bring is known: from a calibration, or from enough answers."""
        return any(size > 0 for size in self.tokens_per_step)

    def learn(self, tree: CandidateTree, paths: Iterable[NodePath]) -> None:
        """Take note of one answer's steps with `tree` (exact acceptance): each step's accepted path, root first."""
        accepted, steps = [0.0] * tree.num_drafted, 0
        places = [self._place[choice] for choice in tree.choices]
        for path in paths:
            steps += 1
            for node in path[1:]:
                accepted[places[node - 1]] += 1
        if not steps or not accepted:
            return
        self._seen.add(accepted, steps)
        self._choose()
        if self._file is not None:
            self._file.write(self._step_ms, self._seen)

    def check_times(self, nodes: int, step_ms: Sequence[float]) -> None:
        """Compare an answer's steps with what was measured: far faster ones tell that the machine was busy then.

        The next start will measure again.
        """
        measured = self._step_ms.get(nodes)
        if self._file is None or measured is None or len(step_ms) < _STEPS_TO_JUDGE:
            return
        if median(step_ms) < _BUSY * measured:
            self._file.forget()
            self._file = None

    def report(self) -> dict[str, Any]:
        """Return the curve, the choice and its reason as plain values, sizes in drafted nodes."""
        tokens, chosen = self.tokens_per_step, self.chosen
        return {
            "nodes": list(self._step_ms),
            "step_ms": {size: round(ms, 4) for size, ms in self._step_ms.items()},
            "tokens_per_step": {size: round(value, 3) for size, value in tokens.items()},
            "chosen": chosen,
            "reason": self._reason(),
            "expected_gain": round(self._gain(chosen), 3) if self.is_known and chosen in tokens else None,
        }

    def _choose(self, first: bool = False) -> None:
        if not self.is_known:
            self.chosen = self._default_nodes
            return
        best = self._best()
        if self._gain(best) < _MIN_GAIN:
            self.chosen = 0
        elif first or self.chosen not in self.tokens_per_step or self._gain(best) > _MIN_GAIN * self._gain(self.chosen):
            self.chosen = best

    def _best(self) -> int:
        return max((size for size in self.tokens_per_step if size > 0), key=self._gain)

    def _gain(self, size: int) -> float:
        """Speed with a tree of this size over plain decoding's."""
        return self.tokens_per_step[size] * self._step_ms[0] / self._step_ms[size]

    def _reason(self) -> str:
        if not self.is_known:
            return (
                "What these heads' trees bring is not known, so the size is a default; "
                "python launcher.py calibrate measures it."
            )
        if self.chosen:
            return f"{self._worth(self.chosen)}."
        return f"No tree pays here, so decoding is plain. The best: {self._worth(self._best())}."

    def _worth(self, size: int) -> str:
        nodes = "1 drafted node brings" if size == 1 else f"{size} drafted nodes bring"
        return (
            f"{nodes} {self.tokens_per_step[size]:.2f} tokens a step for "
            f"{self._step_ms[size] / self._step_ms[0]:.2f}x the time of a plain one: {self._gain(size):.2f}x the speed"
        )

    def _chances(self) -> list[float]:
        """How likely each node is accepted, in the nested order, as far as it is known."""
        prior = [after - before for before, after in zip(self._trees.expected, self._trees.expected[1:], strict=False)]
        if not prior:
            return self._chances_seen()
        seen = [(steps, count) for steps, count in zip(self._seen.steps, self._seen.accepted, strict=True)]
        blended = [
            (_PRIOR_STEPS * chance + count) / (_PRIOR_STEPS + steps)
            for chance, (steps, count) in zip(prior, seen, strict=False)
        ]
        known = len(blended)
        scale = sum(blended) / sum(prior[:known]) if sum(prior[:known]) > 0 else 1.0
        return blended + [scale * chance for chance in prior[known:]]  # larger trees fare as the seen ones did

    def _chances_seen(self) -> list[float]:
        chances: list[float] = []
        for steps, count in zip(self._seen.steps, self._seen.accepted, strict=True):
            if steps < _ENOUGH_STEPS * 0.999:  # fading rounds
                break
            chances.append(count / steps)
        return chances


def load_or_measure(
    trees: NestedTree,
    *,
    identity: Sequence[str],
    measure: Callable[[], Mapping[int, float]],
    default_nodes: int,
    folder: Path | None = None,
) -> Tuner:
    """Return the tuner of what `identity` names (device, model, format, heads, version); measure where none is kept."""
    key = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:24]
    file = TuningFile((folder or cache_folder()) / f"tree-{key}.json")
    kept = file.read()
    if kept is None:
        kept = dict(measure()), Seen()
        file.write(*kept)
    step_ms, seen = kept
    return Tuner(trees, step_ms, default_nodes=default_nodes, seen=seen, file=file)


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
