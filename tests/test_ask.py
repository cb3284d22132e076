"""Answers in the terminal: what goes to which stream, the JSON contract, prompts files, Ctrl+C."""

import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_engine import INFO, FakeEngine

from app.ask import answer_all, as_json
from app.cli_ask import stop_on_interrupt
from app.prompts import BadInputError, Question, checked_question, read_questions
from engine import EngineError, SamplingParams

KEYS = [
    "text",
    "tokens",
    "prompt_tokens",
    "generated_tokens",
    "finish_reason",
    "medusa",
    "steps",
    "tokens_per_step",
    "acceptance_by_depth",
    "tree_nodes",
    "tokens_per_second",
    "time_to_first_token_ms",
    "device",
    "weights",
    "seed",
]


def answers(
    engine: FakeEngine, *questions: Question, json_lines: bool, stop: threading.Event | None = None, **settings: object
) -> tuple[str, str]:
    out, log = io.StringIO(), io.StringIO()
    params = SamplingParams(**settings)
    answer_all(engine, questions, params, stop=stop or threading.Event(), out=out, log=log, json_lines=json_lines)
    return out.getvalue(), log.getvalue()


def test_text_streams_to_out_and_speed_to_log() -> None:
    out, log = answers(FakeEngine(), Question("echo:to be or not"), json_lines=False)
    assert out == "to be or not\n"
    assert "tok/step · 4 tokens" in log


def test_json_has_exactly_the_promised_keys() -> None:
    out, log = answers(FakeEngine(), Question("echo:zwei Wörter"), json_lines=True, seed=5)
    record = json.loads(out)
    assert list(record) == KEYS
    assert (record["text"], record["generated_tokens"], record["seed"]) == ("zwei Wörter", 2, 5)
    assert len(record["tokens"]) == 2
    assert log == ""


def test_answers_come_in_order_with_each_line_s_system() -> None:
    engine = FakeEngine()
    out, _ = answers(engine, Question("echo:one"), Question("echo:two", "Be brief."), json_lines=True)
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["one", "two"]
    assert [[message["role"] for message in messages] for messages, _ in engine.requests] == [
        ["user"],
        ["system", "user"],
    ]


def test_missing_heads_are_told_and_medusa_is_reported_off() -> None:
    info = dataclasses.replace(INFO, has_heads=False, heads_reason="no heads were made for it")
    out, log = answers(FakeEngine(info=info), Question("echo:a b"), json_lines=True)
    assert json.loads(out)["medusa"] is False
    assert log == "Medusa is off: no heads were made for it\n"
    _, log = answers(FakeEngine(info=info), Question("echo:a b"), json_lines=True, medusa=False)
    assert log == ""


def test_stop_ends_after_the_partial_answer() -> None:
    class Stopping(FakeEngine):
        def stream(self, messages, params, stop=None):
            for chunk in super().stream(messages, params, stop):
                stop.set()
                yield chunk

    stop = threading.Event()
    engine = Stopping()
    out, _ = answers(engine, Question("first"), Question("second"), json_lines=True, stop=stop)
    record = json.loads(out)
    assert record["finish_reason"] == "cancelled"
    assert record["generated_tokens"] == 1
    assert len(engine.requests) == 1


def test_engine_errors_pass_through_after_earlier_answers() -> None:
    failing = FakeEngine(fail_after=1, error=EngineError("The prompt is too long."))
    with pytest.raises(EngineError, match="too long"):
        answers(failing, Question("x"), json_lines=True)


def test_json_refuses_what_json_does_not_have() -> None:
    *_, last = FakeEngine().stream([{"role": "user", "content": "echo:a"}], SamplingParams())
    assert last.result is not None
    with pytest.raises(ValueError, match="JSON"):
        as_json(dataclasses.replace(last.result, tokens_per_second=math.inf))


def test_first_ctrl_c_stops_and_the_second_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


NOISY = """
import os, sys
from app.cli_ask import answers_only
print("before")
with answers_only() as out:
    print("from Python")
    os.write(1, b"from C\\n")
    out.write("answer \\u00fc\\n")
print("after")
"""


def test_what_libraries_print_goes_to_standard_error() -> None:
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", NOISY], capture_output=True, env=environ, check=True)
    assert ended.stdout.decode().splitlines() == ["before", "answer ü", "after"]
    assert sorted(ended.stderr.decode().splitlines()) == ["from C", "from Python"]


def test_prompts_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "one", "id": 7}', "", '{"prompt": "two\u2028lines", "system": "S"}']
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_questions(path) == [Question("one"), Question("two\u2028lines", "S")]
    assert read_questions(path, "Default")[0] == Question("one", "Default")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', "Line 2 of .* is not JSON"),
        (b'{"prompt": "a"}\n\n["b"]\n', "Line 3 of .* is not an object"),
        (b'{"text": "a"}\n', 'Line 1 .* needs a "prompt" that is a string; it is missing'),
        (b'{"prompt": 5}\n', "it is 5"),
        (b'{"prompt": "  "}\n', "Line 1 .* empty prompt"),
        (b'{"prompt": "a", "system": 1}\n', 'has a "system"'),
        (b'{"prompt": "\\ud800"}\n', "not UTF-8"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"\n\n", "holds no prompt"),
    ],
)
def test_bad_prompts_file_names_the_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=words) as caught:
        read_questions(path)
    assert "\n" not in str(caught.value)


def test_unreadable_prompts_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(BadInputError, match="cannot be read") as caught:
            read_questions(path)
        assert str(path) in str(caught.value)


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(BadInputError, match="UTF-8"):
        checked_question(b"caf\xe9".decode("utf-8", "surrogateescape"), None, "The command line")
