"""Conversations on disk: what a person keeps, one row per message, in one SQLite file.

Thread rule: that of `app.database.DataFile`, any thread may call any method. Each write is one atomic block. Branches
are rows with the same parent; the shown one ends at the conversation's head. Knows no engine and no page.
"""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from app.database import DataFile
from app.records import (
    Conversation,
    ConversationNotFoundError,
    Message,
    MessageNotFoundError,
    StorageError,
)

__all__ = [
    "KEPT_DAYS",
    "Conversation",
    "ConversationNotFoundError",
    "ConversationStore",
    "Message",
    "MessageNotFoundError",
    "StorageError",
]

ROLES = ("system", "user", "assistant")
STATUSES = ("complete", "running", "cancelled", "interrupted", "error")
TITLE_LENGTH = 60
NAME_LENGTH = 200
KEPT_DAYS = 30
DAY_MS = 86_400_000


class ConversationStore(DataFile):
    """The conversations of one data folder."""

    # conversations

    def create_conversation(
        self, title: str = "", settings: Mapping[str, Any] | None = None, **columns: Any
    ) -> Conversation:
        """Add an empty conversation; `columns` sets others than the usual (an import's own id and times)."""
        now = _now_ms()
        row = {
            "id": _new_id(),
            "title": title,
            "title_source": "user" if title else "auto",
            "settings": _dump(settings),
            "created_ms": now,
            "updated_ms": now,
            **columns,
        }
        self.insert("conversations", row)
        return self.conversation(cast(str, row["id"]))

    def conversation(self, conversation_id: str) -> Conversation:
        """Read one conversation, deleted or not; raises ConversationNotFoundError."""
        rows = self.rows("SELECT * FROM conversations WHERE id = ?", [conversation_id])
        if not rows:
            raise ConversationNotFoundError(f"There is no conversation {conversation_id!r}; open one from the list.")
        return _conversation(rows[0])

    def conversations(self, deleted: bool = False) -> list[Conversation]:
        """All conversations that are not deleted (or only those that are): pinned ones first, then the last changed."""
        rows = self.rows(
            "SELECT * FROM conversations WHERE (deleted_ms IS NOT NULL) = ? ORDER BY pinned DESC, updated_ms DESC, "
            "num DESC",
            [deleted],
        )
        return [_conversation(row) for row in rows]

    def rename(self, conversation_id: str, title: str, source: str = "user") -> None:
        """Give a conversation a title; `source` says who chose it."""
        self._update_conversation(conversation_id, {"title": title.strip()[:NAME_LENGTH], "title_source": source})

    def rename_unless_named(self, conversation_id: str, title: str) -> bool:
        """Give the model's title, unless a person or the model gave one already; returns whether it was taken."""
        taken = self.change(
            "UPDATE conversations SET title = ?, title_source = 'model' WHERE id = ? AND title_source = 'auto'",
            [title.strip()[:NAME_LENGTH], conversation_id],
        )
        return taken == 1

    def pin(self, conversation_id: str, pinned: bool) -> None:
        """Keep a conversation at the top of the list, or no longer."""
        self._update_conversation(conversation_id, {"pinned": int(pinned)})

    def move(self, conversation_id: str, folder: str | None) -> None:
        """Put a conversation into a folder (made by its first conversation), or out of any with None or ""."""
        name = " ".join((folder or "").split())[:NAME_LENGTH]
        self._update_conversation(conversation_id, {"folder": name or None})

    def save_settings(self, conversation_id: str, settings: Mapping[str, Any]) -> None:
        """Replace the settings that the next answers of this conversation start from."""
        self._update_conversation(conversation_id, {"settings": _dump(settings)})

    def delete(self, conversation_id: str) -> None:
        """Hide a conversation; nothing is removed, `restore` brings it back."""
        self._update_conversation(conversation_id, {"deleted_ms": _now_ms()})

    def restore(self, conversation_id: str) -> None:
        """Undo `delete`."""
        self._update_conversation(conversation_id, {"deleted_ms": None})

    def purge(self, conversation_id: str) -> None:
        """Remove a deleted conversation for good; one that is not deleted is refused."""
        if self.conversation(conversation_id).deleted_ms is None:
            raise StorageError("Only a deleted conversation can be removed for good; delete it first.")
        self.change("DELETE FROM conversations WHERE id = ? AND deleted_ms IS NOT NULL", [conversation_id])

    def purge_expired(self) -> int:
        """Remove for good what was deleted more than KEPT_DAYS ago; returns how many."""
        return self.change("DELETE FROM conversations WHERE deleted_ms < ?", [_now_ms() - KEPT_DAYS * DAY_MS])

    # messages

    def append(
        self,
        conversation_id: str,
        role: str,
        content: str,
        *,
        parent_id: str | None,
        status: str = "complete",
        settings: Mapping[str, Any] | None = None,
        **columns: Any,
    ) -> Message:
        """Add a message under `parent_id` (None: at the root) and show its branch; the first user text is the title."""
        _check("role", role, ROLES)
        _check("status", status, STATUSES)
        now = _now_ms()
        row = {
            "id": _new_id(),
            "conversation_id": conversation_id,
            "parent_id": parent_id,
            "role": role,
            "content": content,
            "status": status,
            "settings": _dump(settings),
            "created_ms": now,
            "updated_ms": now,
            **columns,
        }
        with self.atomic():
            conversation = self.conversation(conversation_id)
            self._require_parent(conversation_id, parent_id)
            self.insert("messages", row)
            changes = {"head_id": row["id"], "updated_ms": now}
            if role == "user" and not conversation.title:
                changes["title"] = _title_from(content)
            self._update_conversation(conversation_id, changes)
            return self.message(cast(str, row["id"]))

    def message(self, message_id: str) -> Message:
        """Read one message; raises MessageNotFoundError."""
        rows = self.rows("SELECT * FROM messages WHERE id = ?", [message_id])
        if not rows:
            raise MessageNotFoundError(f"There is no message {message_id!r}; it may have been removed for good.")
        return _message(rows[0])

    def thread(self, conversation_id: str, leaf_id: str | None = None) -> list[Message]:
        """The messages from the root to `leaf_id` (by default the conversation's head), with their siblings."""
        with self._lock:
            leaf = leaf_id or self.conversation(conversation_id).head_id
            rows = self.rows(_THREAD_SQL, [leaf, conversation_id])
            siblings = self._siblings(conversation_id)
        messages = [_message(row) for row in rows]
        return [replace(message, siblings=siblings[message.parent_id]) for message in messages]

    def messages(self, conversation_id: str) -> list[Message]:
        """All messages of a conversation, of every branch, oldest first: a parent comes before its children."""
        rows = self.rows("SELECT * FROM messages WHERE conversation_id = ? ORDER BY num", [conversation_id])
        return [_message(row) for row in rows]

    def show_branch(self, message_id: str) -> str:
        """Show the branch that goes through a message, down to the newest one below it; returns the conversation."""
        with self.atomic():
            conversation_id = self.message(message_id).conversation_id
            newest = self.rows(_NEWEST_BELOW_SQL, [message_id])[0]["id"]
            self._update_conversation(conversation_id, {"head_id": newest})
        return conversation_id

    def save_answer(
        self,
        message_id: str,
        content: str,
        status: str,
        *,
        stats: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        error: str = "",
    ) -> None:
        """Write what an answer has become so far; `stats` and `settings` None leave them as they are."""
        _check("status", status, STATUSES)
        changes: dict[str, Any] = {"content": content, "status": status, "error": error, "updated_ms": _now_ms()}
        if stats is not None:
            changes["stats"] = _dump(stats)
        if settings is not None:
            changes["settings"] = _dump(settings)
        self.update("messages", message_id, changes, MessageNotFoundError)

    def answer_stats(self, model: str, limit: int = 600) -> list[dict[str, Any]]:
        """The figures of the latest whole answers by a model, newest first."""
        rows = self.rows(
            "SELECT stats FROM messages WHERE role = 'assistant' AND status = 'complete' "
            "AND json_extract(stats, '$.model') = ? ORDER BY num DESC LIMIT ?",
            [model, limit],
        )
        return [json.loads(row["stats"]) for row in rows]

    def mark_interrupted(self) -> int:
        """Turn answers that a crash left running interrupted; returns how many. Call before an engine runs."""
        return self.change("UPDATE messages SET status = 'interrupted' WHERE status = 'running'")

    # traces

    def save_trace(self, message_id: str, data: bytes, *, steps: int, trace_format: int) -> None:
        """Keep the decode steps of an answer, replacing an earlier trace of it."""
        row = {"message_id": message_id, "format": trace_format, "steps": steps, "data": data}
        self.insert("traces", row, pk="message_id", replace=True)

    def trace(self, message_id: str) -> tuple[int, bytes] | None:
        """(format, data) of an answer's decode steps, or None where none were kept."""
        rows = self.rows("SELECT format, data FROM traces WHERE message_id = ?", [message_id])
        return (rows[0]["format"], rows[0]["data"]) if rows else None

    def _update_conversation(self, conversation_id: str, changes: Mapping[str, Any]) -> None:
        self.update("conversations", conversation_id, changes, ConversationNotFoundError)

    def _require_parent(self, conversation_id: str, parent_id: str | None) -> None:
        if parent_id is not None and self.message(parent_id).conversation_id != conversation_id:
            raise StorageError(f"Message {parent_id!r} is not part of conversation {conversation_id!r}.")

    def _siblings(self, conversation_id: str) -> dict[str | None, tuple[str, ...]]:
        groups: dict[str | None, list[str]] = {}
        for row in self.rows(
            "SELECT id, parent_id FROM messages WHERE conversation_id = ? ORDER BY num", [conversation_id]
        ):
            groups.setdefault(row["parent_id"], []).append(row["id"])
        return {parent: tuple(ids) for parent, ids in groups.items()}


