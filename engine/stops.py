"""Stop strings: text and tokens wait here until it is certain that no stop string begins in them.

Tokens come one at a time, whatever the size of the steps that brought them, so the place where an answer ends does not
depend on drafting. Knows no tokenizer.
"""

from collections.abc import Sequence

__all__ = ["StopBuffer"]


class StopBuffer:
    """The end of a growing answer. `is_found` once a stop string was completed; what follows its beginning is gone."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.is_found = False
        self._stops = tuple(stops)
        self._text = ""
        self._released = 0  # characters given out before `_text`
        self._end_given_out = 0  # where the last token that was given out ends
        self._waiting: list[tuple[int, int]] = []  # tokens, and where in the answer's text each ends

    def feed(self, token: int, text: str) -> None:
        """Take a token and the characters that it completes."""
        self._text += text
        self._waiting.append((token, self._released + len(self._text)))
        found = [place for stop in self._stops if (place := self._text.find(stop)) >= 0]
        if found:
            self.is_found = True
            self._text = self._text[: min(found)]

    def release(self, is_over: bool = False) -> tuple[str, list[int]]:
        """Return the text and the tokens that are certain now; all that is left where the answer `is_over`.

        A token is given out with the last of its characters: one that a stop string begins in never is.
        """
        ready = len(self._text) if is_over else len(self._text) - self._num_doubtful()
        text, self._text = self._text[:ready], self._text[ready:]
        self._released += ready
        count = self._num_certain(is_over)
        tokens = [token for token, _ in self._waiting[:count]]
        del self._waiting[:count]
        return text, tokens

    def _num_doubtful(self) -> int:
        """Characters at the end that a stop string may begin with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for count in range(min(longest, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-count:]) for stop in self._stops):
                return count
        return 0

    def _num_certain(self, is_over: bool) -> int:
        if not self._stops or (is_over and not self.is_found):
            return len(self._waiting)
        # A token that completes no character belongs to one that comes later, which may begin a stop string.
        count, end_before = 0, self._end_given_out
        for index, (_, end) in enumerate(self._waiting):
            if end > self._released:
                break
            if end > end_before:
                count = index + 1
            end_before = end
        if count:
            self._end_given_out = self._waiting[count - 1][1]
        return count
