"""Reading the files that conversations come in: this app's JSON, ShareGPT (also one object a line), ChatGPT's export.

Bytes in, plain records out, all checked before any is saved; what cannot be read is refused in a sentence. No database.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.export import JSON_FORMAT

__all__ = ["ImportedConversation", "ImportedMessage", "UnreadableFileError", "read_conversations"]

MAX_BYTES = 512 << 20
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
FINISHED = ("complete", "cancelled", "interrupted", "error")


class UnreadableFileError(Exception):
    """The file is none that can be imported; nothing was changed."""


@dataclass(frozen=True)
class ImportedMessage:
    """`key` and `parent` name messages within their file; parents stand before children."""

    key: str
    parent: str | None
    role: str
    content: str
    created_ms: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # further columns, from this app's own files alone


@dataclass(frozen=True)
class ImportedConversation:
    """`own_id` is set for a conversation of this app, `origin` for one of another."""

    title: str
    messages: tuple[ImportedMessage, ...]
    own_id: str | None = None
    origin: str | None = None
    head: str | None = None
    created_ms: int | None = None
    updated_ms: int | None = None
    system: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def read_conversations(data: bytes) -> list[ImportedConversation]:
    """Read a file's conversations; raises UnreadableFileError."""
    try:
        document = _document(data)
        conversations = [item for item in _by_format(document) if item.messages]
    except UnreadableFileError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UnreadableFileError(
            f"The file has the shape of a known export, but one of its conversations cannot be read ({error}). "
            "Nothing was imported."
        ) from error
    if not conversations:
        raise UnreadableFileError("The file holds no conversation with a message in it. Nothing was imported.")
    return conversations


def _document(data: bytes) -> Any:
    if data[:2] == b"PK":
        data = _conversations_in_zip(data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unknown("is not UTF-8 text") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.splitlines() if line.strip()]
        try:
            return [json.loads(line) for line in lines] if len(lines) > 1 else _refuse_json(error)
        except (ValueError, RecursionError):
            return _refuse_json(error)


def _refuse_json(error: Exception) -> Any:
    raise _unknown(f"is not JSON ({error})") from error


