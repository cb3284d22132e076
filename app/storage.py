"""Conversations on disk: what a person keeps, one row per message, in one SQLite file.

Thread rule: one connection, opened with `check_same_thread=False`, is used only while `_lock` is held; every public
method takes it, so any thread may call any method. Each write is one `db.atomic()` block. Knows no engine and no page.
"""

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from sqlite_utils import Database
from sqlite_utils.db import Table

from app.migrations import NewerSchemaError, apply_migrations

__all__ = [
    "Conversation",
    "ConversationNotFoundError",
    "ConversationStore",
    "Message",
    "MessageNotFoundError",
    "StorageError",
]

ROLES = ("system", "user", "assistant")
STATUSES = ("complete", "running", "cancelled", "interrupted", "error")
BUSY_TIMEOUT_MS = 5000
TITLE_LENGTH = 60


class StorageError(Exception):
    """Anything the store refuses or fails at, told in a sentence a person can act on."""


class ConversationNotFoundError(StorageError):
    """No conversation has this id."""


class MessageNotFoundError(StorageError):
    """No message has this id."""


@dataclass(frozen=True)
class Conversation:
    """One conversation without its messages; times are milliseconds since 1970."""

    id: str
    title: str
    title_source: str
    folder: str | None
    pinned: bool
    settings: dict[str, Any]
    head_id: str | None
    created_ms: int
    updated_ms: int
    deleted_ms: int | None


@dataclass(frozen=True)
class Message:
    """One message; `siblings` are the ids of all messages with its parent, itself among them, oldest first."""

    id: str
    conversation_id: str
    parent_id: str | None
    role: str
    content: str
    status: str
    error: str
    settings: dict[str, Any]
    stats: dict[str, Any]
    created_ms: int
    updated_ms: int
    siblings: tuple[str, ...] = field(default=(), compare=False)


