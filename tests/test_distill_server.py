"""`distill --server`: answers of an OpenAI-compatible server, its refusals and pauses, and going on after a stop."""

import argparse
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app import cli_distill
from engine.models.loader import open_model
from engine.training.server_answers import ChatServer, Question, ServerError, ask_all
from engine.training.shards import read_documents, read_index

PROMPTS = ["Name a river in Spain.", "What do owls eat at night?", "How is paper made from wood?", "Who painted walls?"]
Reply = tuple[int, Any, dict[str, str]]


class Served:
    """A server in this process; `reply` makes each chat answer from the request's JSON."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.reply: Callable[[dict[str, Any]], Reply] = lambda body: says("A short answer.")
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send((200, {"data": [{"id": "big-model"}]}, {}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                served.asked.append(body)
                served.keys.append(self.headers.get("Authorization"))
                self._send(served.reply(body))

            def _send(self, reply: Reply) -> None:
                status, content, headers = reply
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def questions(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.asked]


def says(text: str | None, reason: str = "stop") -> Reply:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason}]}, {}


@pytest.fixture
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def distill(line: str) -> int:
    parser = argparse.ArgumentParser()
    cli_distill.add_arguments(parser)
    return cli_distill.run(parser.parse_args(line.split()))


def impatient(url: str, waits: list[float], key: str | None = None) -> ChatServer:
    return ChatServer(url, "big-model", key, waits.append)


def question(text: str = "Why?") -> Question:
    return Question(0, [{"role": "user", "content": text}], 0.0, 16)


def test_answers_become_documents(served: Served, prompts: Path, tmp_path: Path) -> None:
    served.reply = lambda body: says("It runs on", "length") if "paper" in str(body) else says("An answer.")
    assert distill(f"--out {tmp_path}/data --prompts {prompts} --server {served.url} --max-answer 20 --slots 2") == 0
    tokenizer = open_model("bundled").tokenizer
    documents = {document.source: document for document in read_documents(tmp_path / "data")}
    assert sorted(documents) == [0, 1, 2, 3] and sorted(served.questions()) == sorted(PROMPTS)
    for number, document in documents.items():
        (start, stop), prompt = document.spans[0], tokenizer.encode_chat([{"role": "user", "content": PROMPTS[number]}])
        assert list(document.tokens[:start]) == prompt and stop == len(document.tokens)
        is_cut = number == 2
        assert tokenizer.decode(document.tokens[start:]) == ("It runs on" if is_cut else "An answer.")
        assert (document.tokens[-1] in tokenizer.end_token_ids) is not is_cut
    assert {body["model"] for body in served.asked} == {"big-model"}
    asked = {body["messages"][-1]["content"]: body["temperature"] for body in served.asked}
    assert all((asked[PROMPTS[number]] == 0) is document.is_greedy for number, document in documents.items())


def test_bad_answers_are_dropped_and_not_asked_for_again(served: Served, prompts: Path, tmp_path: Path) -> None:
    texts = {PROMPTS[0]: "so " * 60, PROMPTS[1]: "fine<|im_end|>more", PROMPTS[2]: "", PROMPTS[3]: "Nobody knows."}
    served.reply = lambda body: says(texts[body["messages"][-1]["content"]])
    line = f"--out {tmp_path}/data --prompts {prompts} --server {served.url}"
    assert distill(line) == 0
    assert [document.source for document in read_documents(tmp_path / "data")] == [3]
    assert sorted((read_index(tmp_path / "data") or {})["rejected"]) == [0, 1, 2]
    assert distill(line) == 0
    assert len(served.asked) == 4


def test_a_server_that_dies_costs_nothing_that_came(
    served: Served, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    served.reply = lambda body: says("Yes.") if len(served.asked) < 3 else (400, {"error": "no such thing"}, {})
    line = f"--out {tmp_path}/data --prompts {prompts} --server {served.url} --slots 1"
    assert distill(line) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "HTTP 400" in said and "no such thing" in said
    assert len(list(read_documents(tmp_path / "data"))) == 2
    served.reply = lambda body: says("Yes.")
    assert distill(line) == 0
    assert len(list(read_documents(tmp_path / "data"))) == 4
    assert sorted(served.questions()[:2] + served.questions()[3:]) == sorted(PROMPTS)


def test_another_server_or_prompts_are_refused(
    served: Served, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    line = f"--out {tmp_path}/data --server {served.url}"
    assert distill(f"{line} --prompts {prompts}") == 0
    assert distill(f"{line} --prompts {prompts} --server-model other") == 2
    assert "big-model" in (said := capsys.readouterr().err) and "other" in said
    prompts.write_text("Something else entirely?")
    assert distill(f"{line} --prompts {prompts}") == 2
    assert "other prompts" in capsys.readouterr().err


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(served: Served, status: int) -> None:
    waits: list[float] = []
    served.reply = lambda body: (status, {}, {"Retry-After": "7"}) if len(served.asked) < 3 else says("At last.")
    assert impatient(served.url, waits).answer(question()).text == "At last."
    assert waits == [7.0, 7.0]


def test_a_server_that_stays_busy_or_is_not_there_is_one_sentence(served: Served) -> None:
    waits: list[float] = []
    served.reply = lambda body: (500, {}, {})
    with pytest.raises(ServerError, match=r"6 tries \(HTTP 500\)"):
        impatient(served.url, waits).answer(question())
    assert waits == sorted(waits) and len(waits) == 5
    served.http.shutdown()
    served.http.server_close()
    with pytest.raises(ServerError, match="check that the server runs"):
        impatient(served.url, waits).answer(question())


@pytest.mark.parametrize(
    "content", [b"<html>", {"object": "list"}, {"choices": []}, ["x"], {"choices": [{"message": 1}]}]
)
def test_what_is_no_chat_completion_is_refused(served: Served, content: object) -> None:
    served.reply = lambda body: (200, content, {})
    with pytest.raises(ServerError, match="check the address"):
        impatient(served.url, []).answer(question())


def test_the_key_is_sent_and_never_told(served: Served) -> None:
    assert impatient(served.url, [], "sesame-123").answer(question()).is_complete
    assert served.keys == ["Bearer sesame-123"]
    served.reply = lambda body: (401, {"error": "sesame-123 is wrong"}, {})
    server = impatient(served.url, [], "sesame-123")
    with pytest.raises(ServerError) as caught:
        server.answer(question())
    assert "sesame-123" not in f"{caught.value} {server!r}" and "--api-key-env" in str(caught.value)


def test_only_so_many_requests_are_under_way(served: Served) -> None:
    gate, under_way, most = threading.Lock(), 0, 0
    full = threading.Barrier(3, timeout=10)

    def reply(body: dict[str, Any]) -> Reply:
        nonlocal under_way, most
        with gate:
            under_way += 1
            most = max(most, under_way)
        full.wait()  # three are let in together, or the test fails
        with gate:
            under_way -= 1
        return says("Yes.")

    served.reply = reply
    questions = [Question(number, question().messages, 0.0, 8) for number in range(9)]
    answers = list(ask_all(impatient(served.url, []), questions, 3))
    assert sorted(answer.question.source for answer in answers) == list(range(9)) and most == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--server http://localhost:1", "add --prompts FILE"),
        ("--prompts {prompts} --server localhost:8000", "is not a server"),
        ("--prompts {prompts} --server http://localhost:1 --api-key-env NO_SUCH_KEY", "NO_SUCH_KEY is empty"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture, words: str, said: str
) -> None:
    assert distill(f"--out {tmp_path}/data {words.format(prompts=prompts)}") == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1
