"""What the chat is made of: the engine as it needs it, where that stands, a turn that was begun, and its refusal.

Names and shapes only; what happens with them is in chat.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from engine import EngineInfo, GenerationChunk, SamplingParams

__all__ = ["AnswerEngine", "ChatError", "EngineJob", "EngineState", "LoadEngine", "Turn"]


class AnswerEngine(Protocol):
    """What the chat needs of an engine; `engine.Engine` fits, and so does a double."""

    @property
    def info(self) -> EngineInfo: ...
    def stream(
        self, messages: Sequence[dict[str, str]], params: SamplingParams, stop: threading.Event | None = None
    ) -> Iterator[GenerationChunk]: ...
    def count_tokens(self, messages: Sequence[dict[str, str]]) -> int: ...
    def token_texts(self, tokens: Sequence[int]) -> Sequence[str]: ...


LoadEngine = Callable[[Callable[[str], None]], AnswerEngine]


class ChatError(Exception):
    """Something a person asked for that cannot be done now, told in a sentence with the remedy."""


@dataclass(frozen=True)
class EngineState:
    """Where the engine stands: `message` is what it is doing, or why it failed."""

    phase: Literal["loading", "ready", "failed"]
    message: str = ""
    info: EngineInfo | None = None


class EngineJob(Protocol):
    """Work for the engine that is no message, such as a race; done in the engine's thread, in turn with the answers."""

    def run(self, engine: AnswerEngine | None, why_not: str) -> None: ...
    def cancel(self) -> None: ...


@dataclass(frozen=True)
class Turn:
    """A user's message and the answer that was begun for it."""

    conversation_id: str
    user_id: str
    answer_id: str
