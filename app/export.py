"""Conversations as files: Markdown to read, JSON with everything (branches, settings, figures), ShareGPT to train with.

Text in, text out; a JSON file of this app is read back by `app.importing` without loss of a message.
"""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from app.records import Conversation, Message
from app.storage import ConversationStore

__all__ = ["FORMATS", "JSON_FORMAT", "export_file"]

JSON_FORMAT = "medusa-chat"
JSON_VERSION = 1
FORMATS = {
    "markdown": ("text/markdown", "md"),
    "json": ("application/json", "json"),
    "sharegpt": ("application/json", "json"),
}
_OF_CONVERSATION = "id title title_source folder pinned settings head_id created_ms updated_ms origin"
_OF_MESSAGE = "id parent_id role content status error settings stats created_ms updated_ms"
_SHAREGPT_NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
_MARKDOWN_NAMES = {"system": "System", "user": "You", "assistant": "Answer"}


def export_file(store: ConversationStore, file_format: str, conversation_id: str | None) -> tuple[str, str, str]:
    """Write one conversation, or all for None: (file name, media type, text). Raises KeyError for another format."""
    media_type, extension = FORMATS[file_format]
    chosen = [store.conversation(conversation_id)] if conversation_id else store.conversations()
    text = _WRITERS[file_format](store, chosen)
    name = _file_name(chosen[0].title) if conversation_id else f"medusa-chat-{datetime.now():%Y-%m-%d}"
    suffix = ".sharegpt" if file_format == "sharegpt" else ""
    return f"{name}{suffix}.{extension}", media_type, text


def _markdown(store: ConversationStore, conversations: Sequence[Conversation]) -> str:
    return "\n\n---\n\n".join(_markdown_one(item, store.thread(item.id)) for item in conversations) + "\n"


def _markdown_one(conversation: Conversation, messages: Sequence[Message]) -> str:
    title = " ".join((conversation.title or "Conversation").split())
    parts = [f"# {title}", f"*{_day(conversation.created_ms)}*"]
    system = str(conversation.settings.get("system") or "")
    if system:
        parts += ["## System", system]
    for message in messages:
        parts += [f"## {_MARKDOWN_NAMES[message.role]}", message.content or "*(empty)*"]
    return "\n\n".join(parts)


def _json(store: ConversationStore, conversations: Sequence[Conversation]) -> str:
    document = {
        "format": JSON_FORMAT,
        "version": JSON_VERSION,
        "exported": datetime.now(UTC).isoformat(timespec="seconds"),
        "conversations": [_json_one(item, store.messages(item.id)) for item in conversations],
    }
    return json.dumps(document, ensure_ascii=False, indent=1)


def _json_one(conversation: Conversation, messages: Sequence[Message]) -> dict[str, Any]:
    return {
        **{name: getattr(conversation, name) for name in _OF_CONVERSATION.split()},
        "messages": [{name: getattr(message, name) for name in _OF_MESSAGE.split()} for message in messages],
    }


def _sharegpt(store: ConversationStore, conversations: Sequence[Conversation]) -> str:
    return json.dumps([_sharegpt_one(store, item) for item in conversations], ensure_ascii=False, indent=1)


def _sharegpt_one(store: ConversationStore, conversation: Conversation) -> dict[str, Any]:
    """The shown branch: the format knows no others."""
    system = str(conversation.settings.get("system") or "")
    lines = [{"from": "system", "value": system}] if system else []
    lines += [
        {"from": _SHAREGPT_NAMES[message.role], "value": message.content}
        for message in store.thread(conversation.id)
        if message.content
    ]
    return {"id": f"{JSON_FORMAT}-{conversation.id}", "title": conversation.title, "conversations": lines}


def _day(time_ms: int) -> str:
    return f"{datetime.fromtimestamp(time_ms / 1000):%Y-%m-%d}"


def _file_name(title: str) -> str:
    """A name that every system takes."""
    words = re.sub(r"[^\w\s-]", "", title).split()
    return "-".join(words)[:50].strip("-._") or "conversation"


_WRITERS = {"markdown": _markdown, "json": _json, "sharegpt": _sharegpt}
