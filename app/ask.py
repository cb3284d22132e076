"""Answer prompts with an engine and write what comes: streamed text, or one JSON object a prompt.

It sees the engine through its public names only and any object with `info` and `stream` will do. It knows nothing of
argv, files or signals: the caller brings questions, streams and the event that stops.
"""

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TextIO

from app.prompts import Question
from engine import EngineInfo, GenerationChunk, GenerationResult, SamplingParams

__all__ = ["AnsweringEngine", "answer_all", "as_json", "summary"]

JSON_KEYS = (
    "text",
    "tokens",
    "prompt_tokens",
    "generated_tokens",
    "finish_reason",
    "medusa",
    "steps",
    "tokens_per_step",
    "acceptance_by_depth",
    "tree_nodes",
    "tokens_per_second",
    "time_to_first_token_ms",
    "device",
    "weights",
    "seed",
)


class AnsweringEngine(Protocol):
    """What is asked of an engine."""

    @property
    def info(self) -> EngineInfo: ...

    def stream(
        self, messages: Sequence[dict[str, str]], params: SamplingParams, stop: threading.Event | None = None
    ) -> Iterator[GenerationChunk]: ...


def as_json(result: GenerationResult, **more: Any) -> str:
    """Return the answer's record, and `more`, as one line of JSON, which has neither NaN nor infinity: refused."""
    record: dict[str, Any] = {**{key: getattr(result, key) for key in JSON_KEYS}, **more}
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def answer_all(
    engine: AnsweringEngine,
    questions: Sequence[Question],
    params: SamplingParams,
    *,
    stop: threading.Event,
    out: TextIO,
    log: TextIO,
    json_lines: bool,
    kept_as: Callable[[], str] | None = None,
) -> None:
    """Answer `questions` in order onto `out`; remarks go to `log`. A set `stop` ends it after the partial answer.

    `kept_as` names the last answer where answers are kept.
    """
    if params.medusa and not engine.info.has_heads:
        log.write(f"Medusa is off: {engine.info.heads_reason or 'this model has no draft heads'}\n")
        params = dataclasses.replace(params, medusa=False)
    for question in questions:
        if stop.is_set():
            return
        if json_lines:
            result = _answer(engine, question, params, stop, None)
            out.write(as_json(result, **({"message": kept_as()} if kept_as else {})) + "\n")
        else:
            result = _answer(engine, question, params, stop, out)
            out.write("\n")
            log.write(f"{summary(result)}\n")
            if kept_as:
                log.write(f"Kept as message {kept_as()}\n")
        out.flush()


def _answer(
    engine: AnsweringEngine, question: Question, params: SamplingParams, stop: threading.Event, out: TextIO | None
) -> GenerationResult:
    """Run one generation to its end, with its text written to `out` as it comes."""
    result = None
    for chunk in engine.stream(question.messages, params, stop):
        if out is not None and chunk.text:
            out.write(chunk.text)
            out.flush()
        result = chunk.result
    assert result is not None, "the last chunk of a stream carries the result"
    return result


def summary(result: GenerationResult) -> str:
    """Return an answer's speed in a line."""
    ended = {"length": ", cut at --max-tokens or the model's context", "cancelled": ", stopped"}
    return (
        f"{result.tokens_per_second:.0f} tok/s · {result.tokens_per_step:.2g} tok/step · "
        f"{result.generated_tokens} tokens{ended.get(result.finish_reason, '')}"
    )
