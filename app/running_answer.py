"""One answer while it is written: what the engine thread adds, what pages read, and the thread that saves it."""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from app.storage import ConversationStore, StorageError
from app.tree_view import TokenTexts, Trace, acceptance_by_depth
from engine import GenerationChunk, GenerationResult, SamplingParams

__all__ = ["Autosave", "RunningAnswer"]

SAVE_INTERVAL_S = 0.5
_log = logging.getLogger(__name__)


class RunningAnswer:
    """An answer while it is written. The engine thread feeds it; any thread may look."""

    def __init__(self, conversation_id: str, message_id: str, params: SamplingParams, prefix: str = "") -> None:
        """`prefix` is the text of an earlier answer that this one goes on from."""
        self.conversation_id, self.message_id, self.params, self.prefix = conversation_id, message_id, params, prefix
        self.prompt_tokens = self.left_out = self.max_context = 0
        self.stop = threading.Event()
        self.finished = threading.Event()
        self.status = "waiting"  # then "running", then what the store knows
        self.error = ""
        self.revision = 0
        self.trace = Trace(_no_texts)
        self.result: GenerationResult | None = None
        self._lock = threading.Lock()
        self._drafts = params.medusa
        self._text = ""
        self._tokens = 0
        self._first_at = self._last_at = 0.0

    def begin(self, token_texts: TokenTexts, can_draft: bool) -> None:
        """Leave the queue: the engine starts on this answer; without heads it cannot draft, whatever was asked for."""
        self._drafts = self.params.medusa and can_draft
        self.trace = Trace(token_texts)
        self.status = "running"
        self.revision += 1

    def add(self, chunk: GenerationChunk) -> None:
        """Take what one prefill or decode step added."""
        with self._lock:
            self._last_at = time.perf_counter()
            self._first_at = self._first_at or self._last_at
            self._text += chunk.text
            self._tokens += len(chunk.tokens)
            if chunk.step is not None:
                self.trace.add(chunk.step, _texts_in(chunk), chunk.tokens)
            elif chunk.tokens:
                self.trace.add_prefill(_texts_in(chunk), chunk.tokens)
            self.result = chunk.result or self.result
            self.revision += 1

    def finish(self, status: str, error: str = "") -> None:
        """Say how it ended; what is on disk is the same by now."""
        self.status, self.error = status, error
        self.revision += 1
        self.finished.set()

    @property
    def text(self) -> str:
        return self.prefix + self._text

    def stats(self) -> dict[str, Any]:
        """The figures under the answer: the engine's own once it has ended, counted here until then."""
        with self._lock:
            if self.result is not None:
                figures = asdict(self.result)
                del figures["text"], figures["tokens"]
                return {**figures, "generated_tokens": self.result.generated_tokens}
            steps = self.trace.steps
            seconds = self._last_at - self._first_at
            return {
                "medusa": self._drafts,
                "generated_tokens": self._tokens,
                "prompt_tokens": self.prompt_tokens,
                "steps": len(steps),
                "tokens_per_step": 1 + sum(step.num_accepted for step in steps) / len(steps) if steps else 1.0,
                "tokens_per_second": (self._tokens - 1) / seconds if seconds > 0 else 0.0,
                "acceptance_by_depth": acceptance_by_depth(steps),
            }


class Autosave:
    """Saves a growing answer from a thread of its own, so that a slow disk does not slow the engine."""

    def __init__(self, store: ConversationStore, answer: RunningAnswer) -> None:
        self._store, self._answer = store, answer
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, name="autosave", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._done.set()
        self._thread.join()

    def _work(self) -> None:
        saved = ""
        while not self._done.wait(SAVE_INTERVAL_S):
            text = self._answer.text
            if text == saved:
                continue
            try:
                self._store.save_answer(self._answer.message_id, text, "running", stats=self._answer.stats())
                saved = text
            except StorageError:
                _log.exception("A growing answer could not be saved; it is tried again")


def _texts_in(chunk: GenerationChunk) -> tuple[str, ...]:
    """The chunk's text by token. Where a character spans tokens, the last token that completed it carries it all."""
    if "".join(chunk.token_texts) == chunk.text:
        return chunk.token_texts
    return (*("" for _ in chunk.tokens[1:]), chunk.text)


def _no_texts(tokens: Sequence[int]) -> Sequence[str]:
    raise AssertionError(f"a waiting answer has no steps, but tokens {tokens} were added")
