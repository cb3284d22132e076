"""What happens when a person does something on the page: plain values in, plain values out; no SQL, no engine.

`follow` only looks at a running answer. It ends when the answer does, when its page goes away, or when the same page
starts to look at something else; the answer does not notice.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from app.chat import ChatError, ChatSession
from app.page_data import conversation_list, live_view, saved_view, status_view, thread_view
from app.storage import ConversationNotFoundError, StorageError

__all__ = ["Handlers"]

UPDATE_INTERVAL_S = (
    0.08  # 12 updates a second: reading is smooth, and the browser's drawing is the limit, not this side
)
STATUS_INTERVAL_S = 0.25


class Handlers:
    """Event functions over one chat session. Values for gr.HTML are JSON-like; their drawing is in assets/."""

    def __init__(self, session: ChatSession) -> None:
        self._session = session
        self._looking: dict[str, int] = {}  # by page: which of its follow calls is the current one

    def open(self, conversation_id: str) -> tuple[str, Any, Any, Any, Any, Any]:
        """Show a conversation, or an empty page: (id, thread, conversations, live, medusa, notice)."""
        notice = None
        try:
            shown = self._thread(conversation_id)
        except ConversationNotFoundError:
            notice = _notice("That conversation is not here any more; this is a new one.")
            conversation_id, shown = "", thread_view(None, [])
        settings = self._session.store.conversation(conversation_id).settings if conversation_id else {}
        return (
            conversation_id,
            shown,
            self._conversations(),
            self._live(conversation_id),
            settings.get("medusa", True),
            notice,
        )

    def send(self, text: str, conversation_id: str, medusa: bool) -> tuple[Any, str, Any, Any, Any, Any]:
        """Save and begin to answer: (composer, id, thread, conversations, live, notice). A refused text stays there."""
        settings = {"medusa": bool(medusa)}
        try:
            turn = self._session.send(conversation_id or None, text, settings)
            self._session.store.save_settings(turn.conversation_id, settings)
        except (ChatError, StorageError) as error:
            return gr.skip(), conversation_id, gr.skip(), gr.skip(), gr.skip(), _notice(str(error))
        shown = self._thread(turn.conversation_id)
        return "", turn.conversation_id, shown, self._conversations(), self._live(turn.conversation_id), None

    def stop(self, conversation_id: str) -> None:
        """End the answer that is being written here; its text stays."""
        self._session.stop(conversation_id)

    async def follow(self, conversation_id: str, request: gr.Request) -> AsyncIterator[tuple[Any, Any, Any]]:
        """Look at this conversation's running answer until it ends: (live, thread, conversations)."""
        page = request.session_hash or ""
        turn = self._looking[page] = self._looking.get(page, 0) + 1
        seen = -1
        answer = self._session.running(conversation_id)
        if answer is None:
            return
        while not answer.finished.is_set():
            if answer.revision != seen:
                seen = answer.revision
                yield live_view(answer), gr.skip(), gr.skip()
            await asyncio.sleep(UPDATE_INTERVAL_S)
            if self._looking.get(page) != turn:
                return
        yield live_view(answer), self._thread(conversation_id), self._conversations()

    def leave(self, request: gr.Request) -> None:
        """Forget a page that was closed."""
        self._looking.pop(request.session_hash or "", None)

    async def status(self) -> AsyncIterator[Any]:
        """The status line, again and again until the model is loaded or has failed to."""
        shown = None
        while True:
            state = self._session.engine_state
            if state != shown:
                shown = state
                yield status_view(state)
            if state.phase != "loading":
                return
            await asyncio.sleep(STATUS_INTERVAL_S)

    def _thread(self, conversation_id: str) -> dict[str, Any]:
        if not conversation_id:
            return thread_view(None, [])
        store = self._session.store
        return thread_view(store.conversation(conversation_id), store.thread(conversation_id))

    def _conversations(self) -> list[dict[str, Any]]:
        return conversation_list(self._session.store.conversations())

    def _live(self, conversation_id: str) -> dict[str, Any] | None:
        """The running answer, or else the last steps of the last answer, so that the panel is never blank."""
        answer = self._session.running(conversation_id)
        if answer is not None:
            return live_view(answer)
        messages = self._session.store.thread(conversation_id) if conversation_id else []
        if not messages or messages[-1].role != "assistant":
            return None
        return saved_view(messages[-1], self._session.store.trace(messages[-1].id))


def _notice(text: str) -> dict[str, str]:
    return {"text": text}
