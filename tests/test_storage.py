"""What a person keeps: messages, branches, answers that grow, and the same store used from many threads."""

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.storage import (
    ConversationNotFoundError,
    ConversationStore,
    MessageNotFoundError,
    StorageError,
)


@pytest.fixture
def store(tmp_path: Path):
    opened = ConversationStore(tmp_path / "data folder" / "chat.db")
    yield opened
    opened.close()


def add_turn(store: ConversationStore, conversation_id: str, question: str, answer: str) -> tuple[str, str]:
    head = store.conversation(conversation_id).head_id
    user = store.append(conversation_id, "user", question, parent_id=head)
    reply = store.append(conversation_id, "assistant", answer, parent_id=user.id)
    return user.id, reply.id


def test_thread_comes_back_in_order_after_reopening(store: ConversationStore) -> None:
    conversation = store.create_conversation()
    add_turn(store, conversation.id, "One?", "1")
    add_turn(store, conversation.id, "Two? \u2028 ünï 🐉", "2")
    again = ConversationStore(store.path)
    assert [message.content for message in again.thread(conversation.id)] == ["One?", "1", "Two? \u2028 ünï 🐉", "2"]
    again.close()


def test_pragmas_hold_on_the_open_connection(store: ConversationStore) -> None:
    values = {name: store._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "foreign_keys")}
    assert values == {"journal_mode": "wal", "foreign_keys": 1}
    assert store._db.execute("PRAGMA busy_timeout").fetchone()[0] == 5000


def test_first_user_text_names_the_conversation_once(store: ConversationStore) -> None:
    conversation = store.create_conversation()
    add_turn(store, conversation.id, "Tell me\n about   " + "dragons " * 20, "Yes")
    title = store.conversation(conversation.id).title
    assert title.startswith("Tell me about dragons") and title.endswith("…") and len(title) <= 60
    add_turn(store, conversation.id, "Other", "No")
    assert store.conversation(conversation.id).title == title


def test_second_child_makes_a_branch_and_keeps_the_first(store: ConversationStore) -> None:
    conversation = store.create_conversation()
    user_id, first = add_turn(store, conversation.id, "Q", "first")
    second = store.append(conversation.id, "assistant", "second", parent_id=user_id)
    shown = store.thread(conversation.id)
    assert [message.content for message in shown] == ["Q", "second"]
    assert shown[1].siblings == (first, second.id)
    assert [message.content for message in store.thread(conversation.id, first)] == ["Q", "first"]


def test_answer_grows_and_keeps_stats_unless_given(store: ConversationStore) -> None:
    conversation = store.create_conversation()
    user = store.append(conversation.id, "user", "Q", parent_id=None)
    answer = store.append(conversation.id, "assistant", "", parent_id=user.id, status="running", settings={"seed": 3})
    store.save_answer(answer.id, "par", "running", stats={"steps": 1})
    store.save_answer(answer.id, "part", "cancelled")
    saved = store.message(answer.id)
    assert (saved.content, saved.status) == ("part", "cancelled")
    assert (saved.stats, saved.settings) == ({"steps": 1}, {"seed": 3})


def test_crash_leaves_the_text_and_is_called_interrupted(store: ConversationStore) -> None:
    conversation = store.create_conversation()
    user = store.append(conversation.id, "user", "Q", parent_id=None)
    answer = store.append(conversation.id, "assistant", "", parent_id=user.id, status="running")
    store.save_answer(answer.id, "half an ans", "running")
    after_crash = ConversationStore(store.path)
    assert after_crash.mark_interrupted() == 1
    assert after_crash.mark_interrupted() == 0
    assert (after_crash.message(answer.id).status, after_crash.message(answer.id).content) == (
        "interrupted",
        "half an ans",
    )
    assert after_crash.message(user.id).status == "complete"
    after_crash.close()


def test_deleted_conversation_is_hidden_until_restored(store: ConversationStore) -> None:
    kept, gone = store.create_conversation("kept"), store.create_conversation("gone")
    add_turn(store, gone.id, "Q", "A")
    store.delete(gone.id)
    assert [conversation.id for conversation in store.conversations()] == [kept.id]
    store.restore(gone.id)
    assert {conversation.id for conversation in store.conversations()} == {kept.id, gone.id}
    assert len(store.thread(gone.id)) == 2


