"""Search, pins, folders and the bin: what is found, what is hidden, and when something is removed for good."""


import pytest

from app.search import MARK_END, MARK_START, search
from app.storage import KEPT_DAYS, ConversationStore, StorageError


def talk(store: ConversationStore, title: str, *texts: str) -> str:
    conversation = store.create_conversation(title)
    parent = None
    for index, text in enumerate(texts):
        role = "assistant" if index % 2 else "user"
        parent = store.append(conversation.id, role, text, parent_id=parent).id
    return conversation.id


def found(store: ConversationStore, text: str) -> list[str]:
    return [hit.conversation_id for hit in search(store, text)]


def test_titles_and_texts_are_found_with_marks(store: ConversationStore) -> None:
    dragons = talk(store, "About dragons", "Do they sleep?", "They sleep on gold.")
    gold = talk(store, "Metals", "What is gold?", "An element.")
    assert found(store, "dragons") == [dragons]
    assert set(found(store, "gold")) == {dragons, gold}
    hit = search(store, "slee gold")[0]
    assert f"{MARK_START}sleep{MARK_END} on {MARK_START}gold{MARK_END}" in hit.snippet
    assert hit.message_id == store.conversation(dragons).head_id
    assert search(store, "about")[0].title == f"{MARK_START}About{MARK_END} dragons"


@pytest.mark.parametrize(
    "text", ['"', "gold OR", "NEAR(", "content:gold", "*", "gold*", "-gold", "(", "a AND", "^gold"]
)
def test_operators_of_the_query_language_are_only_text(store: ConversationStore, text: str) -> None:
    talk(store, "T", "gold and silver", "fine")
    for hit in search(store, text):
        assert "gold" in hit.snippet


def test_search_follows_every_change(store: ConversationStore) -> None:
    conversation = talk(store, "Old name", "question", "first wording")
    answer = store.conversation(conversation).head_id
    assert answer
    store.save_answer(answer, "second wording", "complete")
    store.rename(conversation, "New name")
    assert found(store, "first") == [] and found(store, "second") == [conversation]
    assert found(store, "old") == [] and found(store, "new") == [conversation]
    store.delete(conversation)
    assert found(store, "second") == []
    store.restore(conversation)
    assert found(store, "second") == [conversation]
    store.delete(conversation)
    store.purge(conversation)
    assert store.rows("SELECT rowid FROM messages_search WHERE messages_search MATCH 'second'") == []


def test_accents_and_case_do_not_matter(store: ConversationStore) -> None:
    conversation = talk(store, "Über Köln", "x", "y")
    assert found(store, "uber KOLN") == [conversation]


def test_pinned_come_first_and_folders_are_names(store: ConversationStore) -> None:
    first, second = talk(store, "first", "x"), talk(store, "second", "y")
    store.pin(first, True)
    assert [item.id for item in store.conversations()] == [first, second]
    store.move(second, "  Work   notes ")
    assert store.conversation(second).folder == "Work notes"
    store.move(second, "")
    assert store.conversation(second).folder is None


def test_only_what_is_deleted_can_be_purged(store: ConversationStore) -> None:
    conversation = talk(store, "kept", "x", "y")
    with pytest.raises(StorageError, match="delete it first"):
        store.purge(conversation)
    store.delete(conversation)
    assert [item.id for item in store.conversations(deleted=True)] == [conversation]
    store.purge(conversation)
    assert store.conversations(deleted=True) == [] and store.messages(conversation) == []


def test_bin_is_emptied_after_its_days_and_not_before(
    store: ConversationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation, kept = talk(store, "gone", "x"), talk(store, "kept", "y")
    store.delete(conversation)
    deleted = store.conversation(conversation).deleted_ms
    assert deleted
    monkeypatch.setattr("app.storage._now_ms", lambda: deleted + KEPT_DAYS * 86_400_000)
    assert store.purge_expired() == 0
    monkeypatch.setattr("app.storage._now_ms", lambda: deleted + KEPT_DAYS * 86_400_000 + 1)
    assert store.purge_expired() == 1
    assert [item.id for item in store.conversations()] == [kept]


def test_model_title_never_replaces_a_persons(store: ConversationStore) -> None:
    conversation = store.create_conversation()
    store.append(conversation.id, "user", "Tell me", parent_id=None)
    assert store.rename_unless_named(conversation.id, "By model")
    assert not store.rename_unless_named(conversation.id, "Again")
    store.rename(conversation.id, "Mine")
    assert not store.rename_unless_named(conversation.id, "By model")
    assert store.conversation(conversation.id).title == "Mine"


def test_branch_is_shown_down_to_its_newest_message(store: ConversationStore) -> None:
    conversation = talk(store, "T", "one", "answer", "two", "answer two")
    first = store.thread(conversation)
    other = store.append(conversation, "assistant", "other answer", parent_id=first[0].id)
    assert [message.content for message in store.thread(conversation)] == ["one", "other answer"]
    assert store.show_branch(first[1].id) == conversation
    assert [message.content for message in store.thread(conversation)] == ["one", "answer", "two", "answer two"]
    store.show_branch(other.id)
    assert store.conversation(conversation).head_id == other.id
