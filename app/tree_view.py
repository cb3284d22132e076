"""A trace of decode steps: kept while an answer runs, packed for the disk, and turned into what the browser draws.

Data only: the drawing is in assets/. A step arrives with token ids and leaves with token texts, so that an old answer
can be replayed without the model that wrote it. Knows no engine (only the shape of its records) and no database.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

__all__ = [
    "TRACE_FORMAT",
    "StepRecord",
    "StepView",
    "TokenTexts",
    "Trace",
    "acceptance_by_depth",
    "tree_depth",
    "unpack_trace",
]

TRACE_FORMAT = 1
PROBABILITY_LEVELS = 99  # two digits are more than an opacity needs, and pack to about one byte a node

TokenTexts = Callable[[Sequence[int]], Sequence[str]]


class StepRecord(Protocol):
    """What a decode step has to offer; the engine's own record fits."""

    @property
    def num_accepted(self) -> int: ...
    @property
    def path(self) -> tuple[int, ...]: ...
    @property
    def node_tokens(self) -> tuple[int, ...]: ...
    @property
    def node_parents(self) -> tuple[int, ...]: ...
    @property
    def node_probabilities(self) -> tuple[float, ...]: ...
    @property
    def duration_ms(self) -> float: ...


@dataclass(frozen=True)
class StepView:
    """One step as the browser draws it: node i has `labels[i]`, `parents[i]` (-1 for the root) and `probabilities[i]`.

    `texts` and `tokens` are what the step added to the answer: accepted drafts, then the bonus token, cut at its end.
    """

    labels: tuple[str, ...]
    parents: tuple[int, ...]
    probabilities: tuple[float, ...]
    path: tuple[int, ...]
    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    num_accepted: int
    duration_ms: float

    def as_json(self, number: int) -> dict[str, Any]:
        """Plain values for the page; `number` counts the answer's steps from 1."""
        return {
            "number": number,
            "labels": list(self.labels),
            "parents": list(self.parents),
            "probabilities": list(self.probabilities),
            "path": list(self.path),
            "texts": list(self.texts),
            "accepted": self.num_accepted,
            "ms": self.duration_ms,
        }


class Trace:
    """The steps of one answer so far. One thread adds; the length only grows, so others may read what is there."""

    def __init__(self, token_texts: TokenTexts) -> None:
        self._token_texts = token_texts
        self._known: dict[int, str] = {}
        self.prefill_texts: tuple[str, ...] = ()
        self.prefill_tokens: tuple[int, ...] = ()
        self.steps: list[StepView] = []

    def add_prefill(self, texts: Sequence[str], tokens: Sequence[int]) -> None:
        """Record the tokens that the prompt's own forward gave, before any tree."""
        self.prefill_texts += tuple(texts)
        self.prefill_tokens += tuple(tokens)

    def add(self, step: StepRecord, texts: Sequence[str], tokens: Sequence[int]) -> None:
        """Record a step and the part of its tokens that became part of the answer, with their texts."""
        self.steps.append(
            StepView(
                labels=self._labels(step.node_tokens),
                parents=tuple(step.node_parents),
                probabilities=tuple(_quantise(value) / PROBABILITY_LEVELS for value in step.node_probabilities),
                path=tuple(step.path),
                texts=tuple(texts),
                tokens=tuple(tokens),
                num_accepted=step.num_accepted,
                duration_ms=round(step.duration_ms, 1),
            )
        )

    def latest(self, count: int) -> list[dict[str, Any]]:
        """The last `count` steps for the page, oldest first."""
        steps = self.steps
        first = max(0, len(steps) - count)
        return [step.as_json(first + offset + 1) for offset, step in enumerate(steps[first:])]

    def columns(self, first: int = 0) -> dict[str, Any]:
        """The steps from index `first` on as columns; texts and tree shapes are numbers into `words` and `shapes`."""
        words, shapes, steps = _Numbering(), _Numbering(), self.steps[first:]
        columns: dict[str, Any] = {
            "prefill": {"texts": self.prefill_texts, "tokens": self.prefill_tokens},
            "labels": [[words.number(label) for label in step.labels] for step in steps],
            "texts": [[words.number(text) for text in step.texts] for step in steps],
            "shape": [shapes.number(step.parents) for step in steps],
            "probabilities": [[_quantise(value) for value in step.probabilities] for step in steps],
            "path": [step.path for step in steps],
            "tokens": [step.tokens for step in steps],
            "accepted": [step.num_accepted for step in steps],
            "ms": [step.duration_ms for step in steps],
        }
        return {**columns, "words": words.values, "shapes": shapes.values}

    def pack(self) -> bytes:
        """All steps as compressed columns: some 50 bytes a step at 16 nodes, 140 at 64 (tests/test_tree_view.py)."""
        return zlib.compress(json.dumps(self.columns(), ensure_ascii=False, separators=(",", ":")).encode(), 6)

    def _labels(self, tokens: Sequence[int]) -> tuple[str, ...]:
        unknown = list(dict.fromkeys(token for token in tokens if token not in self._known))
        if unknown:
            self._known.update(zip(unknown, self._token_texts(unknown), strict=True))
        return tuple(self._known[token] for token in tokens)


