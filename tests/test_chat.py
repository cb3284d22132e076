"""Answers that no page owns: saved while they grow, stopped only by Stop, never lost by a crash or an error."""

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from fake_engine import INFO, FakeEngine, loader

from app.chat import ChatError, ChatSession
from app.storage import ConversationNotFoundError
from app.tree_view import unpack_trace
from engine import OutOfMemoryError

WAIT_S = 20


def wait_for(session: ChatSession, conversation_id: str) -> None:
    answer = session.running(conversation_id)
    assert answer is None or answer.finished.wait(WAIT_S)


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll a condition that another thread makes true; an Event is not available across the seam."""
    tick = threading.Event()
    for _ in range(int(WAIT_S / 0.01)):
        if condition():
            return
        tick.wait(0.01)
    raise AssertionError("the condition did not become true")


def test_answer_is_saved_with_its_settings_figures_and_steps(store, start) -> None:
    session = start()
    turn = session.send(None, "  Why?  ", {"max_tokens": 40, "medusa": True, "seed": 5, "system": "Be brief."})
    wait_for(session, turn.conversation_id)
    user, answer = store.thread(turn.conversation_id)
    assert (user.content, user.status) == ("Why?", "complete")
    assert answer.status == "complete" and answer.content.startswith("Dragons keep")
    assert answer.settings["seed"] == 5 and answer.settings["system"] == "Be brief."
    assert answer.stats["generated_tokens"] == 40 and answer.stats["tokens_per_step"] > 1.5
    assert answer.stats["model"] == "Fake-135M"
    trace_format, data = store.trace(answer.id)
    trace = unpack_trace(trace_format, data)
    words = [*trace.prefill_texts, *(text for step in trace.steps for text in step.texts)]
    assert "".join(words) == answer.content
    assert len(trace.steps) == answer.stats["steps"]


def test_engine_gets_system_prompt_and_whole_history(start) -> None:
    engine = FakeEngine()
    session = start(engine)
    first = session.send(None, "echo:One", {"system": "Be kind."})
    wait_for(session, first.conversation_id)
    session.send(first.conversation_id, "echo:Two", {})
    wait_for(session, first.conversation_id)
    assert engine.requests[1][0] == [
        {"role": "user", "content": "echo:One"},
        {"role": "assistant", "content": "One"},
        {"role": "user", "content": "echo:Two"},
    ]
    assert engine.requests[0][0][0] == {"role": "system", "content": "Be kind."}


def test_medusa_setting_reaches_the_engine_and_the_record(store, start) -> None:
    engine = FakeEngine()
    session = start(engine)
    turn = session.send(None, "Why?", {"medusa": False, "max_tokens": 8})
    wait_for(session, turn.conversation_id)
    answer = store.message(turn.answer_id)
    assert engine.requests[0][1].medusa is False
    assert answer.settings["medusa"] is False and answer.stats["tokens_per_step"] == 1


def test_engine_without_heads_is_not_called_medusa(store, start) -> None:
    gate = threading.Semaphore(2)
    session = start(FakeEngine(gate=gate, info=replace(INFO, has_heads=False)))
    turn = session.send(None, "Why?", {"medusa": True, "max_tokens": 8})
    answer = session.running(turn.conversation_id)
    wait_until(lambda: len(answer.trace.steps) == 2)
    assert answer.stats()["medusa"] is False
    gate.release(20)
    wait_for(session, turn.conversation_id)
    assert store.message(turn.answer_id).stats["medusa"] is False


def test_user_message_is_on_disk_before_the_engine_is_asked(store, start) -> None:
    seen: list[list[tuple[str, str]]] = []

    class Watching(FakeEngine):
        def stream(self, messages, params, stop=None):
            seen.append([(row["role"], row["content"]) for row in store.rows("SELECT * FROM messages ORDER BY num")])
            return super().stream(messages, params, stop)

    session = start(Watching())
    turn = session.send(None, "First things first", {"max_tokens": 3})
    wait_for(session, turn.conversation_id)
    assert seen == [[("user", "First things first"), ("assistant", "")]]


def test_growing_answer_is_on_disk_while_it_runs(store, start, monkeypatch) -> None:
    monkeypatch.setattr("app.running_answer.SAVE_INTERVAL_S", 0.01)
    gate = threading.Semaphore(3)
    session = start(FakeEngine(gate=gate))
    turn = session.send(None, "Why?", {"max_tokens": 60})
    wait_until(lambda: len(store.message(turn.answer_id).content) > 10)
    first = store.message(turn.answer_id)
    assert first.status == "running" and first.stats["steps"] >= 1
    gate.release(3)
    wait_until(lambda: len(store.message(turn.answer_id).content) > len(first.content))
    grown = store.message(turn.answer_id)
    assert grown.content.startswith(first.content)
    session.stop(turn.conversation_id)
    wait_for(session, turn.conversation_id)


def test_stop_keeps_the_partial_answer_and_frees_the_conversation(store, start) -> None:
    gate = threading.Semaphore(4)
    session = start(FakeEngine(gate=gate))
    turn = session.send(None, "Why?", {"max_tokens": 400})
    answer = session.running(turn.conversation_id)
    wait_until(lambda: len(answer.trace.steps) == 4)
    with pytest.raises(ChatError, match="still being written"):
        session.send(turn.conversation_id, "And?", {})
    session.stop(turn.conversation_id)
    assert answer.finished.wait(WAIT_S)
    saved = store.message(turn.answer_id)
    assert saved.status == "cancelled" and saved.content == answer.text != ""
    assert store.trace(turn.answer_id) is not None
    again = session.send(turn.conversation_id, "echo:And?", {"max_tokens": 1})
    wait_for(session, turn.conversation_id)
    assert store.message(again.answer_id).status == "complete"


def test_second_conversation_waits_its_turn_and_can_be_stopped_while_waiting(store, start) -> None:
    gate = threading.Semaphore(0)
    session = start(FakeEngine(gate=gate))
    first = session.send(None, "One", {"max_tokens": 9})
    second = session.send(None, "Two", {"max_tokens": 9})
    third = session.send(None, "Three", {"max_tokens": 9})
    wait_until(lambda: session.running(first.conversation_id).status == "running")
    assert session.running(second.conversation_id).status == "waiting"
    session.stop(second.conversation_id)
    gate.release(100)
    wait_for(session, third.conversation_id)
    statuses = [store.message(turn.answer_id).status for turn in (first, second, third)]
    assert statuses == ["complete", "cancelled", "complete"]
    assert store.message(second.answer_id).content == ""


def test_message_sent_while_the_model_loads_is_answered_after(store, start) -> None:
    may_load = threading.Event()

    def load(progress):
        progress("Reading the model")
        assert may_load.wait(WAIT_S)
        return FakeEngine()

    session = start(load=load)
    wait_until(lambda: session.engine_state.message == "Reading the model")
    turn = session.send(None, "Why?", {"max_tokens": 5})
    assert session.running(turn.conversation_id).status == "waiting"
    may_load.set()
    wait_for(session, turn.conversation_id)
    assert session.engine_state.phase == "ready" and session.engine_state.info == INFO
    assert store.message(turn.answer_id).status == "complete"


def test_model_that_does_not_load_is_told_in_state_and_answer(store, start) -> None:
    def load(progress):
        raise OutOfMemoryError("The model needs 9 GB and the device has 4; choose --quantize nf4.")

    session = start(load=load)
    turn = session.send(None, "Why?", {})
    wait_for(session, turn.conversation_id)
    assert session.engine_state.phase == "failed"
    saved = store.message(turn.answer_id)
    assert saved.status == "error" and "choose --quantize nf4" in saved.error


@pytest.mark.parametrize(
    "error,expected",
    [
        (OutOfMemoryError("The device is full; shorten the chat."), "The device is full; shorten the chat."),
        (TypeError("bad operand"), "The engine failed unexpectedly (TypeError: bad operand)"),
    ],
)
def test_error_in_the_middle_keeps_text_and_the_thread(store, start, error, expected) -> None:
    engine = FakeEngine(fail_after=6, error=error)
    session = start(engine)
    turn = session.send(None, "Why?", {"max_tokens": 50})
    wait_for(session, turn.conversation_id)
    saved = store.message(turn.answer_id)
    assert saved.status == "error" and saved.error.startswith(expected)
    assert saved.content.startswith("Dragons keep")
    engine._fail_after = None
    again = session.send(turn.conversation_id, "echo:still there", {})
    wait_for(session, turn.conversation_id)
    assert store.message(again.answer_id).content == "still there"


def test_bad_input_saves_nothing(store, start) -> None:
    session = start()
    with pytest.raises(ChatError, match="empty"):
        session.send(None, " \n", {})
    with pytest.raises(ChatError, match="temperature is 9; allowed is 0 to 5"):
        session.send(None, "Why?", {"temperature": 9})
    with pytest.raises(ConversationNotFoundError):
        session.send("nope", "Why?", {})
    assert store.conversations() == []


def test_closing_saves_running_and_waiting_answers_as_interrupted(store) -> None:
    gate = threading.Semaphore(2)
    session = ChatSession(store, loader(FakeEngine(gate=gate)))
    session.start()
    first = session.send(None, "One", {"max_tokens": 50})
    second = session.send(None, "Two", {"max_tokens": 50})
    answer = session.running(first.conversation_id)
    wait_until(lambda: len(answer.trace.steps) == 2)
    session.close()
    assert [store.message(turn.answer_id).status for turn in (first, second)] == ["interrupted", "interrupted"]
    assert store.message(first.answer_id).content == answer.text != ""


def test_start_marks_what_a_crash_left(store, start) -> None:
    conversation = store.create_conversation()
    user = store.append(conversation.id, "user", "Q", parent_id=None)
    lost = store.append(conversation.id, "assistant", "half", parent_id=user.id, status="running")
    start()
    assert store.message(lost.id).status == "interrupted"
    assert store.message(lost.id).content == "half"


def test_character_spanning_tokens_stays_whole_in_the_steps(store, start) -> None:
    class Halves(FakeEngine):
        def stream(self, messages, params, stop=None):
            for chunk in super().stream(messages, params, stop):
                yield replace(chunk, token_texts=tuple("\ufffd" for _ in chunk.token_texts))

    session = start(Halves())
    turn = session.send(None, "echo:🐉 and 🐲 fly", {"max_tokens": 20})
    wait_for(session, turn.conversation_id)
    trace = unpack_trace(*store.trace(turn.answer_id))
    texts = [*trace.prefill_texts, *(text for step in trace.steps for text in step.texts)]
    assert "".join(texts) == store.message(turn.answer_id).content == "🐉 and 🐲 fly"
