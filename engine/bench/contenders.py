"""Who is compared: each answers the same token ids greedily and notes when its tokens came.

All start from an empty cache and count tokens only, without turning them into text.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

from engine.captured_decode import make_loop
from engine.engine import Engine
from engine.pruned_tree import Tree
from engine.sampling import SamplingParams

__all__ = ["Contender", "Own", "Run", "spread"]

Ends = frozenset[int]


@dataclass(frozen=True)
class Run:
    """One answer: its tokens (an end token is not among them) and how long they took.

    `decode_ms` runs from the first token to the last; `steps` are forward passes after the prompt's.
    """

    tokens: tuple[int, ...]
    prompt_tokens: int
    prefill_ms: float
    decode_ms: float
    steps: int
    decoded: int  # tokens that came within decode_ms, with one that ended the answer

    @property
    def tokens_per_second(self) -> float:
        return self.decoded / self.decode_ms * 1e3 if self.decode_ms > 0 else 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_ms * 1e3

    @property
    def tokens_per_step(self) -> float:
        return self.decoded / self.steps if self.steps else 1.0


class Contender(Protocol):
    """One way to run the model."""

    name: str

    def run(self, prompt: Sequence[int], max_tokens: int, ends: Ends) -> Run:
        """Answer until `max_tokens` or one of `ends`; no ends at all means that only the count stops it."""
        ...


class Own:
    """This engine with `tree`; the root alone decodes plainly."""

    def __init__(self, engine: Engine, tree: Tree) -> None:
        self._engine, self._tree = engine, tree
        self.name = f"Medusa on, {tree.num_drafted} nodes" if tree.num_drafted else "Medusa off"

    def run(self, prompt: Sequence[int], max_tokens: int, ends: Ends) -> Run:
        engine, tree = self._engine, self._tree
        engine._runner.truncate(0)
        engine._cached = []
        loop = make_loop(engine._runner, engine._drafter if tree.num_drafted else None, SamplingParams(), 0)
        started = time.perf_counter()
        first = loop.prefill(prompt)
        begun = last = time.perf_counter()
        tokens, decoded, count = cut([first], max_tokens, ends), 0, 0
        steps = loop.steps(tree)
        while len(tokens) == 1 + decoded and len(tokens) < max_tokens and first not in ends:
            step = next(steps)
            last, count = time.perf_counter(), count + 1
            kept = cut(step.tokens, max_tokens - len(tokens), ends)
            tokens += kept
            decoded += len(kept)
            if len(kept) < len(step.tokens):  # the end, counted where it is a token of its own
                decoded += len(tokens) < max_tokens
        engine._runner.truncate(0)
        return Run(tuple(tokens), len(prompt), (begun - started) * 1e3, (last - begun) * 1e3, count, decoded)


def cut(tokens: Sequence[int], room: int, ends: Ends) -> list[int]:
    """Return the tokens before an end token, at most `room`."""
    kept: list[int] = []
    for token in tokens[:room]:
        if token in ends:
            break
        kept.append(token)
    return kept


def spread(values: Sequence[float], digits: int = 1) -> dict[str, Any]:
    """Return median, lowest and highest."""
    return {
        "median": round(median(values), digits),
        "lowest": round(min(values), digits),
        "highest": round(max(values), digits),
        "runs": len(values),
    }
