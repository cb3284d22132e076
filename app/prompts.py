"""Prompts from the command line and from files of one JSON object a line, checked before a model is loaded.

Standard library only. It knows nothing of engines.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BadInputError", "Question", "checked_question", "read_questions"]


class BadInputError(ValueError):
    """What a person gave cannot be used; the message is one sentence for them."""


@dataclass(frozen=True)
class Question:
    """One prompt, with the system text that goes before it (None leaves it out)."""

    prompt: str
    system: str | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*before, {"role": "user", "content": self.prompt}]


def checked_question(prompt: object, system: object, where: str) -> Question:
    """Return a Question, or raise BadInputError; `where` begins the message ("The command line", "Line 3 of ...")."""
    if not isinstance(prompt, str):
        raise BadInputError(f'{where} needs a "prompt" that is a string; it is {_shown(prompt)}.')
    if not prompt.strip():
        raise BadInputError(f"{where} has an empty prompt; write what the model is to answer.")
    if system is not None and not isinstance(system, str):
        raise BadInputError(f'{where} has a "system" that is not a string but {_shown(system)}.')
    for text in (prompt, system or ""):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise BadInputError(f"{where} holds bytes that are not UTF-8 text; save or type it as UTF-8.")
    return Question(prompt, system)


def read_questions(path: Path, system: str | None = None) -> list[Question]:
    """Read one question a line; a line's own "system" goes before `system`. Blank lines are passed over."""
    try:
        questions = list(_questions(path, system))
    except OSError as error:
        raise BadInputError(f"The prompts file {path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise BadInputError(f"The prompts file {path} is not UTF-8 text; save it as UTF-8.") from error
    if not questions:
        raise BadInputError(f'The prompts file {path} holds no prompt; it needs one {{"prompt": "..."}} a line.')
    return questions


def _questions(path: Path, system: str | None) -> Iterator[Question]:
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parse_line(line, f"Line {number} of {path}", system)


def _parse_line(line: str, where: str, system: str | None) -> Question:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{where} is not JSON ({error}).") from error
    if not isinstance(record, dict):
        raise BadInputError(f'{where} is not an object such as {{"prompt": "..."}} but {_shown(record)}.')
    return checked_question(record.get("prompt"), record.get("system", system), where)


def _shown(value: object) -> str:
    if value is None:
        return "missing"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