def unpack_trace(trace_format: int, data: bytes) -> Trace:
    """Read back what `Trace.pack` wrote; raises ValueError for bytes or a format that this version cannot read."""
    if trace_format != TRACE_FORMAT:
        raise ValueError(f"The steps were saved in format {trace_format}; this version reads {TRACE_FORMAT}.")
    try:
        columns = json.loads(zlib.decompress(data))
    except (zlib.error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"The saved steps cannot be read ({error}).") from error
    trace = Trace(_no_more_tokens)
    trace.add_prefill(columns["prefill"]["texts"], columns["prefill"]["tokens"])
    trace.steps = [_step_from(columns, index) for index in range(len(columns["accepted"]))]
    return trace


def acceptance_by_depth(steps: Sequence[StepView]) -> list[float]:
    """Share of the steps that accepted a draft at depth 1, 2, ... of the deepest tree; empty without drafts.

    A depth that was drafted and never accepted is a 0: a head that does not help should be seen.
    """
    deepest = max((tree_depth(step.parents) for step in steps), default=0)
    counts = [0] * (deepest + 1)
    for step in steps:
        counts[step.num_accepted] += 1
    reached = [sum(counts[depth:]) for depth in range(1, deepest + 1)]
    return [count / len(steps) for count in reached]


@lru_cache(maxsize=256)
def tree_depth(parents: tuple[int, ...]) -> int:
    """The deepest node's depth; parents precede children, and the root's is -1."""
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return max(depths, default=0)


class _Numbering:
    """Numbers distinct values in order of first use."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def number(self, value: Any) -> int:
        return self._numbers.setdefault(value, len(self._numbers))

    @property
    def values(self) -> list[Any]:
        return list(self._numbers)


def _step_from(columns: dict[str, Any], index: int) -> StepView:
    words = columns["words"]
    return StepView(
        labels=tuple(words[number] for number in columns["labels"][index]),
        parents=tuple(columns["shapes"][columns["shape"][index]]),
        probabilities=tuple(value / PROBABILITY_LEVELS for value in columns["probabilities"][index]),
        path=tuple(columns["path"][index]),
        texts=tuple(words[number] for number in columns["texts"][index]),
        tokens=tuple(columns["tokens"][index]),
        num_accepted=columns["accepted"][index],
        duration_ms=columns["ms"][index],
    )


def _quantise(probability: float) -> int:
    return round(min(max(probability, 0.0), 1.0) * PROBABILITY_LEVELS)


def _no_more_tokens(tokens: Sequence[int]) -> Sequence[str]:
    raise AssertionError(f"a saved trace does not grow, but tokens {tokens} were added")
