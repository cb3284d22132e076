"""Search over titles and messages: words as they are typed, each taken literally, the last ones as beginnings.

Hits carry their marks as two control characters, which the page turns into elements; nothing here is markup.
"""

from dataclasses import dataclass

from app.database import DataFile

__all__ = ["MARK_END", "MARK_START", "Hit", "search"]

MARK_START, MARK_END = "\x02", "\x03"
SNIPPET_WORDS = 14
MAX_HITS = 60


@dataclass(frozen=True)
class Hit:
    """A conversation that was found: by its title (`message_id` None) or by a message; texts hold the marks."""

    conversation_id: str
    message_id: str | None
    title: str
    snippet: str
    updated_ms: int


def search(store: DataFile, text: str) -> list[Hit]:
    """Conversations that hold all words of `text` in their title or in one message: titles first, then best match."""
    query = _quoted(text)
    if not query:
        return []
    titles = store.rows(_TITLES_SQL, [MARK_START, MARK_END, query, MAX_HITS])
    found = {row["id"]: Hit(row["id"], None, row["title"], "", row["updated_ms"]) for row in titles}
    for row in store.rows(_MESSAGES_SQL, [MARK_START, MARK_END, SNIPPET_WORDS, query, MAX_HITS]):
        known = found.get(row["id"])
        if known is None:
            found[row["id"]] = Hit(row["id"], row["message_id"], row["title"], row["snippet"], row["updated_ms"])
        elif known.message_id is None:
            found[row["id"]] = Hit(row["id"], row["message_id"], known.title, row["snippet"], row["updated_ms"])
    return list(found.values())[:MAX_HITS]


def _quoted(text: str) -> str:
    """Each word as a quoted prefix, so that nothing in it is an operator of the query language."""
    words = text.replace("\x00", " ").split()
    return " ".join('"' + word.replace('"', '""') + '"*' for word in words if any(map(str.isalnum, word)))


_TITLES_SQL = """
SELECT conversations.id, conversations.updated_ms, highlight(conversations_search, 0, ?, ?) AS title
FROM conversations_search JOIN conversations ON conversations.num = conversations_search.rowid
WHERE conversations_search MATCH ? AND conversations.deleted_ms IS NULL
ORDER BY conversations.updated_ms DESC LIMIT ?
"""

_MESSAGES_SQL = """
SELECT conversations.id, conversations.title, conversations.updated_ms, messages.id AS message_id,
       snippet(messages_search, 0, ?, ?, '…', ?) AS snippet
FROM messages_search JOIN messages ON messages.num = messages_search.rowid
     JOIN conversations ON conversations.id = messages.conversation_id
WHERE messages_search MATCH ? AND conversations.deleted_ms IS NULL
ORDER BY rank LIMIT ?
"""
