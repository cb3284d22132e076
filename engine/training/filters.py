"""Which invented queries and answers are worth keeping: no duplicates, no junk, nothing close to held-out prompts."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["QueryFilter", "repetition"]

_WORD = re.compile(r"[a-z0-9]+")


class QueryFilter:
    """Accepts a query once; `held_out` prompts and their near copies are never accepted."""

    MIN_CHARS, MAX_CHARS = 8, 700
    NEAR = 0.6  # shared words / all words from which two queries count as the same

    def __init__(self, held_out: Iterable[str] = ()) -> None:
        self._held_out = [frozenset(_words(prompt)) for prompt in held_out]
        self._seen: set[int] = set()

    def accept(self, query: str) -> bool:
        """Return whether to keep `query`, and remember it if so."""
        words = _words(query)
        key = hash(" ".join(words))
        if key in self._seen or not self._is_sound(query, words) or self.is_near_held_out(words):
            return False
        self._seen.add(key)
        return True

    def remember(self, query: str) -> None:
        """Count a query of an earlier run as seen."""
        self._seen.add(hash(" ".join(_words(query))))

    def is_held_out(self, query: str) -> bool:
        """Return whether `query` is a held-out prompt, nearly."""
        return self.is_near_held_out(_words(query))

    def is_near_held_out(self, words: Sequence[str]) -> bool:
        """Return whether the words are those of a held-out prompt, nearly."""
        own = frozenset(words)
        return any(len(own & other) >= self.NEAR * len(own | other) for other in self._held_out)

    def _is_sound(self, query: str, words: Sequence[str]) -> bool:
        letters = sum(char.isalpha() or char.isspace() for char in query)
        return (
            self.MIN_CHARS <= len(query.strip()) <= self.MAX_CHARS
            and len(words) >= 3
            and letters >= 0.5 * len(query)
            and repetition(words, 4) < 0.3
        )


def repetition(items: Sequence[object], size: int) -> float:
    """Return the share of n-grams of `size` that occurred before in the same sequence."""
    grams = [tuple(items[start : start + size]) for start in range(len(items) - size + 1)]
    return 1 - len(Counter(grams)) / len(grams) if grams else 0.0


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
