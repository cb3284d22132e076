"""Edit, regenerate, go on, titles and the context: nothing that was written is lost or silently left out."""

import json
import threading
from dataclasses import replace

import pytest
from fake_engine import INFO, FakeEngine
from test_chat import WAIT_S, wait_for, wait_until

from app.chat import ChatError
from app.context import fit_prompt
from app.handlers import Handlers
from app.storage import ConversationStore
from app.titles import clean_title


def texts(store: ConversationStore, conversation_id: str) -> list[str]:
    return [message.content for message in store.thread(conversation_id)]


def test_edit_makes_a_branch_and_keeps_the_other(store, start) -> None:
    session = start()
    first = session.send(None, "echo:one", {})
    wait_for(session, first.conversation_id)
    session.send(first.conversation_id, "echo:below", {})
    wait_for(session, first.conversation_id)
    edited = session.edit(first.user_id, "echo:two", {})
    wait_for(session, first.conversation_id)
    assert texts(store, first.conversation_id) == ["echo:two", "two"]
    assert store.thread(first.conversation_id)[0].siblings == (first.user_id, edited.user_id)
    session.show_branch(first.user_id)
    assert texts(store, first.conversation_id) == ["echo:one", "one", "echo:below", "below"]


def test_regenerate_answers_the_same_question_beside_the_old_answer(store, start) -> None:
    engine = FakeEngine()
    session = start(engine)
    first = session.send(None, "echo:one", {})
    wait_for(session, first.conversation_id)
    again = session.regenerate(first.answer_id, {"temperature": 0.7, "seed": 11})
    wait_for(session, first.conversation_id)
    assert again.user_id == first.user_id
    assert store.thread(first.conversation_id)[1].siblings == (first.answer_id, again.answer_id)
    assert store.message(again.answer_id).settings["seed"] == 11
    assert engine.requests[1][0] == [{"role": "user", "content": "echo:one"}]


def test_going_on_begins_with_the_old_text_and_hands_it_to_the_engine(store, start) -> None:
    engine = FakeEngine()
    session = start(engine)
    first = session.send(None, "Why?", {"max_tokens": 5})
    wait_for(session, first.conversation_id)
    old = store.message(first.answer_id).content
    more = session.go_on(first.answer_id, {"max_tokens": 4})
    wait_for(session, first.conversation_id)
    saved = store.message(more.answer_id)
    assert saved.content.startswith(old) and len(saved.content) > len(old)
    assert engine.requests[1][0][-1] == {"role": "assistant", "content": old}
    assert saved.settings["continues"] == {"message": first.answer_id, "characters": len(old)}
    assert store.message(first.answer_id).content == old


def test_branches_wait_for_the_running_answer_and_need_the_right_message(store, start) -> None:
    gate = threading.Semaphore(0)
    session = start(FakeEngine(gate=gate))
    turn = session.send(None, "Why?", {"max_tokens": 9})
    for refused in (
        lambda: session.edit(turn.user_id, "x", {}),
        lambda: session.regenerate(turn.answer_id, {}),
        lambda: session.show_branch(turn.user_id),
    ):
        with pytest.raises(ChatError, match="still being written"):
            refused()
    gate.release(50)
    wait_for(session, turn.conversation_id)
    with pytest.raises(ChatError, match="needs one by the user"):
        session.edit(turn.answer_id, "x", {})
    with pytest.raises(ChatError, match="empty"):
        session.edit(turn.user_id, "  ", {})
    assert len(store.messages(turn.conversation_id)) == 2


def test_every_setting_of_an_answer_is_saved_with_it(store, start) -> None:
    settings = {"temperature": 0.9, "top_k": 40, "stop": ["END"], "logit_bias": {"5": -1.5}, "system": "Be brief."}
    session = start()
    turn = session.send(None, "echo:hi", settings)
    wait_for(session, turn.conversation_id)
    saved = store.message(turn.answer_id).settings
    assert saved["temperature"] == 0.9 and saved["top_k"] == 40 and saved["stop"] == ["END"]
    assert saved["logit_bias"] == [[5, -1.5]] and saved["system"] == "Be brief." and saved["preset"] == "Custom"
    assert saved["seed"] == 7  # the double's own, drawn because none was asked for