def _conversations_in_zip(data: bytes) -> bytes:
    """ChatGPT's export is a zip with conversations.json in it."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entry = next((info for info in archive.infolist() if info.filename.endswith("conversations.json")), None)
            if entry is None or entry.file_size > MAX_BYTES:
                raise _unknown("is a zip without a conversations.json")
            return archive.read(entry)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
        raise _unknown(f"is a damaged zip ({error})") from error


def _unknown(what: str) -> UnreadableFileError:
    return UnreadableFileError(
        f"The file {what}; an export of Medusa Chat (JSON), ShareGPT or ChatGPT is needed. Nothing was imported."
    )


def _by_format(document: Any) -> Iterator[ImportedConversation]:
    if isinstance(document, dict) and document.get("format") == JSON_FORMAT:
        return map(_own, document["conversations"])
    items = document if isinstance(document, list) else [document]
    if items and all(isinstance(item, dict) and "mapping" in item for item in items):
        return map(_chatgpt, items)
    if items and all(isinstance(item, dict) and ("conversations" in item or "messages" in item) for item in items):
        return map(_sharegpt, items)
    raise _unknown("is JSON of another kind")


# this app's own


def _own(item: Mapping[str, Any]) -> ImportedConversation:
    messages = tuple(_own_message(message) for message in item["messages"])
    _check_order(messages)
    settings = item.get("settings")
    return ImportedConversation(
        title=_text(item, "title"),
        messages=messages,
        own_id=_identifier(item["id"]),
        head=item.get("head_id"),
        created_ms=_time(item.get("created_ms")),
        updated_ms=_time(item.get("updated_ms")),
        extra={
            "title_source": "user" if item.get("title_source") == "user" else "model",
            "folder": item["folder"] if isinstance(item.get("folder"), str) else None,
            "pinned": int(bool(item.get("pinned"))),
            "settings": settings if isinstance(settings, dict) else {},
            "origin": item["origin"] if isinstance(item.get("origin"), str) else None,
        },
    )


def _own_message(item: Mapping[str, Any]) -> ImportedMessage:
    status = item.get("status", "complete")
    return ImportedMessage(
        key=_identifier(item["id"]),
        parent=item.get("parent_id"),
        role=_role(item["role"]),
        content=_text(item, "content"),
        created_ms=_time(item.get("created_ms")),
        extra={
            "status": status if status in FINISHED else "interrupted",
            "error": _text(item, "error"),
            "settings": item.get("settings") if isinstance(item.get("settings"), dict) else {},
            "stats": item.get("stats") if isinstance(item.get("stats"), dict) else {},
        },
    )


def _check_order(messages: Sequence[ImportedMessage]) -> None:
    seen: set[str] = set()
    for message in messages:
        if message.key in seen or (message.parent is not None and message.parent not in seen):
            raise ValueError(f"message {message.key!r} stands twice or before its parent")
        seen.add(message.key)


# ShareGPT: {"conversations": [{"from": "human", "value": "..."}]}, or OpenAI's {"messages": [{"role", "content"}]}


def _sharegpt(item: Mapping[str, Any]) -> ImportedConversation:
    lines = item.get("conversations", item.get("messages"))
    if not isinstance(lines, list):
        raise TypeError(f"its turns are {type(lines).__name__}, not a list")
    turns = [_sharegpt_line(line) for line in lines]
    system = "\n\n".join(text for role, text in turns if role == "system")
    messages = _chain([turn for turn in turns if turn[0] != "system"])
    given = str(item.get("id") or "")
    own = given.removeprefix(f"{JSON_FORMAT}-") if given.startswith(f"{JSON_FORMAT}-") else None
    digest = hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return ImportedConversation(
        title=_text(item, "title"),
        messages=messages,
        own_id=_identifier(own) if own else None,
        origin=None if own else f"sharegpt:{given or digest}",
        head=messages[-1].key if messages else None,
        system=system,
    )


def _sharegpt_line(line: Mapping[str, Any]) -> tuple[str, str]:
    role = line.get("from", line.get("role"))
    value = line.get("value", line.get("content"))
    if isinstance(value, list):  # OpenAI's parts
        texts = [part.get("text") for part in value if isinstance(part, dict)]
        value = "\n".join(text for text in texts if isinstance(text, str))
    if not isinstance(value, str):
        raise TypeError(f"a turn's text is {type(value).__name__}")
    return _role(role), _clean(value)


def _chain(turns: Sequence[tuple[str, str]]) -> tuple[ImportedMessage, ...]:
    return tuple(
        ImportedMessage(str(index), str(index - 1) if index else None, role, text)
        for index, (role, text) in enumerate(turns)
    )


# ChatGPT: {"title", "mapping": {id: {"message", "parent", "children"}}, "current_node"}


def _chatgpt(item: Mapping[str, Any]) -> ImportedConversation:
    mapping = item["mapping"]
    if not isinstance(mapping, dict):
        raise TypeError("its mapping is not an object")
    messages, shown = _chatgpt_messages(mapping)
    current = item.get("current_node")
    given = item.get("conversation_id") or item.get("id") or ""
    digest = hashlib.sha256(json.dumps(sorted(mapping)).encode()).hexdigest()[:32]
    return ImportedConversation(
        title=_text(item, "title"),
        messages=tuple(messages),
        origin=f"chatgpt:{given or digest}",
        head=shown.get(str(current)),
        created_ms=_seconds(item.get("create_time")),
        updated_ms=_seconds(item.get("update_time")),
    )


def _chatgpt_messages(mapping: Mapping[str, Any]) -> tuple[list[ImportedMessage], dict[str, str | None]]:
    """The texts of people and model, each under the nearest one above it; and for each node what that one is."""
    nearest: dict[str, str | None] = {}
    messages: list[ImportedMessage] = []
    waiting: list[tuple[str, str | None]] = [
        (key, None) for key, node in mapping.items() if node.get("parent") not in mapping
    ]
    while waiting:
        key, above = waiting.pop(0)
        if key in nearest:
            continue
        message = _chatgpt_message(key, above, mapping[key].get("message"))
        if message is not None:
            messages.append(message)
        nearest[key] = key if message else above
        waiting += [(child, nearest[key]) for child in mapping[key].get("children") or [] if child in mapping]
    return messages, nearest


def _chatgpt_message(key: str, parent: str | None, message: Any) -> ImportedMessage | None:
    if not isinstance(message, dict):
        return None
    role = (message.get("author") or {}).get("role")
    content = message.get("content") or {}
    hidden = (message.get("metadata") or {}).get("is_visually_hidden_from_conversation")
    if role not in ("user", "assistant") or hidden or content.get("content_type") not in ("text", "multimodal_text"):
        return None
    text = _clean("\n".join(part for part in content.get("parts") or [] if isinstance(part, str)))
    if not text.strip():
        return None
    return ImportedMessage(key, parent, role, text, _seconds(message.get("create_time")))


# values


def _role(name: Any) -> str:
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f"{name!r} is no known speaker")
    return role


def _text(item: Mapping[str, Any], name: str) -> str:
    value = item.get(name) or ""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {type(value).__name__}, not text")
    return _clean(value)


def _clean(text: str) -> str:
    """Text that SQLite and UTF-8 take: no NUL and no half of a surrogate pair."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode("utf-8")


def _identifier(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 64 or not value.isascii() or not value.isprintable():
        raise ValueError(f"{value!r} is no id")
    return value


def _time(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 < value < 1 << 53 else None


def _seconds(value: Any) -> int | None:
    usable = isinstance(value, (int, float)) and abs(value) < 1e12  # NaN is not
    return _time(int(value * 1000)) if usable else None
