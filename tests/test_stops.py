"""Where answers end: stop strings across and inside tokens, end tokens inside accepted runs, what is left behind."""

import random
import threading
import time
from collections.abc import Sequence

import pytest

from engine import Engine, GenerationChunk, InvalidParameterError, SamplingParams
from engine.answer import AnswerRecord
from engine.models.loader import LoadedModel
from engine.records import DecodeStep
from engine.stops import StopBuffer

QUESTION = [{"role": "user", "content": "Name three colours and say where one sees them."}]


def run(pieces: Sequence[str], stops: Sequence[str], step: int) -> tuple[str, list[int], list[str]]:
    """Feed numbered pieces, asking for what is certain every `step` pieces; return text, tokens and the releases."""
    buffer, texts, tokens = StopBuffer(stops), [], []
    for number, piece in enumerate(pieces):
        buffer.feed(number, piece)
        if buffer.is_found:
            break
        if number % step == step - 1:
            text, kept = buffer.release()
            texts.append(text)
            tokens += kept
    text, kept = buffer.release(is_over=True)
    return "".join([*texts, text]), tokens + kept, texts


def reference(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, list[int]]:
    """Join everything, piece after piece, and look for a stop string each time."""
    text = ""
    for number, piece in enumerate(pieces):
        text += piece
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            cut, tokens, end = min(places), [], 0
            for token in range(number + 1):
                end += len(pieces[token])
                if end <= cut:
                    tokens.append(token)
            while tokens and pieces[tokens[-1]] == "":
                tokens.pop()
            return text[:cut], tokens
    return text, list(range(len(pieces)))


def test_a_cut_is_where_a_stop_string_begins_for_any_pieces_and_steps() -> None:
    draw, cuts = random.Random(4), 0
    for _ in range(3000):
        pieces = ["".join(draw.choices("ab", k=draw.choice([0, 1, 1, 2, 4]))) for _ in range(draw.randrange(1, 12))]
        stops = ["".join(draw.choices("ab", k=draw.choice([1, 2, 4, 6]))) for _ in range(draw.randrange(1, 3))]
        want = reference(pieces, stops)
        cuts += want[1] != list(range(len(pieces)))
        for step in (1, 3, 100):
            text, tokens, _ = run(pieces, stops, step)
            assert (text, tokens) == want, (pieces, stops, step)
    assert 500 < cuts < 2900


def test_text_waits_only_while_a_stop_string_may_have_begun() -> None:
    text, _, releases = run(["One ", "E", "N", "T ", "E", "ND", "more"], ["END"], 1)
    assert releases == ["One ", "", "", "ENT ", ""]
    assert text == "One ENT "
    assert run(["a", "b"], [], 1)[2] == ["a", "b"]


def record(bundled: LoadedModel, *stops: str, max_tokens: int = 100) -> AnswerRecord:
    return AnswerRecord(bundled.tokenizer, max_tokens, time.perf_counter(), stops)


def step_of(*tokens: int) -> DecodeStep:
    return DecodeStep(tokens, len(tokens) - 1, tuple(range(len(tokens))), tokens, (-1,) * len(tokens), (), 1.0)


def test_an_end_token_inside_an_accepted_run_ends_there(bundled: LoadedModel) -> None:
    answer = record(bundled)
    words = bundled.tokenizer.encode("one two three four")
    answer.first(words[0])
    chunk = answer.add(step_of(words[1], 2, *words[2:]))
    assert (chunk.tokens, answer.finish_reason, answer.tokens) == ((words[1],), "stop", words[:2])


def test_a_stop_string_inside_an_accepted_run_cuts_text_and_tokens(bundled: LoadedModel) -> None:
    tokens = bundled.tokenizer.encode("one two three four")
    answer = record(bundled, "wo th")  # begins inside " two"
    first, second = answer.first(tokens[0]), answer.add(step_of(*tokens[1:]))
    assert first.text + second.text == "one t"
    assert (first.tokens, second.tokens, answer.finish_reason) == ((tokens[0],), (), "stop")


def test_a_stop_string_of_many_bytes_is_found_across_tokens(bundled: LoadedModel) -> None:
    tokens = bundled.tokenizer.encode("ab🦜🦚cd")
    assert len(tokens) > 5  # the birds' bytes are several tokens each
    answer = record(bundled, "🦚")
    chunks = [answer.first(tokens[0])]
    chunks += [answer.add(step_of(token)) for token in tokens[1:] if not answer.finish_reason]
    assert "".join(chunk.text for chunk in chunks) == "ab🦜"
    assert bundled.tokenizer.decode(answer.tokens) == "ab🦜"


def test_waiting_text_is_given_out_when_the_answer_ends_otherwise(bundled: LoadedModel) -> None:
    tokens = bundled.tokenizer.encode("one two")
    by_length = record(bundled, " two three", max_tokens=2)
    by_length.first(tokens[0])
    assert by_length.add(step_of(tokens[1])).text == " two"
    assert (by_length.finish_reason, by_length.tokens) == ("length", tokens)
    by_token = record(bundled, " two three")
    by_token.first(tokens[0])
    assert by_token.add(step_of(tokens[1])).text == ""
    assert by_token.add(step_of(2)).text == " two"


def collect(engine: Engine, **settings: object) -> list[GenerationChunk]:
    chunks = list(engine.stream(QUESTION, SamplingParams(max_tokens=60, **settings)))  # type: ignore[arg-type]
    result = chunks[-1].result
    assert result is not None
    assert result.text == "".join(chunk.text for chunk in chunks)
    assert result.tokens == tuple(token for chunk in chunks for token in chunk.tokens)
    return chunks


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_stop_string_leaves_nothing_behind(engine: Engine, temperature: float) -> None:
    settings = {"temperature": temperature, "seed": 3}
    whole = collect(engine, **settings)[-1].result
    assert whole is not None
    middle = len(whole.text) // 2
    for start, length in ((20, 1), (middle, 6), (middle + 7, 12)):
        stop = whole.text[start : start + length]
        for medusa in (True, False):
            result = collect(engine, medusa=medusa, stop=(stop,), **settings)[-1].result
            assert result is not None
            assert result.text == whole.text[: whole.text.find(stop)]
            assert (result.finish_reason, result.tokens) == ("stop", whole.tokens[: len(result.tokens)])
            assert len(engine._cached) <= result.prompt_tokens + len(result.tokens)
            assert engine._runner.num_committed == len(engine._cached)


def test_a_cancelled_answer_keeps_the_text_that_waited(engine: Engine) -> None:
    whole = collect(engine)[-1].result
    assert whole is not None
    stop, chunks = threading.Event(), []
    waiting = (whole.text[:60] + "¤",)
    for chunk in engine.stream(QUESTION, SamplingParams(max_tokens=60, stop=waiting), stop):
        chunks.append(chunk)
        if len(chunks) == 3:
            stop.set()
    assert [chunk.text for chunk in chunks[:3]] == ["", "", ""]
    assert chunks[-1].result is not None
    assert (chunks[-1].result.finish_reason, chunks[-1].result.text) == ("cancelled", chunks[-1].text)
    assert whole.text.startswith(chunks[-1].text)
    assert len(chunks[-1].tokens) >= 3


def test_impossible_stops_are_refused() -> None:
    for wrong in (("",), ("x" * 201,), tuple("abcdefghijklmnopq")):
        with pytest.raises(InvalidParameterError, match=r"stop is .*; allowed is at most 16 strings of 1 to 200"):
            SamplingParams(stop=wrong)
