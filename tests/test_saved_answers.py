"""Kept answers: those of the app and of the command line, written again from what is on disk."""

import argparse
import json
import random
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_engine import INFO, FakeEngine

from app.answer_options import add_answer_options, answer_settings
from app.ask import answer_all
from app.chat import ChatSession
from app.options import Parser, add_model_options
from app.prompts import Question
from app.records import MessageNotFoundError, StorageError
from app.saved_answers import KeepingEngine, Reproduced, open_store, reproduce, stored_answer
from app.storage import ConversationStore
from engine import Engine, SamplingParams
from engine.bench.sampling_identity import random_settings

TURNS = ("Name three colours.", "Which of them is the warmest?", "Write a line about it.", "Now make it rhyme.")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ConversationStore]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


def again(engine: Engine | FakeEngine, store: ConversationStore, message: str, **choice: bool | None) -> Reproduced:
    return reproduce(engine, stored_answer(store, message), threading.Event(), **choice)


def test_twenty_answers_of_the_app_are_written_again(engine: Engine, store: ConversationStore) -> None:
    session, draw, answers = ChatSession(store, lambda progress: engine), random.Random(6), []
    session.start()
    for number in range(5):
        conversation = None
        for text in TURNS:
            settings = {**random_settings(draw, 16).to_dict(), "system": "Be brief." if number % 2 else ""}
            settings["seed"] = settings["seed"] if draw.random() < 0.5 else None  # drawn, and kept with the answer
            turn = session.send(conversation, text, settings)
            conversation = turn.conversation_id
            running = session.running(conversation)
            assert running is None or running.finished.wait(60)
            answers.append(turn.answer_id)
    session.close()
    assert len(answers) == 20
    whole = [stored_answer(store, message) for message in answers]
    assert all(stored.is_whole for stored in whole)
    assert sum(stored.tokens is not None for stored in whole) > 10
    for number, message in enumerate(reversed(answers)):  # what is cached then is another conversation
        result = again(engine, store, message, medusa=None if number % 2 else False)
        assert result.difference == "", message


def keep(engine: Engine | FakeEngine, store: ConversationStore, prompt: str, **settings: object) -> str:
    keeping = KeepingEngine(engine, store)
    list(keeping.stream(Question(prompt).messages, SamplingParams(**settings)))  # type: ignore[arg-type]
    return keeping.message_id


def test_an_answer_of_the_command_line_is_kept_as_the_app_keeps_its_own(
    engine: Engine, store: ConversationStore
) -> None:
    kept = keep(engine, store, TURNS[0], temperature=0.9, max_tokens=12, stop=("zzz",), logit_bias=((5, 1.5),))
    message = store.message(kept)
    assert (message.status, message.settings["temperature"], message.settings["stop"]) == ("complete", 0.9, ["zzz"])
    assert message.settings["seed"] == message.stats["seed"]
    assert message.stats["model"] == engine.info.model
    conversation = store.conversation(message.conversation_id)
    assert (conversation.title, conversation.head_id) == (TURNS[0], kept)
    result = again(engine, store, kept)
    assert (result.difference, result.result.text) == ("", message.content)


def test_a_difference_is_told_with_its_place(engine: Engine, store: ConversationStore) -> None:
    kept = keep(engine, store, TURNS[0], max_tokens=12)
    text = store.message(kept).content
    store.save_answer(kept, text[:9] + "#" + text[10:], "complete")
    assert again(engine, store, kept).difference == "the text differs from character 9 on"
    stats = {**store.message(kept).stats, "weights": "nf4", "device": "cuda"}
    store.save_answer(kept, text + "#", "complete", stats=stats)
    told = again(engine, store, kept).difference
    assert told.startswith(f"the text differs from character {len(text)} on; it was written with nf4 on cuda, this")


def test_other_tokens_for_the_same_text_are_a_difference(store: ConversationStore) -> None:
    kept = keep(FakeEngine(), store, "echo:one two three")
    stored = stored_answer(store, kept)
    assert stored.tokens is not None
    assert reproduce(FakeEngine(), stored, threading.Event()).difference == ""
    other = replace(stored, tokens=(*stored.tokens[:-1], 0))
    assert reproduce(FakeEngine(), other, threading.Event()).difference == "the text is the same, in other tokens"


def test_a_stopped_answer_is_compared_as_far_as_it_went(engine: Engine, store: ConversationStore) -> None:
    keeping, stop = KeepingEngine(engine, store), threading.Event()
    for number, _ in enumerate(keeping.stream(Question(TURNS[2]).messages, SamplingParams(max_tokens=30), stop)):
        if number == 4:
            stop.set()
    message = store.message(keeping.message_id)
    assert message.status == "cancelled"
    result = again(engine, store, keeping.message_id)
    assert result.difference == ""
    assert len(result.result.text) > len(message.content) > 0


