"""Answers as they are written: messages -> engine stream -> saved message, in one thread that no page owns.

A page looks at a running answer and may go away; only `stop`, the answer's own end or the end of the program finish it.
Knows no page and no SQL: the store keeps, the handlers show. Messages are answered in the order they were sent.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Protocol

from app.running_answer import Autosave, RunningAnswer
from app.storage import ConversationStore, Message, StorageError
from app.tree_view import TRACE_FORMAT
from engine import EngineError, EngineInfo, GenerationChunk, SamplingParams

__all__ = ["AnswerEngine", "ChatError", "ChatSession", "EngineState", "LoadEngine", "RunningAnswer", "Turn"]

_log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Turn:
    """A user's message and the answer that was begun for it."""

    conversation_id: str
    user_id: str
    answer_id: str


class ChatSession:
    """The engine's one thread and everything that asks it for answers; shared by all pages."""

    def __init__(self, store: ConversationStore, load_engine: LoadEngine) -> None:
        self.store = store
        self.engine_state = EngineState("loading", "Starting")
        self._load_engine = load_engine
        self._queue: queue.SimpleQueue[RunningAnswer | None] = queue.SimpleQueue()
        self._answers: dict[str, RunningAnswer] = {}  # by conversation: at most one each
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Mark what a crash left behind, then load the engine in its thread."""
        interrupted = self.store.mark_interrupted()
        if interrupted:
            _log.info("%d answers were interrupted when the app last ended", interrupted)
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop what runs and save it as interrupted; waiting messages keep an empty interrupted answer."""
        self._closing.set()
        with self._lock:
            answers = list(self._answers.values())
        for answer in answers:
            answer.stop.set()
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self.store.mark_interrupted()

    def send(self, conversation_id: str | None, text: str, settings: Mapping[str, Any]) -> Turn:
        """Save a user's message (in a new conversation for None) and queue its answer.

        Raises ChatError for an empty text, for impossible settings, and while this conversation's last answer is still
        being written; nothing is saved then.
        """
        if not text.strip():
            raise ChatError("The message is empty; write something first.")
        params = _params_from(settings)
        with self._lock:
            if conversation_id is not None:
                self._refuse_if_running(conversation_id)
            with self.store.atomic():
                conversation = (
                    self.store.conversation(conversation_id) if conversation_id else self.store.create_conversation()
                )
                user = self.store.append(conversation.id, "user", text.strip(), parent_id=conversation.head_id)
                answer = self._begin_answer(user, params, settings)
            self._answers[conversation.id] = answer
        self._queue.put(answer)
        return Turn(conversation.id, user.id, answer.message_id)

    def stop(self, conversation_id: str) -> None:
        """End this conversation's answer after the current step; what is written stays."""
        answer = self.running(conversation_id)
        if answer is not None:
            answer.stop.set()

    def running(self, conversation_id: str | None) -> RunningAnswer | None:
        """The answer that is being written or waits to be, if there is one."""
        with self._lock:
            return self._answers.get(conversation_id or "")

    def _refuse_if_running(self, conversation_id: str) -> None:
        if conversation_id in self._answers:
            raise ChatError("The last answer is still being written; wait for it or press Stop.")

    def _begin_answer(self, user: Message, params: SamplingParams, settings: Mapping[str, Any]) -> RunningAnswer:
        saved = {"system": settings.get("system", ""), **asdict(params)}
        message = self.store.append(
            user.conversation_id, "assistant", "", parent_id=user.id, status="running", settings=saved
        )
        return RunningAnswer(user.conversation_id, message.id, params)

    # below: the engine thread

    def _work(self) -> None:
        engine = self._load()
        while (answer := self._queue.get()) is not None:
            try:
                self._write(engine, answer)
            except Exception:  # the store failed: the page is told, the thread lives on for the next message
                _log.exception("An answer could not be saved")
                self._leave(answer, "error", "The answer could not be saved; check the disk's free space.")

    def _load(self) -> AnswerEngine | None:
        try:
            engine = self._load_engine(self._say)
        except Exception as error:
            self.engine_state = EngineState("failed", _sentence(error))
            return None
        self.engine_state = EngineState("ready", info=engine.info)
        return engine

    def _say(self, message: str) -> None:
        self.engine_state = EngineState("loading", message)

    def _write(self, engine: AnswerEngine | None, answer: RunningAnswer) -> None:
        status, error = "complete", ""
        with Autosave(self.store, answer):
            try:
                if engine is None:
                    raise ChatError(f"The model is not loaded. {self.engine_state.message}")
                self._generate(engine, answer)
                if answer.stop.is_set():
                    status = self._stopped_status(answer)
            except Exception as failure:
                status, error = "error", _sentence(failure)
        self._keep(answer, status, error)
        self._leave(answer, status, error)

    def _generate(self, engine: AnswerEngine, answer: RunningAnswer) -> None:
        if answer.stop.is_set():
            return
        answer.begin(engine.token_texts, engine.info.has_heads)
        messages = self._prompt(answer)
        for chunk in engine.stream(messages, answer.params, answer.stop):
            answer.add(chunk)

    def _stopped_status(self, answer: RunningAnswer) -> str:
        if self._closing.is_set():
            return "interrupted"
        ended_by_itself = answer.result is not None and answer.result.finish_reason != "cancelled"
        return "complete" if ended_by_itself else "cancelled"

    def _prompt(self, answer: RunningAnswer) -> list[dict[str, str]]:
        """The messages above the answer; an answer that failed before its first word says nothing."""
        thread = self.store.thread(answer.conversation_id, answer.message_id)[:-1]
        system = str(self.store.message(answer.message_id).settings.get("system") or "")
        prompt = [{"role": "system", "content": system}] if system else []
        return prompt + [{"role": message.role, "content": message.content} for message in thread if message.content]

    def _keep(self, answer: RunningAnswer, status: str, error: str) -> None:
        settings = None
        if answer.result is not None:
            saved = self.store.message(answer.message_id).settings
            settings = {**saved, "seed": answer.result.seed}
        with self.store.atomic():
            stats = {**answer.stats(), "model": self.engine_state.info.model if self.engine_state.info else ""}
            self.store.save_answer(answer.message_id, answer.text, status, stats=stats, settings=settings, error=error)
            if answer.trace.steps:
                self.store.save_trace(
                    answer.message_id, answer.trace.pack(), steps=len(answer.trace.steps), trace_format=TRACE_FORMAT
                )

    def _leave(self, answer: RunningAnswer, status: str, error: str) -> None:
        with self._lock:
            self._answers.pop(answer.conversation_id, None)
        answer.finish(status, error)


def _params_from(settings: Mapping[str, Any]) -> SamplingParams:
    known = {field.name for field in fields(SamplingParams)}
    try:
        return SamplingParams(**{name: value for name, value in settings.items() if name in known})
    except EngineError as error:
        raise ChatError(str(error)) from error


def _sentence(error: Exception) -> str:
    if isinstance(error, (EngineError, ChatError, StorageError)):
        return str(error)
    _log.error("The engine failed", exc_info=error)
    return f"The engine failed unexpectedly ({type(error).__name__}: {error}). Send it again or restart the app."
