"""Answers from a server that speaks OpenAI's chat protocol, such as vLLM, llama.cpp or LM Studio.

So a model too large for the training process is distilled by an engine that serves it. Only its tokenizer is needed
here. Requests run in a few threads; whoever consumes the answers stays in one.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import islice
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from engine.errors import EngineError, InvalidParameterError

__all__ = ["ChatServer", "Question", "ServerAnswer", "ServerError", "ask_all"]

Message = dict[str, str]
_TIMEOUT_S = 300.0
_FIRST_WAIT_S, _LONGEST_WAIT_S, _TRIES = 0.5, 20.0, 6
_BUSY = (408, 409, 425, 429)  # with 5xx: worth another try


class ServerError(EngineError):
    """A server cannot be reached, refuses, or does not speak the protocol."""


@dataclass(frozen=True)
class Question:
    """A prompt and how to answer it; `source` is its number in its file."""

    source: int
    messages: Sequence[Message]
    temperature: float
    max_tokens: int


@dataclass(frozen=True)
class ServerAnswer:
    """`is_complete`: the model ended it; otherwise it ran into `max_tokens`."""

    question: Question
    text: str
    is_complete: bool


@dataclass(frozen=True)
class ChatServer:
    """Where to ask. `url` is the API's root, with or without /v1; `key` goes into the header and nowhere else."""

    url: str
    model: str = ""
    key: str | None = field(default=None, repr=False)
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InvalidParameterError(f"{self.url!r} is not a server; give one such as http://localhost:8000/v1.")
        root = self.url.rstrip("/")
        object.__setattr__(self, "url", root if root.endswith("/v1") else f"{root}/v1")

    def named(self) -> "ChatServer":
        """Return this server with the model it serves, asked for where none was named."""
        if self.model:
            return self
        models = self._json("models", None)
        try:
            name = models["data"][0]["id"]
        except (KeyError, IndexError, TypeError):
            raise ServerError(f"{self.url} names no model; name one with --server-model.") from None
        return ChatServer(self.url, str(name), self.key, self.sleep)

    def answer(self, question: Question) -> ServerAnswer:
        """Ask once, with retries while the server is busy; raises ServerError."""
        body = {
            "model": self.model,
            "messages": list(question.messages),
            "temperature": question.temperature,
            "max_tokens": question.max_tokens,
        }
        found = self._json("chat/completions", body)
        try:
            choice = found["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            text, reason = None, None
        if (text is not None and not isinstance(text, str)) or reason is None:
            raise ServerError(f"{self.url} answered with something that is no chat completion; check the address.")
        return ServerAnswer(question, text or "", reason == "stop")

    def _json(self, path: str, body: dict[str, Any] | None) -> Any:
        delay = _FIRST_WAIT_S
        for attempt in range(_TRIES):
            try:
                return self._request(path, body)
            except _Busy as busy:
                if attempt == _TRIES - 1:
                    raise ServerError(
                        f"{self.url} could not be asked in {_TRIES} tries ({busy}); check that the server runs and "
                        "has room, then give the same command again: it goes on."
                    ) from None
                self.sleep(max(delay, busy.wait_s))
                delay = min(2 * delay, _LONGEST_WAIT_S)
        raise AssertionError("the last try returns or raises")

    def _request(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(f"{self.url}/{path}", data, headers), timeout=_TIMEOUT_S) as reply:
                content = reply.read()
        except HTTPError as error:
            with error:
                if error.code in _BUSY or error.code >= 500:
                    raise _Busy(f"HTTP {error.code}", _retry_after(error)) from None
                raise ServerError(self._refusal(error)) from None
        except (URLError, TimeoutError, ConnectionError, HTTPException) as error:
            raise _Busy(str(getattr(error, "reason", "") or error) or type(error).__name__) from None
        try:
            return json.loads(content)
        except ValueError:
            raise ServerError(f"{self.url} did not answer in JSON; check the address.") from None

    def _refusal(self, error: HTTPError) -> str:
        said = " ".join(error.read(400).decode("utf-8", "replace").split())
        if self.key:
            said = said.replace(self.key, "…")
        remedy = "give a key with --api-key-env" if error.code in (401, 403) else "check the address and --server-model"
        return f"{self.url} refused with HTTP {error.code} ({said[:200]}); {remedy}."


class _Busy(Exception):
    """Worth another try, not before `wait_s` seconds."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


def ask_all(server: ChatServer, questions: Iterable[Question], at_once: int) -> Iterator[ServerAnswer]:
    """Yield answers as they come, `at_once` requests under way; the first failure ends it and is raised."""
    waiting = iter(questions)
    pool = ThreadPoolExecutor(at_once)
    asked = {pool.submit(server.answer, question) for question in islice(waiting, at_once)}
    try:
        while asked:
            done, asked = wait(asked, return_when=FIRST_COMPLETED)
            asked |= {pool.submit(server.answer, question) for question in islice(waiting, len(done))}
            for answered in done:
                yield answered.result()
    finally:  # without waiting: what has come is to be kept before requests of minutes run out
        pool.shutdown(wait=False, cancel_futures=True)


def _retry_after(error: HTTPError) -> float:
    try:
        return min(float(error.headers.get("Retry-After", 0)), _LONGEST_WAIT_S)
    except ValueError:  # a date
        return _LONGEST_WAIT_S