def test_last_changed_conversation_comes_first(store: ConversationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000, 2000))
    monkeypatch.setattr("app.storage._now_ms", lambda: next(clock))
    old, new = store.create_conversation("old"), store.create_conversation("new")
    assert [conversation.id for conversation in store.conversations()] == [new.id, old.id]
    store.append(old.id, "user", "again", parent_id=None)
    assert [conversation.id for conversation in store.conversations()] == [old.id, new.id]


def test_trace_is_replaced_and_leaves_with_its_message(store: ConversationStore) -> None:
    conversation = store.create_conversation()
    _, answer = add_turn(store, conversation.id, "Q", "A")
    assert store.trace(answer) is None
    store.save_trace(answer, b"\x00\x01", steps=1, trace_format=1)
    store.save_trace(answer, b"\x02", steps=2, trace_format=1)
    assert store.trace(answer) == (1, b"\x02")
    with store.atomic():
        store._db.execute("DELETE FROM conversations WHERE id = ?", [conversation.id])
    assert store.trace(answer) is None
    with pytest.raises(MessageNotFoundError):
        store.message(answer)


def test_atomic_block_writes_all_or_nothing(store: ConversationStore) -> None:
    conversation = store.create_conversation()
    with pytest.raises(RuntimeError), store.atomic():
        store.append(conversation.id, "user", "lost", parent_id=None)
        raise RuntimeError
    assert store.thread(conversation.id) == []
    assert store.conversation(conversation.id).title == ""


@pytest.mark.parametrize("role,status", [("robot", "complete"), ("user", "done")])
def test_unknown_role_or_status_is_refused_with_the_allowed_ones(
    store: ConversationStore, role: str, status: str
) -> None:
    conversation = store.create_conversation()
    with pytest.raises(StorageError, match="allowed is"):
        store.append(conversation.id, role, "x", parent_id=None, status=status)


def test_unknown_ids_and_foreign_parents_are_refused(store: ConversationStore) -> None:
    one, two = store.create_conversation(), store.create_conversation()
    message = store.append(one.id, "user", "x", parent_id=None)
    with pytest.raises(ConversationNotFoundError, match="nope"):
        store.thread("nope")
    with pytest.raises(MessageNotFoundError, match="nope"):
        store.save_answer("nope", "", "complete")
    with pytest.raises(ConversationNotFoundError, match="nope"):
        store.rename("nope", "x")
    with pytest.raises(StorageError, match="not part of"):
        store.append(two.id, "user", "x", parent_id=message.id)
    assert store.thread(one.id, leaf_id="nope") == []


def test_sql_in_texts_is_only_text(store: ConversationStore) -> None:
    text = "'); DROP TABLE messages; --"
    conversation = store.create_conversation(text)
    add_turn(store, conversation.id, text, text)
    assert [message.content for message in store.thread(conversation.id)] == [text, text]
    with pytest.raises(ConversationNotFoundError):
        store.thread(text)


def test_many_threads_write_and_read_at_once(store: ConversationStore) -> None:
    conversations = [store.create_conversation() for _ in range(4)]
    barrier = threading.Barrier(8)

    def work(index: int) -> None:
        barrier.wait()
        conversation = conversations[index % 4]
        for number in range(10):
            message = store.append(conversation.id, "user", f"{index}-{number}", parent_id=None)
            store.save_answer(message.id, f"{index}-{number}!", "complete")
            store.thread(conversation.id)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    rows = store.rows("SELECT content FROM messages")
    assert sorted(row["content"] for row in rows) == sorted(f"{i}-{n}!" for i in range(8) for n in range(10))


def test_waits_for_another_process_that_writes(store: ConversationStore) -> None:
    conversation = store.create_conversation()
    other = sqlite3.connect(store.path, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.3, other.rollback)
    release.start()
    store.append(conversation.id, "user", "after", parent_id=None)
    release.join()
    other.close()
    assert [message.content for message in store.thread(conversation.id)] == ["after"]


def test_failed_write_is_told_in_a_sentence(store: ConversationStore) -> None:
    conversation = store.create_conversation()
    store._db.execute("PRAGMA query_only = ON")
    with pytest.raises(StorageError, match="cannot be read or saved"):
        store.append(conversation.id, "user", "x", parent_id=None)


def test_file_that_is_no_database_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "chat.db"
    path.write_bytes(b"my novel, not a database" * 100)
    with pytest.raises(StorageError, match=r"chat\.db cannot be opened"):
        ConversationStore(path)
    assert path.read_bytes() == b"my novel, not a database" * 100
