"""What of a conversation goes into the prompt: everything that fits, and otherwise without the oldest turns.

Nothing is left out silently: the number of messages that were is kept with the answer and shown above it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

__all__ = ["Messages", "Prompt", "answer_reserve", "fit_prompt"]

Messages = Sequence[dict[str, str]]


def answer_reserve(max_context: int, max_tokens: int) -> int:
    """Tokens kept free for the answer: what it may take, but at most a quarter of the context."""
    return min(max_tokens, max_context // 4)


class Prompt(NamedTuple):
    """What an answer starts from; `left_out` counts the oldest messages that are not in it."""

    messages: list[dict[str, str]]
    left_out: int
    tokens: int


def fit_prompt(
    system: Messages, turns: Messages, count: Callable[[Messages], int], limit: int, already_out: int = 0
) -> Prompt:
    """Make the prompt of `turns` that is at most `limit` tokens long.

    `already_out` is what the answer before left out: as long as that fits, the prompt begins as the last one did, and
    what the engine has cached of it is of use. Where more has to go, a quarter of the room is made at once, for the
    same reason. A prompt begins with a user's message, and the last one always stays.
    """
    starts = [index for index, turn in enumerate(turns) if turn["role"] == "user"] or [0]

    def prompt_from(start: int) -> Prompt:
        messages = [*system, *turns[start:]]
        return Prompt(messages, start, count(messages))

    kept = max((start for start in starts if 0 < start <= already_out), default=0)
    prompt = prompt_from(kept)
    if prompt.tokens <= limit:
        return prompt
    for start in starts:
        if start > kept:
            prompt = prompt_from(start)
            if prompt.tokens <= limit * 3 // 4:
                break
    return prompt
