"""What the store hands out: conversations and messages as frozen records, and the errors it tells.

Plain values, no database: the page's data, exports and imports are made from these.
"""

from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "Conversation",
    "ConversationNotFoundError",
    "Message",
    "MessageNotFoundError",
    "StorageError",
]


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
    origin: str | None = None  # where it was imported from, so that the same file adds nothing twice


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
