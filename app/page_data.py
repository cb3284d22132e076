"""Plain values for the page's own drawings, made from what the store and the chat session know.

The scripts in assets/ are the only readers; texts of the model stay texts. Each view gets its value as one JSON string:
Gradio sends a stream as differences between values, and a list that shrinks inside one arrives with wrong items.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from app.chat import EngineState
from app.running_answer import RunningAnswer
from app.storage import Conversation, Message
from app.tree_view import StepView, acceptance_by_depth, unpack_trace

__all__ = [
    "context_view",
    "conversation_list",
    "figures_line",
    "live_view",
    "page_value",
    "saved_view",
    "status_view",
    "thread_view",
]

RECENT_STEPS = 48
SPEED_STEPS = 16  # the speed "now" is over so many steps
STATUS_NOTES = {
    "cancelled": "stopped",
    "interrupted": "interrupted when the app ended",
    "error": "failed",
}


def page_value(view: Mapping[str, Any] | Sequence[Any] | None) -> str:
    """What a gr.HTML of the page gets as its value; empty for nothing."""
    return "" if view is None else json.dumps(view, ensure_ascii=False, separators=(",", ":"))


def thread_view(conversation: Conversation | None, messages: Sequence[Message]) -> dict[str, Any]:
    """A conversation's shown branch; without a conversation, the empty first page."""
    return {
        "id": conversation.id if conversation else "",
        "title": conversation.title if conversation else "",
        "settings": conversation.settings if conversation else {},
        "context": context_view(messages),
        "messages": [_message(message) for message in messages],
    }


def conversation_list(conversations: Sequence[Conversation]) -> list[dict[str, Any]]:
    return [
        {
            "id": item.id,
            "title": item.title or "New chat",
            "updated_ms": item.updated_ms,
            "pinned": item.pinned,
            "folder": item.folder,
        }
        for item in conversations
    ]


def context_view(messages: Sequence[Message]) -> dict[str, Any]:
    """How much of the model's context the last answer and its prompt took."""
    last = next((message.stats for message in reversed(messages) if message.role == "assistant"), {})
    return {"used": last.get("prompt_tokens", 0) + last.get("generated_tokens", 0), "size": last.get("max_context", 0)}


def live_view(answer: RunningAnswer) -> dict[str, Any]:
    """A running answer: its text, its figures, its latest steps."""
    stats = answer.stats()
    return {
        "conversation": answer.conversation_id,
        "message": answer.message_id,
        "status": answer.status,
        "text": answer.text,
        "error": answer.error,
        "figures": figures_line(stats, answer.status),
        "left_out": answer.left_out,
        "context": {"used": answer.prompt_tokens + stats["generated_tokens"], "size": answer.max_context},
        **_steps_view(answer.trace.steps, stats),
    }


def saved_view(message: Message, trace: tuple[int, bytes] | None) -> dict[str, Any] | None:
    """The last steps of a finished answer, in the shape of `live_view`; None where no steps can be read."""
    if trace is None:
        return None
    try:
        steps = unpack_trace(*trace).steps
    except ValueError:
        return None
    return {
        "conversation": message.conversation_id,
        "message": message.id,
        "status": message.status,
        "text": message.content,
        "error": message.error,
        "figures": figures_line(message.stats, message.status),
        "left_out": message.settings.get("left_out", 0),
        **_steps_view(steps, message.stats),
    }


def figures_line(stats: Mapping[str, Any], status: str) -> str:
    """The line under an answer, such as `41 tok/s · 1.9 tok/step · 512 tokens`, and how it ended if not by itself."""
    parts = []
    if stats.get("generated_tokens"):
        tokens = stats["generated_tokens"]
        parts = [
            f"{stats['tokens_per_second']:.0f} tok/s",
            f"{stats['tokens_per_step']:.1f} tok/step",
            f"{tokens} token{'' if tokens == 1 else 's'}",
        ]
    if stats.get("finish_reason") == "length" and status == "complete":
        parts.append("cut at the length limit")
    if status in STATUS_NOTES:
        parts.append(STATUS_NOTES[status])
    return " · ".join(parts)


def status_view(state: EngineState) -> dict[str, Any]:
    """The status line: what runs where, and whether Medusa can help."""
    view: dict[str, Any] = {"phase": state.phase, "message": state.message}
    if state.info is not None:
        info = state.info
        view.update(
            model=info.model,
            max_context=info.max_context,
            device=info.device,
            weights=info.weights,
            memory_bytes=info.memory_bytes,
            medusa=info.has_heads,
            heads=info.num_heads,
            reason=info.heads_reason,
            notes=list(info.notes),
        )
    return view


def _message(message: Message) -> dict[str, Any]:
    return {
        "id": message.id,
        "role": message.role,
        "content": message.content,
        "status": message.status,
        "error": message.error,
        "medusa": message.stats.get("medusa", message.settings.get("medusa", False)),
        "figures": figures_line(message.stats, message.status) if message.role == "assistant" else "",
        "siblings": list(message.siblings),
        "settings": message.settings,
        "left_out": message.settings.get("left_out", 0),
    }


def _steps_view(steps: Sequence[StepView], stats: Mapping[str, Any]) -> dict[str, Any]:
    """The latest step and the gauges; all steps are asked for where they are needed (app/trace.py)."""
    return {
        "steps": [step.as_json(len(steps)) for step in steps[-1:]],
        "recent": [step.num_accepted for step in steps[-RECENT_STEPS:]],
        "medusa": bool(stats.get("medusa")),
        "tokens_per_second": round(stats.get("tokens_per_second", 0.0), 1),
        "tokens_per_second_now": round(_speed(steps[-SPEED_STEPS:]), 1),
        "tokens_per_step": round(stats.get("tokens_per_step", 1.0), 2),
        "acceptance_by_depth": [round(share, 3) for share in acceptance_by_depth(steps)],
    }


def _speed(steps: Sequence[StepView]) -> float:
    """Tokens a second over these steps."""
    milliseconds = sum(step.duration_ms for step in steps)
    return 1000 * sum(len(step.texts) for step in steps) / milliseconds if milliseconds else 0.0
