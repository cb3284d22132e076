"""A conversation's title, asked of the model after its first answer, and cleaned of what small models add to it."""

import re
from collections.abc import Iterable

from engine import SamplingParams

__all__ = ["TITLE_PARAMS", "clean_title", "title_prompt"]

MAX_WORDS, MAX_LENGTH = 9, 60
EXCERPT = 600
TITLE_PARAMS = SamplingParams(max_tokens=24, stop=("\n",))  # one line, always the likeliest
# Without examples a small model answers the question instead of naming it.
_EXAMPLES = (
    ("How do I get red wine out of a white shirt?", "Removing red wine stains"),
    ("Write a poem about the sea in winter.", "Poem about the winter sea"),
    ("What is the difference between a list and a tuple in Python?", "Python lists and tuples"),
)
_LEAD = re.compile(r"^\s*(?:(?:here(?:'s| is)|sure)\b[^:]*:|(?:the\s+)?title\s*(?::|is\b))\s*", re.IGNORECASE)
_EDGES = " \t\"'`*_#.,:;-–—“”‘’«»"
_REFUSAL = re.compile(r"\b(?:i'm sorry|i am sorry|i cannot|i can't|as an ai)\b", re.IGNORECASE)


def title_prompt(question: str) -> list[dict[str, str]]:
    """The request for a title; the question alone, because an answer would fill a small model's attention."""
    prompt = [{"role": "system", "content": "You write the title of a conversation: three to six words, nothing else."}]
    for text, title in (*_EXAMPLES, (question[:EXCERPT], None)):
        prompt.append({"role": "user", "content": f"The conversation begins with: {text}"})
        if title is not None:
            prompt.append({"role": "assistant", "content": title})
    return prompt


def clean_title(pieces: Iterable[str]) -> str | None:
    """The title in what the model wrote; None where that is none (empty, a refusal, a whole sentence)."""
    lines = "".join(pieces).strip().splitlines()
    line = _LEAD.sub("", lines[0]).strip(_EDGES) if lines else ""
    if not line or _REFUSAL.search(line) or len(line.split()) > MAX_WORDS or len(line) > MAX_LENGTH:
        return None
    return line
