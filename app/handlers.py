"""What happens when a person does something on the page: plain values in, plain values out; no SQL, no engine.

Events are Gradio's; the running answer is followed by a stream of its own, because Gradio's queue loses an event that
is sent in the moment in which it closes the stream of the one before (seen in 6.31).
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from app.chat import ChatError, ChatSession
from app.page_data import conversation_list, live_view, page_value, saved_view, status_view, thread_view
from app.settings import SettingsError, checked_settings
from app.storage import ConversationNotFoundError, StorageError

__all__ = ["Handlers"]

UPDATE_INTERVAL_S = 0.1  # reading is smooth at ten updates a second
# A browser that draws takes the processor that the answer is made on; tests/page_cost.py measures how much of it.
CPU_UPDATE_INTERVAL_S = 0.25
TITLE_LIMIT_S = 60


class Handlers:
    """Event functions over one chat session. Values for gr.HTML are JSON strings; their drawing is in assets/."""

    def __init__(self, session: ChatSession) -> None:
        self._session = session

    def open(self, conversation_id: str) -> tuple[str, str, str, str, bool, str]:
        """Show a conversation, or an empty page: (id, thread, conversations, live, medusa, notice)."""
        notice = ""
        try:
            shown = page_value(self._thread_data(conversation_id))
        except ConversationNotFoundError:
            notice = _notice("That conversation is not here any more; this is a new one.")
            conversation_id, shown = "", page_value(thread_view(None, []))
        settings = self._session.store.conversation(conversation_id).settings if conversation_id else {}
        return (
            conversation_id,
            shown,
            self._conversations(),
            page_value(self._live_data(conversation_id)),
            settings.get("medusa", True),
            notice,
        )

    def send(self, text: str, conversation_id: str, medusa: bool, settings: str) -> tuple[Any, str, Any, Any, Any, Any]:
        """Save and begin to answer: (composer, id, thread, conversations, live, notice). A refused text stays there.

        `settings` is the page's JSON object of all controls; the Medusa switch goes over it.
        """
        try:
            chosen = checked_settings({**_object(settings), "medusa": bool(medusa)})
            turn = self._session.send(conversation_id or None, text, chosen)
            self._session.store.save_settings(turn.conversation_id, chosen)
        except (ChatError, SettingsError, StorageError) as error:
            return gr.skip(), conversation_id, gr.skip(), gr.skip(), gr.skip(), _notice(str(error))
        shown = page_value(self._thread_data(turn.conversation_id))
        live = page_value(self._live_data(turn.conversation_id))
        return "", turn.conversation_id, shown, self._conversations(), live, ""

    def stop(self, conversation_id: str) -> None:
        """End the answer that is being written here; its text stays."""
        self._session.stop(conversation_id)

    def status(self) -> tuple[str, Any]:
        """The status line, and whether to ask again: (status, timer)."""
        state = self._session.engine_state
        return page_value(status_view(state)), gr.Timer(active=state.phase == "loading")

    async def follow(self, conversation_id: str) -> AsyncIterator[str]:
        """Look at this conversation's answer until it ends. The first and the last value also have the whole thread.

        Each value is a JSON object for assets/follow.js. A page that goes away ends only its own looking.
        """
        yield await asyncio.to_thread(self._present, conversation_id)
        answer = self._session.running(conversation_id)
        seen = -1
        while answer is not None and not answer.finished.is_set():
            if answer.revision != seen:
                seen = answer.revision
                yield page_value({"live": live_view(answer)})
            pause_s = self._update_interval_s() if answer.text else UPDATE_INTERVAL_S  # the first words come at once
            await asyncio.to_thread(answer.finished.wait, pause_s)
        titled = self._session.has_title_pending(conversation_id)
        yield await asyncio.to_thread(self._present, conversation_id, ended=not titled)
        if titled:
            yield await self._when_titled(conversation_id)

    def _update_interval_s(self) -> float:
        info = self._session.engine_state.info
        return CPU_UPDATE_INTERVAL_S if info is not None and info.device == "cpu" else UPDATE_INTERVAL_S

    async def _when_titled(self, conversation_id: str) -> str:
        """The list with the title that the model gives after the first answer."""
        for _ in range(int(TITLE_LIMIT_S / UPDATE_INTERVAL_S)):
            if not self._session.has_title_pending(conversation_id):
                break
            await asyncio.sleep(UPDATE_INTERVAL_S)
        shown = conversation_list(self._session.store.conversations())
        return page_value({"ended": True, "conversations": shown})

    def _present(self, conversation_id: str, ended: bool = False) -> str:
        try:
            return page_value(
                {
                    "ended": ended,
                    "live": self._live_data(conversation_id),
                    "thread": self._thread_data(conversation_id),
                    "conversations": conversation_list(self._session.store.conversations()),
                }
            )
        except ConversationNotFoundError:
            return page_value({"ended": True})

    def _thread_data(self, conversation_id: str) -> dict[str, Any]:
        if not conversation_id:
            return thread_view(None, [])
        store, session = self._session.store, self._session
        view = thread_view(store.conversation(conversation_id), store.thread(conversation_id))
        # An answer may be over before the page has heard of it, and its title not: the page has to look for that too.
        is_awaited = session.running(conversation_id) is not None or session.has_title_pending(conversation_id)
        return {**view, "is_awaited": is_awaited}

    def _live_data(self, conversation_id: str) -> dict[str, Any] | None:
        """The running answer, or else the last steps of the last answer, so that the panel is never blank."""
        answer = self._session.running(conversation_id)
        if answer is not None:
            return live_view(answer)
        messages = self._session.store.thread(conversation_id) if conversation_id else []
        if not messages or messages[-1].role != "assistant":
            return None
        return saved_view(messages[-1], self._session.store.trace(messages[-1].id))

    def _conversations(self) -> str:
        return page_value(conversation_list(self._session.store.conversations()))


def _object(text: str) -> dict[str, Any]:
    """The JSON object in `text`; nothing where a page of an older version sends none."""
    value = json.loads(text or "{}")
    return value if isinstance(value, dict) else {}


def _notice(text: str) -> str:
    return page_value({"text": text})
