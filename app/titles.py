"""A conversation's title, asked of the model after its first answer, and cleaned of what small models add to it."""

import re
from collections.abc import Iterable

from engine import SamplingParams

__all__ = ["TITLE_PARAMS", "clean_title", "title_prompt"]

MAX_WORDS, MAX_LENGTH = 9, 60
EXCERPT = 600
TITLE_PARAMS = SamplingParams(max_tokens=24, stop=("\n",))  # one line, always the likeliest
_LEAD = re.compile(r"^\s*(?:(?:here(?:'s| is)|sure)\b[^:]*:|(?:the\s+)?title\s*(?::|is\b))\s*", re.IGNORECASE)
_EDGES = " \t\"'`*_#.,:;-–—“”‘’«»"
_REFUSAL = re.compile(r"\b(?:i'm sorry|i am sorry|i cannot|i can't|as an ai)\b", re.IGNORECASE)


def title_prompt(question: str) -> list[dict[str, str]]:
    """The request for a title; the question alone, because an answer would fill a small model's attention."""
    return [
        {"role": "system", "content": "You write short titles. Reply with the title only, three to six words."},
        {"role": "user", "content": f"Write a title for a conversation that begins with:\n\n{question[:EXCERPT]}"},
    ]


def clean_title(pieces: Iterable[str]) -> str | None:
    """The title in what the model wrote; None where that is none (empty, a refusal, a whole sentence)."""
    lines = "".join(pieces).strip().splitlines()
    line = _LEAD.sub("", lines[0]).strip(_EDGES) if lines else ""
    if not line or _REFUSAL.search(line) or len(line.split()) > MAX_WORDS or len(line) > MAX_LENGTH:
        return None
    return line
