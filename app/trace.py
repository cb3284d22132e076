"""Whole traces for the page: every step of one answer, running or stored, so that it can be looked at and replayed.

A stream of updates brings the latest step alone (app/page_data.py); this is for when someone looks closer.
Plain columns go out (`Trace.columns`), the page numbers the steps itself.
"""

import json
from typing import Any

from app.chat import ChatSession
from app.storage import MessageNotFoundError
from app.tree_view import Trace, unpack_trace

__all__ = ["trace_json"]


def trace_json(session: ChatSession, message_id: str, first: int = 0) -> str | None:
    """The steps from index `first` on as JSON, and whether more may come; None where no steps are kept."""
    try:
        message = session.store.message(message_id)
    except MessageNotFoundError:
        return None
    answer = session.running(message.conversation_id)
    if answer is not None and answer.message_id == message_id:
        return _as_json(answer.trace, first, running=True)
    stored = session.store.trace(message_id)
    if stored is None:
        return None
    try:
        return _as_json(unpack_trace(*stored), first, running=False)
    except ValueError:  # another version's format: the answer is there, its steps cannot be drawn
        return None


def _as_json(trace: Trace, first: int, running: bool) -> str:
    view: dict[str, Any] = {"first": first, "running": running, **trace.columns(first)}
    return json.dumps(view, ensure_ascii=False, separators=(",", ":"))
