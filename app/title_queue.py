"""Conversations that wait for a title: asked of the model while nobody waits for an answer, left at once when one does.

The engine's thread works; other threads interrupt and look. Never over a title that a person gave.
"""

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

from app.storage import ConversationStore, StorageError
from app.titles import TITLE_PARAMS, clean_title, title_prompt
from engine import EngineError, GenerationChunk, SamplingParams

__all__ = ["TitleQueue", "TitleWriter"]

MIN_WORDS = 3
_log = logging.getLogger(__name__)


class TitleWriter(Protocol):
    """What is asked of an engine."""

    def stream(
        self, messages: Sequence[dict[str, str]], params: SamplingParams, stop: threading.Event | None = None
    ) -> Iterator[GenerationChunk]: ...


class TitleQueue:
    """Titles to be written, oldest first."""

    def __init__(self, store: ConversationStore) -> None:
        self._store = store
        self._waiting: deque[str] = deque()
        self._stop = threading.Event()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def is_pending(self, conversation_id: str) -> bool:
        return conversation_id in list(self._waiting)

    def rearm(self) -> None:
        """Call before looking whether an answer is wanted: one that comes later interrupts again."""
        self._stop.clear()

    def interrupt(self) -> None:
        """Somebody wants an answer: what is being written is left and tried again later."""
        self._stop.set()

    def ask_for(self, conversation_id: str) -> None:
        """Queue a conversation whose first answer has just ended, unless it has been named."""
        if self._store.conversation(conversation_id).title_source != "auto" or self.is_pending(conversation_id):
            return
        thread = self._store.thread(conversation_id)
        # A greeting is its own title, and a small model makes something up about it.
        if len(thread) == 2 and len(thread[0].content.split()) >= MIN_WORDS:
            self._waiting.append(conversation_id)

    def write_next(self, engine: TitleWriter) -> None:
        """Write the next title; a failure costs the title and nothing else."""
        conversation_id = self._waiting[0]
        try:
            title = self._write(engine, conversation_id)
            if self._stop.is_set():
                return
            if title:
                self._store.rename_unless_named(conversation_id, title)
        except (EngineError, StorageError, RuntimeError) as error:
            _log.warning("No title was written: %s", error)
        self._waiting.popleft()

    def _write(self, engine: TitleWriter, conversation_id: str) -> str | None:
        thread = self._store.thread(conversation_id)
        if not thread:
            return None
        prompt = title_prompt(thread[0].content)
        return clean_title(chunk.text for chunk in engine.stream(prompt, TITLE_PARAMS, self._stop))