_THREAD_SQL = """
WITH RECURSIVE path AS (
    SELECT messages.*, 0 AS height FROM messages WHERE id = ? AND conversation_id = ?
    UNION ALL
    SELECT messages.*, path.height + 1 FROM messages JOIN path ON messages.id = path.parent_id
)
SELECT * FROM path ORDER BY height DESC
"""

_NEWEST_BELOW_SQL = """
WITH RECURSIVE below AS (
    SELECT id, num FROM messages WHERE id = ?
    UNION ALL
    SELECT messages.id, messages.num FROM messages JOIN below ON messages.parent_id = below.id
)
SELECT id FROM below ORDER BY num DESC LIMIT 1
"""


def _conversation(row: Mapping[str, Any]) -> Conversation:
    fields = {name: row[name] for name in Conversation.__dataclass_fields__}
    return Conversation(**{**fields, "pinned": bool(row["pinned"]), "settings": json.loads(row["settings"])})


def _message(row: Mapping[str, Any]) -> Message:
    fields = {name: row[name] for name in Message.__dataclass_fields__ if name != "siblings"}
    return Message(**{**fields, "settings": json.loads(row["settings"]), "stats": json.loads(row["stats"])})


def _title_from(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1].rsplit(" ", 1)[0] + "…"


def _check(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise StorageError(f"{name} is {value!r}; allowed is {', '.join(allowed)}.")


def _dump(value: Mapping[str, Any] | None) -> str:
    return json.dumps(dict(value or {}), ensure_ascii=False)


def _new_id() -> str:
    return secrets.token_hex(8)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
