"""Saving what a file brought: new conversations are added, known ones get the messages they lack, nothing is doubled.

A message is known by its id, or else by its text, role and place: the same file, or a longer export of the same
conversation, may come again. One transaction: a file is imported whole or not at all.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.import_formats import ImportedConversation, ImportedMessage, read_conversations
from app.records import Conversation, ConversationNotFoundError, Message, MessageNotFoundError
from app.storage import ConversationStore

__all__ = ["ImportReport", "import_file"]


@dataclass(frozen=True)
class ImportReport:
    """What an import did, in conversations and messages."""

    added: int
    extended: int
    known: int
    messages: int

    def sentence(self) -> str:
        """For the person who chose the file."""
        parts = [
            f"{_counted(self.added, 'conversation')} imported" if self.added else "",
            f"{_counted(self.extended, 'conversation')} got what was missing" if self.extended else "",
            f"{_counted(self.known, 'conversation')} already here" if self.known else "",
        ]
        return f"{', '.join(part for part in parts if part)} ({_counted(self.messages, 'new message')})."


def import_file(store: ConversationStore, data: bytes) -> ImportReport:
    """Add a file's conversations; raises UnreadableFileError or StorageError, and changes nothing then."""
    conversations = read_conversations(data)
    counts = {"added": 0, "extended": 0, "known": 0, "messages": 0}
    with store.atomic():
        for item in conversations:
            kind, messages = _import_one(store, item)
            counts[kind] += 1
            counts["messages"] += messages
    return ImportReport(**counts)


def _import_one(store: ConversationStore, item: ImportedConversation) -> tuple[str, int]:
    known = _find(store, item)
    target = known or _create(store, item)
    new, ids = _add_messages(store, target, item)
    if known is not None and known.deleted_ms is not None:
        store.restore(known.id)
    if known is None:
        _finish_new(store, target, item, ids)
        return "added", new
    if new:
        _keep_times(store, target.id, known.head_id, known.updated_ms)
    return ("extended" if new else "known"), new


def _find(store: ConversationStore, item: ImportedConversation) -> Conversation | None:
    try:
        return store.conversation(item.own_id) if item.own_id else _by_origin(store, item.origin)
    except ConversationNotFoundError:
        return _by_origin(store, item.extra.get("origin"))


def _by_origin(store: ConversationStore, origin: str | None) -> Conversation | None:
    rows = store.rows("SELECT id FROM conversations WHERE origin = ?", [origin]) if origin else []
    return store.conversation(rows[0]["id"]) if rows else None


def _create(store: ConversationStore, item: ImportedConversation) -> Conversation:
    columns: dict[str, Any] = {"origin": item.origin, **item.extra}
    settings = columns.pop("settings", {"system": item.system} if item.system else {})
    if item.own_id:
        columns["id"] = item.own_id
    return store.create_conversation(item.title, settings, **columns)


def _add_messages(
    store: ConversationStore, target: Conversation, item: ImportedConversation
) -> tuple[int, dict[str, str]]:
    """Add the messages that are not there: how many, and the id here for each key of the file."""
    present = _Present(store.messages(target.id))
    ids: dict[str, str] = {}
    new = 0
    for message in item.messages:
        parent = ids[message.parent] if message.parent is not None else None
        found = present.take(message, parent)
        if found is None:
            found = _append(store, target.id, message, parent, keep_id=item.own_id is not None)
            new += 1
        ids[message.key] = found
    return new, ids


class _Present:
    """The messages that a conversation has; each can be the counterpart of one imported message."""

    def __init__(self, messages: list[Message]) -> None:
        self._by_id = {message.id: message for message in messages}

    def take(self, message: ImportedMessage, parent: str | None) -> str | None:
        same_id = self._by_id.get(message.key)
        found = same_id or next((kept for kept in self._by_id.values() if _is_same(kept, message, parent)), None)
        if found is None or not _is_same(found, message, parent):
            return None
        del self._by_id[found.id]
        return found.id


def _is_same(kept: Message, message: ImportedMessage, parent: str | None) -> bool:
    return (kept.parent_id, kept.role, kept.content) == (parent, message.role, message.content)


def _append(
    store: ConversationStore, conversation_id: str, message: ImportedMessage, parent: str | None, keep_id: bool
) -> str:
    extra = dict(message.extra)
    columns: dict[str, Any] = {name: extra[name] for name in ("error",) if name in extra}
    if "stats" in extra:
        columns["stats"] = json.dumps(extra["stats"], ensure_ascii=False)
    if message.created_ms is not None:
        columns |= {"created_ms": message.created_ms, "updated_ms": message.created_ms}
    if keep_id and _is_free(store, message.key):
        columns["id"] = message.key
    status, settings = extra.get("status", "complete"), extra.get("settings")
    saved = store.append(
        conversation_id, message.role, message.content, parent_id=parent, status=status, settings=settings, **columns
    )
    return saved.id


def _is_free(store: ConversationStore, message_id: str) -> bool:
    try:
        store.message(message_id)
    except MessageNotFoundError:
        return True
    return False


def _finish_new(
    store: ConversationStore, target: Conversation, item: ImportedConversation, ids: Mapping[str, str]
) -> None:
    """The branch that was shown there is shown here, and the conversation stands where its date puts it."""
    shown = store.conversation(target.id)
    head = ids.get(item.head or "", shown.head_id)
    times = [message.created_ms for message in item.messages if message.created_ms]
    updated = item.updated_ms or max(times, default=shown.updated_ms)
    _keep_times(store, target.id, head, updated, item.created_ms or min(times, default=shown.created_ms))


def _keep_times(
    store: ConversationStore, conversation_id: str, head: str | None, updated: int, created: int | None = None
) -> None:
    changes: dict[str, Any] = {"head_id": head, "updated_ms": updated}
    if created is not None:
        changes["created_ms"] = created
    store.update("conversations", conversation_id, changes, ConversationNotFoundError)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
