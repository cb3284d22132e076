"""Answers of the command line in the data folder: kept as the app keeps its own, and written again from what is kept.

An answer is kept with its exact settings, its seed and the way its prompt was made, so any of them can be reproduced.
Knows the engine by its public names; argv and streams are the caller's.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.chat_parts import AnswerEngine
from app.kept_answer import keep_answer, messages_above, prompt_parts
from app.records import Message, StorageError
from app.running_answer import RunningAnswer
from app.storage import ConversationStore
from app.tree_view import unpack_trace
from engine import EngineInfo, GenerationChunk, GenerationResult, SamplingParams

__all__ = ["KeepingEngine", "Reproduced", "StoredAnswer", "open_store", "reproduce", "stored_answer"]

_STOPPED = ("cancelled", "interrupted")  # such an answer is the beginning of what its settings give


def open_store(data_dir: Path) -> ConversationStore:
    """Open the conversations of a data folder; raises StorageError."""
    return ConversationStore(data_dir / "conversations.db")


class KeepingEngine:
    """An engine whose every answer becomes a conversation in a store; `message_id` is the last answer's."""

    message_id = ""

    def __init__(self, engine: AnswerEngine, store: ConversationStore) -> None:
        self._engine, self._store = engine, store

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def stream(
        self, messages: Sequence[dict[str, str]], params: SamplingParams, stop: threading.Event | None = None
    ) -> Iterator[GenerationChunk]:
        """Stream the answer to one question (a system text may stand before it); it is on disk with the last chunk."""
        answer = self._begin(messages, params)
        answer.begin(self._engine.token_texts, self.info.has_heads)
        status, error = "interrupted", ""
        try:
            for chunk in self._engine.stream(messages, params, stop):
                answer.add(chunk)
                if chunk.result is not None:
                    status = "cancelled" if chunk.result.finish_reason == "cancelled" else "complete"
                    keep_answer(self._store, answer, status, model=self.info.model)
                yield chunk
        except Exception as failure:
            status, error = "error", str(failure)
            raise
        finally:
            if answer.result is None:
                keep_answer(self._store, answer, status, model=self.info.model, error=error)

    def _begin(self, messages: Sequence[dict[str, str]], params: SamplingParams) -> RunningAnswer:
        *before, question = messages
        settings = {"system": before[0]["content"] if before else "", **params.to_dict()}
        store = self._store
        with store.atomic():
            conversation = store.create_conversation(settings={**settings, "seed": None})
            user = store.append(conversation.id, "user", question["content"], parent_id=None)
            kept = store.append(
                conversation.id, "assistant", "", parent_id=user.id, status="running", settings=settings
            )
        self.message_id = kept.id
        return RunningAnswer(conversation.id, kept.id, params)


@dataclass(frozen=True)
class StoredAnswer:
    """What is needed to write an answer again, and what it was; `tokens` is None where they were not kept."""

    messages: tuple[dict[str, str], ...]
    params: SamplingParams
    text: str
    tokens: tuple[int, ...] | None
    is_whole: bool
    stats: Mapping[str, Any]


@dataclass(frozen=True)
class Reproduced:
    """An answer written again; `difference` is empty where it is identical."""

    result: GenerationResult
    difference: str


def stored_answer(store: ConversationStore, message_id: str) -> StoredAnswer:
    """Read an answer; raises StorageError where there is none under this id or nothing to compare with."""
    message = store.message(message_id)
    if message.role != "assistant":
        raise StorageError(f"Message {message_id} is by the {message.role}; name an answer of the model's.")
    if message.status not in ("complete", *_STOPPED):
        raise StorageError(f"Message {message_id} is no finished answer of a model's ({message.status}).")
    params, prefix = SamplingParams.from_dict(message.settings), _continued_text(message)
    if params.seed is None and params.temperature > 0:
        raise StorageError(f"The seed of message {message_id} is not known, as it was interrupted; name another.")
    text = message.content[len(prefix) :]
    is_whole = message.status == "complete"
    return StoredAnswer(
        messages=tuple(_prompt(store, message, prefix)),
        params=params,
        text=text if is_whole else text.rstrip("\ufffd"),  # half a character at the end shows as this one
        tokens=_tokens(store, message_id) if is_whole else None,
        is_whole=is_whole,
        stats=message.stats,
    )


def reproduce(
    engine: AnswerEngine,
    stored: StoredAnswer,
    stop: threading.Event,
    show: Callable[[str], object] = lambda text: None,
    *,
    medusa: bool | None = None,
) -> Reproduced:
    """Write a stored answer again, `show`ing its text as it comes. `medusa` overrides the stored choice.

    Raises StorageError where another model wrote it. An answer that was stopped is compared as far as it went.
    """
    written_by = stored.stats.get("model")
    if written_by and written_by != engine.info.model:
        raise StorageError(f"The answer was written by {written_by}, not by {engine.info.model}; name it with --model.")
    params = stored.params if medusa is None else replace(stored.params, medusa=medusa)
    result = None
    for chunk in engine.stream(stored.messages, params, stop):
        show(chunk.text)
        result = chunk.result
    assert result is not None, "the last chunk of a stream carries the result"
    return Reproduced(result, _difference(stored, result))


def _difference(stored: StoredAnswer, result: GenerationResult) -> str:
    if result.finish_reason == "cancelled" and len(result.text) < len(stored.text):
        return "it was stopped before its end"
    text = result.text if stored.is_whole else result.text[: len(stored.text)]
    if text != stored.text:
        pairs = zip(text, stored.text, strict=False)
        place = next((at for at, (new, old) in enumerate(pairs) if new != old), min(len(text), len(stored.text)))
        return f"the text differs from character {place} on{_another_machine(stored, result)}"
    if stored.tokens is not None and stored.tokens != result.tokens:
        return f"the text is the same, in other tokens{_another_machine(stored, result)}"
    return ""


def _another_machine(stored: StoredAnswer, result: GenerationResult) -> str:
    """Say where weights or device are not those of the stored answer: bits are the same only with the same."""
    then = (stored.stats.get("device"), stored.stats.get("weights"))
    if None in then or then == (result.device, result.weights):
        return ""
    return f"; it was written with {then[1]} on {then[0]}, this time with {result.weights} on {result.device}"


def _prompt(store: ConversationStore, message: Message, prefix: str) -> list[dict[str, str]]:
    """Return the prompt as the chat made it, without turns that did not fit."""
    system, turns = prompt_parts(message, messages_above(store, message), prefix)
    return [*system, *turns[int(message.settings.get("left_out") or 0) :]]


def _continued_text(message: Message) -> str:
    continues = message.settings.get("continues") or {}
    return message.content[: int(continues.get("characters") or 0)]


def _tokens(store: ConversationStore, message_id: str) -> tuple[int, ...] | None:
    """Return an answer's tokens from its decode steps."""
    kept = store.trace(message_id)
    if kept is None:
        return None
    try:
        trace = unpack_trace(*kept)
    except ValueError:  # another version's format: the text alone is compared
        return None
    return (*trace.prefill_tokens, *(token for step in trace.steps for token in step.tokens))
