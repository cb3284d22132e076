"""What the page asks for by name, one JSON object in and one out: the list, branches, settings, search.

Not Gradio's events: these change several views at once and must not wait in a queue. Each answer holds new values for
the views it changed, under their names (see assets/api.js). No SQL and no engine here.
"""

from collections.abc import Callable, Mapping
from typing import Any

from app.chat import ChatError, ChatSession, Turn
from app.import_formats import UnreadableFileError
from app.importing import import_file
from app.page_data import conversation_list, live_view, thread_view
from app.search import search
from app.settings import SettingsError, checked_settings, settings_options
from app.storage import KEPT_DAYS, StorageError

__all__ = ["REFUSALS", "Actions", "BadRequestError"]

Values = Mapping[str, Any]
SAME_AGAIN = "At temperature 0 an answer is the same every time; the settings have presets that vary it."


class BadRequestError(Exception):
    """The page asked for something that does not exist, or left out what it needs."""


REFUSALS = (ChatError, StorageError, SettingsError, UnreadableFileError, BadRequestError)


class Actions:
    """The actions over one chat session; each takes the request's values and returns those of the views."""

    def __init__(self, session: ChatSession) -> None:
        self._session = session
        self.store = self._store = session.store
        self._by_name: dict[str, Callable[[Values], dict[str, Any]]] = {
            "options": lambda values: settings_options(),
            "list": lambda values: self._list(),
            "search": self._search,
            "rename": self._rename,
            "pin": self._pin,
            "move": self._move,
            "delete": self._delete,
            "restore": self._restore,
            "bin": lambda values: self._bin(),
            "purge": self._purge,
            "show": self._show,
            "edit": self._edit,
            "regenerate": self._regenerate,
            "continue": self._go_on,
            "settings": self._settings,
        }

    def act(self, name: str, values: object) -> dict[str, Any]:
        """Do what `name` says; raises one of REFUSALS with a sentence for the person."""
        if name not in self._by_name:
            raise BadRequestError(f"There is no action {name!r}; reload the page.")
        if not isinstance(values, dict):
            raise BadRequestError("The request is no JSON object; reload the page.")
        return self._by_name[name](values)

    def load_file(self, data: bytes) -> dict[str, Any]:
        """Import a file; the list and a sentence about what came of it."""
        report = import_file(self._store, data)
        return {**self._list(), "said": report.sentence()}

    # the list

    def _list(self) -> dict[str, Any]:
        return {"conversations": conversation_list(self._store.conversations())}

    def _search(self, values: Values) -> dict[str, Any]:
        hits = search(self._store, _text(values, "text"))
        return {
            "hits": [
                {"id": hit.conversation_id, "message": hit.message_id, "title": hit.title, "snippet": hit.snippet}
                for hit in hits
            ]
        }

    def _rename(self, values: Values) -> dict[str, Any]:
        title = _text(values, "title").strip()
        if not title:
            raise BadRequestError("A title needs at least one character; the old one stays.")
        self._store.rename(_text(values, "id"), title)
        return self._list()

    def _pin(self, values: Values) -> dict[str, Any]:
        self._store.pin(_text(values, "id"), bool(values.get("pinned")))
        return self._list()

    def _move(self, values: Values) -> dict[str, Any]:
        self._store.move(_text(values, "id"), _text(values, "folder"))
        return self._list()

    def _delete(self, values: Values) -> dict[str, Any]:
        self._session.delete(_text(values, "id"))
        return self._list()

    def _restore(self, values: Values) -> dict[str, Any]:
        self._store.restore(_text(values, "id"))
        return {**self._list(), **self._bin()}

    def _bin(self) -> dict[str, Any]:
        deleted = self._store.conversations(deleted=True)
        items = [
            {"id": item.id, "title": item.title or "New chat", "deleted_ms": item.deleted_ms}
            for item in sorted(deleted, key=lambda item: item.deleted_ms or 0, reverse=True)
        ]
        return {"bin": items, "kept_days": KEPT_DAYS}

    def _purge(self, values: Values) -> dict[str, Any]:
        chosen = values.get("id")
        ids = [chosen] if chosen else [item.id for item in self._store.conversations(deleted=True)]
        for conversation_id in ids:
            self._store.purge(str(conversation_id))
        return self._bin()

    # branches

    def _show(self, values: Values) -> dict[str, Any]:
        return self._thread(self._session.show_branch(_text(values, "message")))

    def _edit(self, values: Values) -> dict[str, Any]:
        settings = _object(values, "settings")
        return self._begun(self._session.edit(_text(values, "message"), _text(values, "text"), settings))

    def _regenerate(self, values: Values) -> dict[str, Any]:
        settings = _object(values, "settings")
        turn = self._session.regenerate(_text(values, "message"), settings)
        is_greedy = settings.get("temperature", 0) == 0
        return {**self._begun(turn), "said": SAME_AGAIN if is_greedy else ""}

    def _go_on(self, values: Values) -> dict[str, Any]:
        return self._begun(self._session.go_on(_text(values, "message"), _object(values, "settings")))

    def _begun(self, turn: Turn) -> dict[str, Any]:
        answer = self._session.running(turn.conversation_id)
        return {**self._thread(turn.conversation_id), **self._list(), "live": live_view(answer) if answer else None}

    def _thread(self, conversation_id: str) -> dict[str, Any]:
        store = self._store
        return {"thread": thread_view(store.conversation(conversation_id), store.thread(conversation_id))}

    # settings

    def _settings(self, values: Values) -> dict[str, Any]:
        """Check settings, and save them where there is a conversation yet; returns them complete."""
        settings = checked_settings(_object(values, "settings"))
        if values.get("id"):
            self._store.save_settings(_text(values, "id"), settings)
        return {"settings": settings}


def _text(values: Values, name: str) -> str:
    value = values.get(name, "")
    if not isinstance(value, str):
        raise BadRequestError(f"{name} is {type(value).__name__}, not text; reload the page.")
    return value


def _object(values: Values, name: str) -> dict[str, Any]:
    value = values.get(name) or {}
    if not isinstance(value, dict):
        raise BadRequestError(f"{name} is {type(value).__name__}, not an object; reload the page.")
    return value
