"""Prompts that a person gives for answering: plain text, one a line, or JSONL with "prompt" and perhaps "system"."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from engine.errors import InvalidParameterError

__all__ = ["Message", "PromptFile", "read_prompt_file"]

Message = dict[str, str]


@dataclass(frozen=True)
class PromptFile:
    """Prompts as chat messages, in the file's order; `digest` tells one file's content from another's."""

    prompts: list[list[Message]]
    digest: str


def read_prompt_file(path: Path) -> PromptFile:
    """Read a prompts file; raises InvalidParameterError with the line that is wrong."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameterError(f"The prompts file {path} cannot be read as UTF-8 text ({error}).") from error
    lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    if not lines:
        raise InvalidParameterError(f"The prompts file {path} holds no prompt; write one a line.")
    is_json = path.suffix in (".jsonl", ".json")
    prompts = [_record(line, f"Line {number} of {path}") if is_json else [_user(line)] for number, line in lines]
    return PromptFile(prompts, hashlib.sha256(content.encode()).hexdigest()[:16])


def _record(line: str, where: str) -> list[Message]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InvalidParameterError(f"{where} is not JSON ({error}).") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise InvalidParameterError(f'{where} is not an object such as {{"prompt": "..."}}.')
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise InvalidParameterError(f'{where} has a "system" that is not a string.')
    return [*([{"role": "system", "content": system}] if system else []), _user(record["prompt"])]


def _user(prompt: str) -> Message:
    return {"role": "user", "content": prompt.strip()}