def test_what_cannot_be_compared_is_refused(store: ConversationStore) -> None:
    kept = keep(FakeEngine(), store, "echo:one two")
    question = store.message(kept).parent_id
    assert question is not None
    with pytest.raises(StorageError, match="is by the user; name an answer"):
        stored_answer(store, question)
    with pytest.raises(MessageNotFoundError, match="no message 'none'"):
        stored_answer(store, "none")
    with pytest.raises(StorageError, match=r"written by Fake-135M, not by Other; name it with --model"):
        again(FakeEngine(info=replace(INFO, model="Other")), store, kept)
    store.save_answer(kept, "one", "error")
    with pytest.raises(StorageError, match="no finished answer"):
        stored_answer(store, kept)
    store.save_answer(kept, "one", "interrupted", settings={"temperature": 1.0, "seed": None})
    with pytest.raises(StorageError, match=r"seed of message .* is not known"):
        stored_answer(store, kept)


def test_an_engine_that_fails_leaves_its_error_with_the_message(store: ConversationStore) -> None:
    keeping = KeepingEngine(FakeEngine(fail_after=3, error=RuntimeError("no luck")), store)
    with pytest.raises(RuntimeError, match="no luck"):
        list(keeping.stream(Question("hi").messages, SamplingParams()))
    message = store.message(keeping.message_id)
    assert (message.status, message.error) == ("error", "no luck")
    assert message.content


def test_the_prompt_is_made_as_the_chat_made_it(store: ConversationStore) -> None:
    """Turns that did not fit stay out, and text that was gone on from ends the prompt."""
    conversation = store.create_conversation()
    parent = None
    for role, text in (("user", "one"), ("assistant", "two"), ("user", "three")):
        parent = store.append(conversation.id, role, text, parent_id=parent).id
    settings = {"system": "S", "left_out": 2, "continues": {"message": "x", "characters": 4}}
    kept = store.append(conversation.id, "assistant", "fourfive", parent_id=parent, settings=settings)
    stored = stored_answer(store, kept.id)
    assert [(message["role"], message["content"]) for message in stored.messages] == [
        ("system", "S"),
        ("user", "three"),
        ("assistant", "four"),
    ]
    assert stored.text == "five"


def test_json_names_the_message_that_was_kept(store: ConversationStore, capsys: pytest.CaptureFixture[str]) -> None:
    keeping = KeepingEngine(FakeEngine(), store)
    questions = [Question("echo:a b"), Question("echo:c d")]
    answer_all(
        keeping,
        questions,
        SamplingParams(),
        stop=threading.Event(),
        out=sys.stdout,
        log=sys.stderr,
        json_lines=True,
        kept_as=lambda: keeping.message_id,
    )
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [store.message(record["message"]).content for record in records] == ["a b", "c d"]


def parsed(*words: str) -> argparse.Namespace:
    parser = Parser("test", "Test.")
    add_answer_options(parser)
    add_model_options(parser)
    return parser.parse_args(words)


def test_flags_lie_over_the_preset() -> None:
    assert SamplingParams.from_dict(answer_settings(parsed())) == SamplingParams()
    settings = answer_settings(parsed("--preset", "balanced", "--top-p", "0.5", "--medusa", "off"))
    params = SamplingParams.from_dict(settings)
    assert (params.temperature, params.top_p, params.min_p, params.medusa) == (0.7, 0.5, 0.05, False)


def test_every_control_has_a_flag() -> None:
    words = (
        "--medusa off --temperature 0.5 --seed 7 --max-tokens 9 --tree-nodes 3 --acceptance typical --epsilon 0.2 "
        "--delta 0.4 --top-k 5 --top-p 0.6 --min-p 0.1 --repetition-penalty 1.1 --presence-penalty 0.2 "
        "--frequency-penalty 0.3 --stop \\n\\n --stop END --logit-bias 5=-1.5 --logit-bias 7=2"
    )
    got = SamplingParams.from_dict(answer_settings(parsed(*words.split()))).to_dict()
    neutral = SamplingParams().to_dict()
    assert [name for name in got if got[name] == neutral[name]] == []
    assert (got["stop"], got["logit_bias"]) == (["\n\n", "END"], [[5, -1.5], [7, 2.0]])


def test_a_data_folder_that_was_named_is_told_from_the_default(tmp_path: Path) -> None:
    assert not parsed().is_data_dir_given
    assert parsed("--data-dir", str(tmp_path)).is_data_dir_given
