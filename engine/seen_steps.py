"""What answers have shown of the heads: how often a step's likeliest node was accepted, its second likeliest, and on.

A step's nodes have a place each, by likelihood. Those that are no deeper than d are the first that a tree of depth d
would have verified, so a step tells of all depths up to its own; but only of places that nearly all steps had, as steps
that reach further down a shallow tree are those whose heads were unsure.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.pruned_tree import by_likelihood
from engine.records import DecodeStep

__all__ = ["PlaceCounts", "SeenSteps"]

_ANSWER_STEPS = 200.0  # what one answer may weigh: an odd chat moves a figure by less than a tenth
_USUAL = 0.95  # of an answer's steps that must have had a place
_MOST_STEPS = 8000.0  # what all answers together may weigh; older ones fade


@dataclass
class PlaceCounts:
    """For each place: in how many steps there was such a node, and in how many it was accepted."""

    steps: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)

    def count(self, is_accepted: Iterable[bool]) -> None:
        """Count one step, of whose places in order these were accepted."""
        for place, accepted in enumerate(is_accepted):
            if place == len(self.steps):
                self.steps.append(0.0)
                self.accepted.append(0.0)
            self.steps[place] += 1
            self.accepted[place] += accepted

    def add(self, answer: "PlaceCounts") -> None:
        """Add one answer's counts, weighed down to what an answer may weigh."""
        usual = [steps for steps in answer.steps if steps >= _USUAL * answer.steps[0]]
        if not usual:
            return
        weight = min(1.0, _ANSWER_STEPS / usual[0])
        missing = max(0, len(usual) - len(self.steps))
        self.steps += [0.0] * missing
        self.accepted += [0.0] * missing
        for place, steps in enumerate(usual):
            self.steps[place] += weight * steps
            self.accepted[place] += weight * answer.accepted[place]
        fade = min(1.0, _MOST_STEPS / self.steps[0])  # of all places alike: none weighs more for being rare
        self.steps = [fade * steps for steps in self.steps]
        self.accepted = [fade * accepted for accepted in self.accepted]


@dataclass
class SeenSteps:
    """Counts by depth: `depths[d - 1]` of trees no deeper than d."""

    depths: list[PlaceCounts] = field(default_factory=list)

    def add(self, steps: Iterable[DecodeStep], depth: int) -> bool:
        """Add one answer, given by trees of up to `depth`; False where it has nothing to tell."""
        answer = [PlaceCounts() for _ in range(depth)]
        for step in steps:
            _count(answer, step)
        if not any(counts.steps for counts in answer):
            return False
        self.depths += [PlaceCounts() for _ in range(depth - len(self.depths))]
        for kept, counts in zip(self.depths, answer, strict=False):
            kept.add(counts)
        return True

    def to_json(self) -> list[list[list[float]]]:
        """Return plain values: by depth steps and accepted."""
        return [[[round(x, 2) for x in part] for part in (row.steps, row.accepted)] for row in self.depths]

    @classmethod
    def of_json(cls, content: list[list[list[float]]]) -> "SeenSteps":
        """Read what `to_json` gave; raises ValueError or TypeError for anything else."""
        depths = [PlaceCounts(*([float(x) for x in part] for part in row)) for row in content]
        if any(len(row.steps) != len(row.accepted) for row in depths):
            raise ValueError("steps and accepted differ in length")
        return cls(depths)


def _count(answer: list[PlaceCounts], step: DecodeStep) -> None:
    parents, path = step.node_parents, frozenset(step.path)
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    ordered = by_likelihood(parents, step.node_probabilities)[1:]
    for depth, counts in enumerate(answer, start=1):
        counts.count(node in path for node in ordered if depths[node] <= depth)
