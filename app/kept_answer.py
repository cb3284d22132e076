"""An answer's two ends in the store: the messages that stand above it, and the finished answer with its steps.

The chat, the command line and whoever writes an old answer again go through here, so that all make the same prompt.
"""

from collections.abc import Sequence

from app.records import Message
from app.running_answer import RunningAnswer
from app.storage import ConversationStore
from app.tree_view import TRACE_FORMAT

__all__ = ["keep_answer", "messages_above", "prompt_parts"]

Messages = list[dict[str, str]]


def messages_above(store: ConversationStore, message: Message) -> list[Message]:
    """Return the branch above an answer; one that failed before its first word says nothing and is not in it."""
    thread = store.thread(message.conversation_id, message.id)
    return [above for above in thread if above.content and above.id != message.id]


def prompt_parts(message: Message, above: Sequence[Message], prefix: str) -> tuple[Messages, Messages]:
    """Return the system text and the turns of an answer's prompt; `prefix` is the text that it goes on from."""
    system = str(message.settings.get("system") or "")
    turns = [{"role": turn.role, "content": turn.content} for turn in above]
    if prefix:
        turns.append({"role": "assistant", "content": prefix})
    return [{"role": "system", "content": system}] if system else [], turns


def keep_answer(store: ConversationStore, answer: RunningAnswer, status: str, *, model: str, error: str = "") -> None:
    """Save an answer as it ended, with its seed, its figures and the steps behind it."""
    settings = {**store.message(answer.message_id).settings, "left_out": answer.left_out}
    if answer.result is not None:
        settings["seed"] = answer.result.seed
    stats = {**answer.stats(), "model": model}
    if answer.max_context:
        stats["max_context"] = answer.max_context
    with store.atomic():
        store.save_answer(answer.message_id, answer.text, status, stats=stats, settings=settings, error=error)
        if answer.trace.steps:
            steps = len(answer.trace.steps)
            store.save_trace(answer.message_id, answer.trace.pack(), steps=steps, trace_format=TRACE_FORMAT)