def test_full_context_leaves_out_the_oldest_turns_and_says_so(store, start) -> None:
    engine = FakeEngine(info=replace(INFO, max_context=60))
    session = start(engine)
    conversation = None
    for number in range(6):
        turn = session.send(conversation, f"echo:{number} " + "word " * 6, {"max_tokens": 20})
        conversation = turn.conversation_id
        wait_for(session, conversation)
    answers = [message for message in store.thread(conversation) if message.role == "assistant"]
    left = [answer.settings["left_out"] for answer in answers]
    assert left[0] == 0 and left[-1] > 0 and left == sorted(left)
    assert engine.requests[-1][0][-1]["content"].startswith("echo:5")
    assert engine.requests[-1][0][0]["role"] == "user"
    assert engine.count_tokens(engine.requests[-1][0]) <= 45


def turns(count: int) -> list[dict[str, str]]:
    return [{"role": "assistant" if index % 2 else "user", "content": "x"} for index in range(count)]


@pytest.mark.parametrize("limit,already,expected", [(99, 0, 0), (7, 0, 4), (7, 2, 2), (3, 0, 6), (0, 0, 6), (99, 4, 4)])
def test_prompt_drops_whole_turns_and_keeps_the_last_message(limit: int, already: int, expected: int) -> None:
    prompt = fit_prompt([{"role": "system", "content": "s"}], turns(7), len, limit, already)
    assert prompt.left_out == expected
    assert prompt.messages[0]["role"] == "system" and prompt.messages[1]["role"] == "user"
    assert prompt.tokens == len(prompt.messages)


def test_model_names_a_conversation_once_and_never_over_a_person(store, start) -> None:
    session = start(FakeEngine(reply="Tidy dragon hoards"), titles=True)
    turn = session.send(None, "Tell me of dragons and their very long story", {})
    wait_for(session, turn.conversation_id)
    wait_until(lambda: store.conversation(turn.conversation_id).title == "Tidy dragon hoards")
    assert store.conversation(turn.conversation_id).title_source == "model"
    other = session.send(None, "Another question", {})
    store.rename(other.conversation_id, "My own")
    wait_for(session, other.conversation_id)
    wait_until(lambda: not session.has_title_pending(other.conversation_id))
    assert store.conversation(other.conversation_id).title == "My own"


def test_title_gives_way_to_an_answer_and_is_written_later(store, start) -> None:
    begun = threading.Event()

    class Slow(FakeEngine):
        def stream(self, messages, params, stop=None):
            if messages[0]["role"] == "system" and not begun.is_set():
                begun.set()
                assert stop.wait(WAIT_S)
            yield from super().stream(messages, params, stop)

    session = start(Slow(reply="A good title"), titles=True)
    turn = session.send(None, "Tell me a story", {})
    wait_for(session, turn.conversation_id)
    assert begun.wait(WAIT_S) and session.has_title_pending(turn.conversation_id)
    other = session.send(None, "echo:at once", {})
    wait_for(session, other.conversation_id)
    wait_until(lambda: store.conversation(turn.conversation_id).title == "A good title")


def test_a_thread_says_that_its_title_is_still_to_come(store, start) -> None:
    begun, end = threading.Event(), threading.Event()

    class Slow(FakeEngine):
        def stream(self, messages, params, stop=None):
            if messages[0]["role"] == "system":
                begun.set()
                assert end.wait(WAIT_S)
            yield from super().stream(messages, params, stop)

    session = start(Slow(reply="A good title"), titles=True)
    turn = session.send(None, "Tell me a story", {})
    wait_for(session, turn.conversation_id)
    assert begun.wait(WAIT_S)
    handlers = Handlers(session)
    shown = json.loads(handlers.open(turn.conversation_id)[1])
    assert shown["is_awaited"] and all(message["status"] != "running" for message in shown["messages"])
    end.set()
    wait_until(lambda: store.conversation(turn.conversation_id).title == "A good title")
    wait_until(lambda: not session.has_title_pending(turn.conversation_id))
    assert not json.loads(handlers.open(turn.conversation_id)[1])["is_awaited"]


@pytest.mark.parametrize(
    "written,expected",
    [
        ('"The Dragon\'s Hoard"\nMore text', "The Dragon's Hoard"),
        ("Title: Why rainbows form", "Why rainbows form"),
        ("Here is a title: **Calm Saturdays**", "Calm Saturdays"),
        ("I'm sorry, I cannot do that", None),
        ("This is a very long sentence that says far too much about it all", None),
        ("  \n", None),
        ("", None),
    ],
)
def test_titles_are_cleaned_or_refused(written: str, expected: str | None) -> None:
    assert clean_title([written]) == expected
