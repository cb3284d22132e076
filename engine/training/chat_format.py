"""The token ids around each turn, read off a model's own chat template.

A template is rendered once over marked messages and cut at the marks; what is between them is what has to stand between
a system line, a query and an answer. Only templates that end every turn with the same end token can be written by the
model itself from both sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import InvalidParameterError
from engine.models.tokenizer import ChatTokenizer

__all__ = ["ChatFormat", "read_chat_format"]

_MARKS = ("@@S@@", "@@U1@@", "@@A1@@", "@@U2@@")


@dataclass(frozen=True)
class ChatFormat:
    """Ids before a query and before an answer.

    `default_opening`: what stands before the first query when no system line is given. `system_start` + a line +
    `system_end` is the opening with one. `to_answer` and `to_query` follow the end token of a turn.
    """

    end_token: int
    default_opening: tuple[int, ...]
    system_start: tuple[int, ...]
    system_end: tuple[int, ...]
    to_answer: tuple[int, ...]
    to_query: tuple[int, ...]

    def opening(self, line: Sequence[int] | None) -> list[int]:
        """Return the ids before the first query, with a system line of one's own or the template's."""
        if line is None:
            return list(self.default_opening)
        return [*self.system_start, *line, *self.system_end]

    def prompt(self, opening: Sequence[int], query: Sequence[int]) -> list[int]:
        """Return a complete prompt for one query (without its end token)."""
        return [*opening, *query, self.end_token, *self.to_answer]


def read_chat_format(tokenizer: ChatTokenizer) -> ChatFormat:
    """Cut the template; raises InvalidParameterError where turns do not end with one end token of their own."""
    system, user, answer, follow_up = _MARKS
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": user},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": follow_up},
    ]
    rest = tokenizer.render_chat(messages)
    pieces = []
    for mark in _MARKS:
        piece, _, rest = rest.partition(mark)
        pieces.append(tokenizer.encode(piece))
    start, system_end, to_answer, to_query = pieces
    opening = tokenizer.encode(tokenizer.render_chat(messages[1:2]).partition(user)[0])
    if not to_answer or not to_query or to_answer[0] != to_query[0] or to_answer[0] not in tokenizer.end_token_ids:
        raise InvalidParameterError(
            "This model's chat template does not end user turns with an end token, so the model cannot write queries; "
            "give --prompts with a file of queries."
        )
    return ChatFormat(
        to_answer[0], tuple(opening), tuple(start), tuple(system_end), tuple(to_answer[1:]), tuple(to_query[1:])
    )
