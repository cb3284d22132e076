"""A double at the engine's protocol seam: a deterministic writer with plausible trees, and gates instead of sleeping.

It writes the words of `REPLY` over and over (or `echo:` prompts back), three drafted depths a step; how many of them
are accepted follows a fixed pattern. `pace_s` slows it down for a browser; `gate` lets a test step it by hand.
"""

import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from engine import DecodeStep, EngineInfo, GenerationChunk, GenerationResult, SamplingParams

REPLY = (
    "Dragons keep **very tidy** hoards. Each coin has its place:\n\n1. gold by the window\n2. silver near the door\n\n"
    "```python\ndef count(hoard):\n    return sum(coin.value for coin in hoard)\n```\n\n"
    "A knight once asked why, and the dragon said: order is a kind of fire. "
)
PATTERN = (0, 1, 2, 1, 3, 0, 1, 2)  # accepted drafts, step by step
CHOICES = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1))  # ranks from the root, by depth
PARENTS = (-1, 0, 0, 0, 1, 1, 2, 4, 4)
GREEDY_PATH = (0, 1, 4, 7)
MEASURED = {  # what an engine says of its tree's size
    "nodes": [0, 2, 4, 8, 16, 32, 64],
    "depths": {0: 0, 2: 2, 4: 2, 8: 3, 16: 3, 32: 3, 64: 3},
    "step_ms": {0: 7.4, 2: 7.9, 4: 8.3, 8: 9.1, 16: 12.6, 32: 19.8, 64: 36.5},
    "tokens_per_step": {0: 1.0, 2: 1.6, 4: 1.8, 8: 2.1, 16: 2.3, 32: 2.4, 64: 2.5},
    "depth_ms": 0.2,
    "chosen": 8,
    "reason": "8 drafted nodes, at most 3 deep, bring 2.10 tokens for 1.23x the time: 1.71x the speed.",
    "expected_gain": 1.71,
}
INFO = EngineInfo(
    model="Fake-135M",
    device="cpu",
    weights="int4",
    max_context=8192,
    has_heads=True,
    num_heads=3,
    memory_bytes=123 << 20,
    tuning=MEASURED,
)


class Shape(NamedTuple):
    """A candidate tree: each node's parent, each node's chance, and the path that is accepted, root first."""

    parents: tuple[int, ...]
    chances: tuple[float, ...]
    path: tuple[int, ...]


