"""Answers as they are written: messages -> engine stream -> saved message, in one thread that no page owns.

A page looks at a running answer and may go away; only `stop`, the answer's own end or the end of the program finish it.
Knows no page and no SQL: the store keeps, the handlers show. Messages are answered in the order they were sent.
"""

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from app.chat_parts import AnswerEngine, ChatError, EngineJob, EngineState, LoadEngine, Turn
from app.context import answer_reserve, fit_prompt
from app.kept_answer import keep_answer, messages_above, prompt_parts
from app.running_answer import Autosave, RunningAnswer
from app.settings import SettingsError, checked_settings, params_from
from app.storage import ConversationStore, Message, StorageError
from app.title_queue import TitleQueue
from engine import EngineError

__all__ = [
    "AnswerEngine",
    "ChatError",
    "ChatSession",
    "EngineJob",
    "EngineState",
    "LoadEngine",
    "RunningAnswer",
    "Turn",
]

_log = logging.getLogger(__name__)


class ChatSession:
    """The engine's one thread and everything that asks it for answers; shared by all pages."""

    def __init__(self, store: ConversationStore, load_engine: LoadEngine, *, titles: bool = False) -> None:
        """`titles` lets the model name conversations after their first answer."""
        self.store = store
        self._titles = TitleQueue(store) if titles else None
        self.engine_state = EngineState("loading", "Starting")
        self._load_engine = load_engine
        self._queue: queue.SimpleQueue[RunningAnswer | EngineJob | None] = queue.SimpleQueue()
        self._answers: dict[str, RunningAnswer] = {}  # by conversation: at most one each
        self._jobs: list[EngineJob] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Mark what a crash left behind, empty the bin of what is overdue, then load the engine in its thread."""
        self.store.purge_expired()
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
        for job in list(self._jobs):
            job.cancel()
        self._put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self.store.mark_interrupted()

    def send(self, conversation_id: str | None, text: str, settings: Mapping[str, Any]) -> Turn:
        """Save a user's message (in a new conversation for None) and queue its answer.

        Raises ChatError for an empty text, for impossible settings, and while this conversation's last answer is still
        being written; nothing is saved then.
        """
        text = _checked_text(text)

        def user() -> Message:
            conversation = (
                self.store.conversation(conversation_id) if conversation_id else self.store.create_conversation()
            )
            return self.store.append(conversation.id, "user", text, parent_id=conversation.head_id)

        return self._start(conversation_id, user, settings)

    def edit(self, message_id: str, text: str, settings: Mapping[str, Any]) -> Turn:
        """Answer another wording of a user's message, in a branch of its own; the old one stays."""
        text = _checked_text(text)
        old = self._message(message_id, "user")

        def user() -> Message:
            return self.store.append(old.conversation_id, "user", text, parent_id=old.parent_id)

        return self._start(old.conversation_id, user, settings)

    def regenerate(self, message_id: str, settings: Mapping[str, Any]) -> Turn:
        """Answer the same message once more, in a branch of its own."""
        old = self._message(message_id, "assistant")
        return self._start(old.conversation_id, lambda: self._question_of(old), settings)

    def go_on(self, message_id: str, settings: Mapping[str, Any]) -> Turn:
        """Go on from where an answer ended, in a branch that begins with its text."""
        old = self._message(message_id, "assistant")
        if not old.content:
            raise ChatError("This answer is empty, so there is nothing to go on from; ask for another answer instead.")
        return self._start(old.conversation_id, lambda: self._question_of(old), settings, continued=old)

    def show_branch(self, message_id: str) -> str:
        """Show the branch that goes through a message; returns its conversation."""
        with self._lock:
            self._refuse_if_running(self.store.message(message_id).conversation_id)
            return self.store.show_branch(message_id)

    def delete(self, conversation_id: str) -> None:
        """Hide a conversation; an answer that is being written there is stopped and kept with it."""
        self.stop(conversation_id)
        self.store.delete(conversation_id)

    def stop(self, conversation_id: str) -> None:
        """End this conversation's answer after the current step; what is written stays."""
        answer = self.running(conversation_id)
        if answer is not None:
            answer.stop.set()

    def running(self, conversation_id: str | None) -> RunningAnswer | None:
        """The answer that is being written or waits to be, if there is one."""
        with self._lock:
            return self._answers.get(conversation_id or "")

    def has_title_pending(self, conversation_id: str) -> bool:
        """Whether the model has yet to name this conversation."""
        return self._titles is not None and self._titles.is_pending(conversation_id)

    def _start(
        self,
        conversation_id: str | None,
        user_message: Callable[[], Message],
        settings: Mapping[str, Any],
        continued: Message | None = None,
    ) -> Turn:
        """Queue an answer to the message that `user_message` saves or finds; all that is saved is saved at once."""
        settings = _checked(settings)
        with self._lock:
            if conversation_id is not None:
                self._refuse_if_running(conversation_id)
            with self.store.atomic():
                user = user_message()
                answer = self._begin_answer(user, settings, continued)
            self._answers[user.conversation_id] = answer
        self._put(answer)
        return Turn(user.conversation_id, user.id, answer.message_id)

    def submit(self, job: EngineJob) -> None:
        """Let the engine do something else in its turn."""
        self._jobs.append(job)
        self._put(job)

    def _put(self, answer: RunningAnswer | EngineJob | None) -> None:
        self._queue.put(answer)
        if self._titles is not None:
            self._titles.interrupt()

    def _message(self, message_id: str, role: str) -> Message:
        message = self.store.message(message_id)
        if message.role != role:
            raise ChatError(f"Message {message_id!r} is by the {message.role}; this needs one by the {role}.")
        return message

    def _question_of(self, answer: Message) -> Message:
        if answer.parent_id is None:
            raise ChatError("This answer stands alone, without a question to answer; write a message below it.")
        return self.store.message(answer.parent_id)

    def _refuse_if_running(self, conversation_id: str) -> None:
        if conversation_id in self._answers:
            raise ChatError("The last answer is still being written; wait for it or press Stop.")

    def _begin_answer(self, user: Message, settings: Mapping[str, Any], continued: Message | None) -> RunningAnswer:
        prefix = continued.content if continued else ""
        saved = dict(settings)
        if continued is not None:  # the prompt ended with this much of the answer's own text
            saved["continues"] = {"message": continued.id, "characters": len(prefix)}
        message = self.store.append(
            user.conversation_id, "assistant", prefix, parent_id=user.id, status="running", settings=saved
        )
        return RunningAnswer(user.conversation_id, message.id, params_from(settings), prefix)

    # below: the engine thread

    def _work(self) -> None:
        engine = self._load()
        while (answer := self._next(engine)) is not None:
            if not isinstance(answer, RunningAnswer):
                self._do(engine, answer)
                continue
            try:
                self._write(engine, answer)
            except Exception:  # the store failed: the page is told, the thread lives on for the next message
                _log.exception("An answer could not be saved")
                self._leave(answer, "error", "The answer could not be saved; check the disk's free space.")

    def _do(self, engine: AnswerEngine | None, job: EngineJob) -> None:
        try:
            job.run(engine, self.engine_state.message)
        except Exception:  # a job tells its own failures; the thread lives on
            _log.exception("The engine could not do what was asked")
        finally:
            self._jobs.remove(job)

    def _next(self, engine: AnswerEngine | None) -> RunningAnswer | EngineJob | None:
        """The next answer; titles are written while there is none."""
        while self._titles and engine is not None:
            self._titles.rearm()
            try:
                return self._queue.get_nowait()
            except queue.Empty:
                self._titles.write_next(engine)
        return self._queue.get()

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
        model = self.engine_state.info.model if self.engine_state.info else ""
        keep_answer(self.store, answer, status, model=model, error=error)
        if engine is not None:  # what it says of the tree's size goes on with every answer
            self.engine_state = EngineState("ready", info=engine.info)
        if status == "complete" and self._titles is not None:
            self._titles.ask_for(answer.conversation_id)
        self._leave(answer, status, error)

    def _generate(self, engine: AnswerEngine, answer: RunningAnswer) -> None:
        if answer.stop.is_set():
            return
        answer.begin(engine.token_texts, engine.info.has_heads)
        messages = self._prompt(engine, answer)
        for chunk in engine.stream(messages, answer.params, answer.stop):
            answer.add(chunk)

    def _stopped_status(self, answer: RunningAnswer) -> str:
        if self._closing.is_set():
            return "interrupted"
        ended_by_itself = answer.result is not None and answer.result.finish_reason != "cancelled"
        return "complete" if ended_by_itself else "cancelled"

    def _prompt(self, engine: AnswerEngine, answer: RunningAnswer) -> list[dict[str, str]]:
        """The messages above the answer that fit."""
        message = self.store.message(answer.message_id)
        above = messages_above(self.store, message)
        system, turns = prompt_parts(message, above, answer.prefix)
        before = next((turn.settings for turn in reversed(above) if turn.role == "assistant"), {})
        answer.max_context = engine.info.max_context
        room = answer.max_context - answer_reserve(answer.max_context, answer.params.max_tokens)
        already_out = int(before.get("left_out") or 0)
        prompt = fit_prompt(system, turns, engine.count_tokens, room, already_out=already_out)
        answer.left_out, answer.prompt_tokens = prompt.left_out, prompt.tokens
        return prompt.messages

    def _leave(self, answer: RunningAnswer, status: str, error: str) -> None:
        with self._lock:
            self._answers.pop(answer.conversation_id, None)
        answer.finish(status, error)


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return checked_settings(settings)
    except SettingsError as error:
        raise ChatError(str(error)) from error


def _checked_text(text: str) -> str:
    if not text.strip():
        raise ChatError("The message is empty; write something first.")
    return text.strip()


def _sentence(error: Exception) -> str:
    if isinstance(error, (EngineError, ChatError, StorageError)):
        return str(error)
    _log.error("The engine failed", exc_info=error)
    return f"The engine failed unexpectedly ({type(error).__name__}: {error}). Send it again or restart the app."
