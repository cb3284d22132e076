"""Export and import: what goes out comes back whole, nothing is doubled, and a bad file changes nothing."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from app.export import export_file
from app.import_formats import UnreadableFileError
from app.importing import import_file
from app.storage import ConversationStore

CHATGPT: list[dict[str, Any]] = [
    {
        "title": "Rainbows",
        "conversation_id": "abc-1",
        "create_time": 1700000000.5,
        "update_time": 1700000100.0,
        "current_node": "a1",
        "mapping": {
            "root": {"message": None, "parent": None, "children": ["s"]},
            "s": {
                "message": {"author": {"role": "system"}, "content": {"content_type": "text", "parts": [""]}},
                "parent": "root",
                "children": ["u1"],
            },
            "u1": {
                "message": {
                    "author": {"role": "user"},
                    "create_time": 1700000001.0,
                    "content": {"content_type": "text", "parts": ["Why rainbows?"]},
                },
                "parent": "s",
                "children": ["a1", "a2"],
            },
            "a1": {
                "message": {
                    "author": {"role": "assistant"},
                    "create_time": 1700000002.0,
                    "content": {"content_type": "text", "parts": ["Because of drops."]},
                },
                "parent": "u1",
                "children": [],
            },
            "a2": {
                "message": {
                    "author": {"role": "assistant"},
                    "content": {"content_type": "multimodal_text", "parts": [{"asset": 1}, "Light bends."]},
                },
                "parent": "u1",
                "children": [],
            },
        },
    }
]
SHAREGPT = [
    {
        "conversations": [
            {"from": "system", "value": "Be kind."},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello"},
        ]
    }
]


@pytest.fixture
def other(tmp_path: Path):
    opened = ConversationStore(tmp_path / "other.db")
    yield opened
    opened.close()


def fill(store: ConversationStore) -> str:
    conversation = store.create_conversation("Dragons: a/b?", {"system": "Be brief."})
    user = store.append(conversation.id, "user", "Why?\n\n# no heading", parent_id=None)
    first = store.append(conversation.id, "assistant", "First ünï 🐉", parent_id=user.id, settings={"seed": 5})
    store.append(conversation.id, "assistant", "Second", parent_id=user.id)
    store.save_answer(first.id, first.content, "cancelled", stats={"steps": 3})
    store.move(conversation.id, "Work")
    store.pin(conversation.id, True)
    return conversation.id


def exported(store: ConversationStore, file_format: str = "json", conversation: str | None = None) -> bytes:
    return export_file(store, file_format, conversation)[2].encode()


def content(store: ConversationStore, conversation_id: str) -> list[tuple[Any, ...]]:
    return [
        (item.id, item.parent_id, item.role, item.content, item.status, item.settings, item.stats, item.created_ms)
        for item in store.messages(conversation_id)
    ]


def test_own_json_brings_everything_back_elsewhere_and_nothing_twice(store, other) -> None:
    conversation = fill(store)
    report = import_file(other, exported(store))
    assert (report.added, report.messages) == (1, 3)
    assert content(other, conversation) == content(store, conversation)
    assert other.conversation(conversation) == store.conversation(conversation)
    again = import_file(other, exported(store))
    assert (again.added, again.known, again.messages) == (0, 1, 0)
    assert "already here" in again.sentence()
    assert other.conversation(conversation) == store.conversation(conversation)


def test_longer_export_adds_what_is_missing(store, other) -> None:
    conversation = fill(store)
    import_file(other, exported(store))
    head = store.conversation(conversation).head_id
    store.append(conversation, "user", "And then?", parent_id=head)
    report = import_file(other, exported(store))
    assert (report.extended, report.messages) == (1, 1)
    assert [item.content for item in other.messages(conversation)][-1] == "And then?"


@pytest.mark.parametrize("file_format", ["json", "sharegpt"])
def test_own_export_into_the_same_data_changes_nothing(store, file_format: str) -> None:
    conversation = fill(store)
    before = content(store, conversation)
    report = import_file(store, exported(store, file_format))
    assert (report.known, report.messages) == (1, 0)
    assert content(store, conversation) == before and len(store.conversations()) == 1


def test_import_of_a_deleted_conversation_brings_it_back(store) -> None:
    conversation = fill(store)
    data = exported(store)
    store.delete(conversation)
    import_file(store, data)
    assert [item.id for item in store.conversations()] == [conversation]


def test_foreign_ids_are_never_taken_from_another_conversation(store) -> None:
    conversation = fill(store)
    document = json.loads(exported(store))
    document["conversations"][0]["id"] = "another"
    import_file(store, json.dumps(document).encode())
    assert len(store.conversations()) == 2
    assert len(store.messages(conversation)) == len(store.messages("another")) == 3


def test_sharegpt_comes_in_once_with_its_system_prompt(store) -> None:
    data = json.dumps(SHAREGPT).encode()
    assert import_file(store, data).added == 1
    assert import_file(store, data).known == 1
    (conversation,) = store.conversations()
    assert conversation.title == "Hi" and conversation.settings == {"system": "Be kind."}
    assert [(item.role, item.content) for item in store.thread(conversation.id)] == [
        ("user", "Hi"),
        ("assistant", "Hello"),
    ]


def test_one_object_a_line_and_openai_messages_are_read(store) -> None:
    lines = [
        {"messages": [{"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": "A"}]} for n in (1, 2)
    ]
    assert import_file(store, "\n".join(map(json.dumps, lines)).encode()).added == 2


@pytest.mark.parametrize("zipped", [False, True])
def test_chatgpt_export_keeps_branches_dates_and_the_shown_one(store, zipped: bool) -> None:
    data = json.dumps(CHATGPT).encode()
    if zipped:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("export/conversations.json", data)
        data = buffer.getvalue()
    assert import_file(store, data).added == 1
    (conversation,) = store.conversations()
    assert (conversation.title, conversation.created_ms) == ("Rainbows", 1700000000500)
    thread = store.thread(conversation.id)
    assert [item.content for item in thread] == ["Why rainbows?", "Because of drops."]
    other = store.message(thread[1].siblings[1])
    assert (other.content, other.parent_id) == ("Light bends.", thread[0].id)
    assert import_file(store, data).messages == 0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe\x00",
        b"not json",
        b"[]",
        b"{}",
        b"[1, 2]",
        b"PK\x03\x04 broken",
        b'{"format": "medusa-chat", "conversations": 5}',
        b'{"format": "medusa-chat", "conversations": [{"id": "x", "title": "t", "messages": [{"id": 5}]}]}',
        b'[{"conversations": [{"from": "martian", "value": "x"}]}]',
        b'[{"conversations": [{"from": "human", "value": 5}]}]',
        b'[{"title": "x", "mapping": []}]',
        b"[" * 100_000,
        b'[{"conversations": [{"from": "human", "value": "kept?"}]}, {"conversations": [{"from": "human"}]}]',
    ],
)
def test_bad_file_is_refused_in_a_sentence_and_changes_nothing(store, data: bytes) -> None:
    conversation = fill(store)
    before = content(store, conversation)
    with pytest.raises(UnreadableFileError, match=r"Nothing was imported\.$"):
        import_file(store, data)
    assert content(store, conversation) == before and len(store.conversations()) == 1


def test_hostile_texts_are_only_texts(store) -> None:
    text = "'); DROP TABLE messages; -- \x00 \ud800 <script>"
    data = json.dumps([{"conversations": [{"from": "human", "value": text}]}]).encode()
    import_file(store, data)
    (conversation,) = store.conversations()
    assert "DROP TABLE" in store.thread(conversation.id)[0].content


def test_markdown_shows_the_branch_and_names_the_speakers(store) -> None:
    conversation = fill(store)
    name, media_type, text = export_file(store, "markdown", conversation)
    assert (name, media_type) == ("Dragons-ab.md", "text/markdown")
    assert "# Dragons: a/b?" in text and "## You\n\nWhy?" in text and "## Answer\n\nSecond" in text
    assert "## System\n\nBe brief." in text and "First" not in text


def test_sharegpt_export_is_what_trainers_read(store) -> None:
    fill(store)
    (item,) = json.loads(exported(store, "sharegpt"))
    assert [line["from"] for line in item["conversations"]] == ["system", "human", "gpt"]
    assert item["conversations"][2]["value"] == "Second"