def large_shape(nodes: int = 64, depth: int = 5) -> Shape:
    """A tree as an engine would choose it: `nodes` drafts, a long likely branch and many short ones."""
    parents, chances, depths = [-1], [1.0], [0]
    path = list(range(depth + 1))
    for node in path[1:]:
        parents.append(node - 1)
        chances.append(0.78**node)
        depths.append(node)
    while len(parents) <= nodes:
        parent = (len(parents) * 7 - depth) % max(1, len(parents) // 2)
        if depths[parent] >= depth:
            parent = 0
        parents.append(parent)
        depths.append(depths[parent] + 1)
        chances.append(chances[parent] * 0.55 / (1 + parents.count(parent) / 2))
    return Shape(tuple(parents), tuple(chances), tuple(path))


SMALL_SHAPE = Shape(
    PARENTS, (1.0, *(0.7 ** len(choice) / (1 + choice[-1]) for choice in CHOICES)), GREEDY_PATH
)


class FakeEngine:
    """Writes a fixed text, token by token; `fail_after` raises `error` after so many tokens."""

    def __init__(
        self,
        *,
        reply: str = REPLY,
        pace_s: float = 0.0,
        gate: threading.Semaphore | None = None,
        fail_after: int | None = None,
        error: Exception | None = None,
        info: EngineInfo = INFO,
        shape: Shape | None = None,
    ) -> None:
        self.info = info
        self.requests: list[tuple[list[Mapping[str, str]], SamplingParams]] = []
        self._reply, self._pace_s, self._gate = reply, pace_s, gate
        self._shape = shape or SMALL_SHAPE
        self._fail_after, self._error = fail_after, error

    def count_tokens(self, messages: Sequence[Mapping[str, str]]) -> int:
        return sum(len(message["content"].split()) + 4 for message in messages)

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        return [_text_of(token) for token in tokens]

    def stream(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams,
        stop: threading.Event | None = None,
    ) -> Iterator[GenerationChunk]:
        self.requests.append((list(messages), params))
        params = replace(params, medusa=params.medusa and self.info.has_heads)
        words = _words(self._reply_to(messages), params.max_tokens)
        stop = stop or threading.Event()
        written = 1
        steps: list[DecodeStep] = []
        yield GenerationChunk(words[0], (_token_of(words[0]),), (words[0],))
        while written < len(words) and not self._stopped(stop):
            if self._fail_after is not None and written >= self._fail_after:
                raise self._error or RuntimeError("the double was told to fail")
            step = _step(words, written, len(steps), self._shape if params.medusa else None)
            steps.append(step)
            texts = tuple(words[written : written + len(step.tokens)])
            written += len(texts)
            yield GenerationChunk("".join(texts), step.tokens, texts, step)
        yield GenerationChunk("", result=_result(words[:written], steps, params, stop, self, messages))

    def _reply_to(self, messages: Sequence[Mapping[str, str]]) -> str:
        prompt = messages[-1]["content"]
        return prompt.removeprefix("echo:") if prompt.startswith("echo:") else self._reply

    def _stopped(self, stop: threading.Event) -> bool:
        if self._gate is not None:
            while not stop.is_set() and not self._gate.acquire(timeout=0.05):
                pass
        return stop.wait(self._pace_s) if self._pace_s else stop.is_set()


def loader(engine: FakeEngine) -> Callable[[Callable[[str], None]], FakeEngine]:
    """What the chat service calls in its thread to get its engine."""

    def load(progress: Callable[[str], None]) -> FakeEngine:
        progress("Reading Fake-135M")
        return engine

    return load


def _words(text: str, limit: int) -> list[str]:
    words: list[str] = []
    for piece in text.split(" "):
        words.append(piece if not words else f" {piece}")
    repeated = words * max(1, -(-limit // len(words))) if text is REPLY or text == REPLY else words
    return repeated[:limit]


_texts: dict[int, str] = {}


def _token_of(text: str) -> int:
    token = zlib.crc32(text.encode()) % 49152
    _texts[token] = text
    return token


def _text_of(token: int) -> str:
    return _texts.get(token, f" t{token % 997}")


def _step(words: Sequence[str], written: int, number: int, shape: Shape | None) -> DecodeStep:
    most = PATTERN[number % len(PATTERN)] if shape else 0
    accepted = min(most, len(words) - written - 1, len(shape.path) - 1 if shape else 0)
    tokens = tuple(_token_of(word) for word in words[written : written + accepted + 1])
    root = _token_of(words[written - 1])
    if shape is None:
        return DecodeStep(tokens, 0, (0,), (root,), (-1,), (1.0,), 10.0)
    path = shape.path[: accepted + 1]
    nodes = [root, *(_guess(words, written, number, node) for node in range(1, len(shape.parents)))]
    for depth, node in enumerate(path[1:]):
        nodes[node] = tokens[depth]
    return DecodeStep(tokens, accepted, path, tuple(nodes), shape.parents, shape.chances, 10.0 + number % 3)


def _guess(words: Sequence[str], written: int, number: int, node: int) -> int:
    return _token_of(words[(written * 7 + number * 3 + node * 5) % len(words)])


def _result(
    words: Sequence[str],
    steps: Sequence[DecodeStep],
    params: SamplingParams,
    stop: threading.Event,
    engine: FakeEngine,
    messages: Sequence[Mapping[str, str]],
) -> GenerationResult:
    count = max(1, len(steps))
    reason = "cancelled" if stop.is_set() else "length" if len(words) >= params.max_tokens else "stop"
    return GenerationResult(
        text="".join(words),
        tokens=tuple(_token_of(word) for word in words),
        prompt_tokens=engine.count_tokens(messages),
        cached_tokens=0,
        finish_reason=reason,
        medusa=params.medusa,
        steps=len(steps),
        tokens_per_step=1 + sum(step.num_accepted for step in steps) / count,
        acceptance_by_depth=tuple(sum(step.num_accepted >= depth for step in steps) / count for depth in (1, 2, 3)),
        tree_nodes=len(engine._shape.parents) - 1 if params.medusa else 0,
        tokens_per_second=1000 * (len(words) - 1) / max(1.0, sum(step.duration_ms for step in steps)),
        time_to_first_token_ms=12.0,
        device=engine.info.device,
        weights=engine.info.weights,
        seed=params.seed if params.seed is not None else 7,
    )