class ConversationStore:
    """The conversations of one data folder; safe to share between threads (see the module's thread rule)."""

    def __init__(self, path: Path) -> None:
        """Open or create the database at `path` and bring its schema up to date; raises StorageError."""
        self.path = path
        self._lock = threading.RLock()
        self._db = _open(path)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """Make several calls one transaction: all of them are on disk afterwards, or none."""
        with self._lock, _as_storage_error(self.path), self._db.atomic():
            yield

    # conversations

    def create_conversation(self, title: str = "", settings: Mapping[str, Any] | None = None) -> Conversation:
        """Add an empty conversation."""
        now = _now_ms()
        conversation_id = _new_id()
        row = {
            "id": conversation_id,
            "title": title,
            "title_source": "user" if title else "auto",
            "settings": _dump(settings),
            "created_ms": now,
            "updated_ms": now,
        }
        with self.atomic():
            self._table("conversations").insert(row)
        return self.conversation(conversation_id)

    def conversation(self, conversation_id: str) -> Conversation:
        """Read one conversation, deleted or not; raises ConversationNotFoundError."""
        rows = self._rows("SELECT * FROM conversations WHERE id = ?", [conversation_id])
        if not rows:
            raise ConversationNotFoundError(f"There is no conversation {conversation_id!r}; open one from the list.")
        return _conversation(rows[0])

    def conversations(self) -> list[Conversation]:
        """All conversations that are not deleted: pinned ones first, then the last changed."""
        rows = self._rows(
            "SELECT * FROM conversations WHERE deleted_ms IS NULL ORDER BY pinned DESC, updated_ms DESC, num DESC"
        )
        return [_conversation(row) for row in rows]

    def rename(self, conversation_id: str, title: str, source: str = "user") -> None:
        """Give a conversation a title; `source` says who chose it."""
        self._update_conversation(conversation_id, {"title": title.strip()[:200], "title_source": source})

    def save_settings(self, conversation_id: str, settings: Mapping[str, Any]) -> None:
        """Replace the settings that the next answers of this conversation start from."""
        self._update_conversation(conversation_id, {"settings": _dump(settings)})

    def delete(self, conversation_id: str) -> None:
        """Hide a conversation; nothing is removed, `restore` brings it back."""
        self._update_conversation(conversation_id, {"deleted_ms": _now_ms()})

    def restore(self, conversation_id: str) -> None:
        """Undo `delete`."""
        self._update_conversation(conversation_id, {"deleted_ms": None})

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
        }
        with self.atomic():
            conversation = self.conversation(conversation_id)
            self._require_parent(conversation_id, parent_id)
            self._table("messages").insert(row)
            changes = {"head_id": row["id"], "updated_ms": now}
            if role == "user" and not conversation.title:
                changes["title"] = _title_from(content)
            self._update_conversation(conversation_id, changes)
            return self.message(cast(str, row["id"]))

    def message(self, message_id: str) -> Message:
        """Read one message; raises MessageNotFoundError."""
        rows = self._rows("SELECT * FROM messages WHERE id = ?", [message_id])
        if not rows:
            raise MessageNotFoundError(f"There is no message {message_id!r}; it may have been removed for good.")
        return _message(rows[0])

    def thread(self, conversation_id: str, leaf_id: str | None = None) -> list[Message]:
        """The messages from the root to `leaf_id` (by default the conversation's head), with their siblings."""
        with self._lock:
            leaf = leaf_id or self.conversation(conversation_id).head_id
            rows = self._rows(_THREAD_SQL, [leaf, conversation_id])
            siblings = self._siblings(conversation_id)
        messages = [_message(row) for row in rows]
        return [replace(message, siblings=siblings[message.parent_id]) for message in messages]

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
        with self.atomic():
            self._update("messages", message_id, changes, MessageNotFoundError)

    def mark_interrupted(self) -> int:
        """Turn answers that a crash left running interrupted; returns how many. Call before an engine runs."""
        with self.atomic():
            cursor = self._db.execute("UPDATE messages SET status = 'interrupted' WHERE status = 'running'")
            return cursor.rowcount

    # traces

    def save_trace(self, message_id: str, data: bytes, *, steps: int, trace_format: int) -> None:
        """Keep the decode steps of an answer, replacing an earlier trace of it."""
        row = {"message_id": message_id, "format": trace_format, "steps": steps, "data": data}
        with self.atomic():
            self._table("traces").insert(row, pk="message_id", replace=True)

    def trace(self, message_id: str) -> tuple[int, bytes] | None:
        """(format, data) of an answer's decode steps, or None where none were kept."""
        rows = self._rows("SELECT format, data FROM traces WHERE message_id = ?", [message_id])
        return (rows[0]["format"], rows[0]["data"]) if rows else None

    # the one way in and out of the database

    def _rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        with self._lock, _as_storage_error(self.path):
            return list(self._db.query(sql, list(parameters)))

    def _table(self, name: str) -> Table:
        return cast(Table, self._db[name])

    def _update_conversation(self, conversation_id: str, changes: Mapping[str, Any]) -> None:
        with self.atomic():
            self._update("conversations", conversation_id, changes, ConversationNotFoundError)

    def _update(self, table: str, row_id: str, changes: Mapping[str, Any], missing: type[StorageError]) -> None:
        columns = ", ".join(f"{column} = ?" for column in changes)
        cursor = self._db.execute(f"UPDATE {table} SET {columns} WHERE id = ?", [*changes.values(), row_id])
        if cursor.rowcount == 0:
            raise missing(f"There is nothing with the id {row_id!r} in {table}; it may have been removed for good.")

    def _require_parent(self, conversation_id: str, parent_id: str | None) -> None:
        if parent_id is not None and self.message(parent_id).conversation_id != conversation_id:
            raise StorageError(f"Message {parent_id!r} is not part of conversation {conversation_id!r}.")

    def _siblings(self, conversation_id: str) -> dict[str | None, tuple[str, ...]]:
        groups: dict[str | None, list[str]] = {}
        for row in self._rows(
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


def _open(path: Path) -> Database:
    connection: sqlite3.Connection | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, check_same_thread=False, timeout=BUSY_TIMEOUT_MS / 1000)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # a sent message outlives a power cut; twice a second is cheap
        connection.execute("PRAGMA foreign_keys = ON")
        database = Database(connection, execute_plugins=False)
        apply_migrations(database)
        return database
    except NewerSchemaError as error:
        _close(connection)
        raise StorageError(f"{error} Update the app, or use another --data-dir than {path.parent}.") from error
    except (sqlite3.Error, OSError) as error:
        _close(connection)
        raise StorageError(
            f"The conversations in {path} cannot be opened ({error}). Check the file's permissions and free space, "
            "or start with another --data-dir; nothing was changed."
        ) from error


@contextmanager
def _as_storage_error(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(
            f"The conversations in {path} cannot be read or saved ({error}). Check that the disk has free space and "
            "that no other program holds the file."
        ) from error


def _close(connection: sqlite3.Connection | None) -> None:
    if connection is not None:
        connection.close()


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
