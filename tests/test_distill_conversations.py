"""`distill --conversations`: a person's own questions become training data; and what `--prompts` leaves out."""

import argparse
import contextlib
from pathlib import Path

import pytest

from app import cli_distill
from app.saved_answers import open_store
from engine.models.loader import open_model
from engine.training.evaluate import evaluation_prompts
from engine.training.shards import read_documents


def distill(line: str) -> int:
    parser = argparse.ArgumentParser()
    cli_distill.add_arguments(parser)
    return cli_distill.run(parser.parse_args(line.split()))


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    folder = tmp_path / "chats"
    with contextlib.closing(open_store(folder)) as store:
        first = store.create_conversation()
        store.save_settings(first.id, {"system": "You are terse."})
        user = store.append(first.id, "user", "What do otters eat?", parent_id=None)
        reply = store.append(first.id, "assistant", "Fish.", parent_id=user.id)
        store.append(first.id, "user", "And where do they sleep?", parent_id=reply.id)
        store.append(first.id, "user", "And how do they swim?", parent_id=reply.id)  # another branch
        gone = store.create_conversation()
        store.append(gone.id, "user", "A question that was deleted?", parent_id=None)
        store.delete(gone.id)
        second = store.create_conversation()
        store.append(second.id, "user", "How deep is the sea?", parent_id=None)
    return folder


def test_every_question_is_answered_behind_its_own_turns(chats: Path, tmp_path: Path) -> None:
    line = f"--out {tmp_path}/data --conversations {chats} --max-answer 12 --device cpu"
    assert distill(line) == 0
    tokenizer, system = open_model("bundled").tokenizer, {"role": "system", "content": "You are terse."}
    otters = [{"role": "user", "content": "What do otters eat?"}, {"role": "assistant", "content": "Fish."}]
    prompts = [
        [system, *otters[:1]],
        [system, *otters, {"role": "user", "content": "And where do they sleep?"}],
        [system, *otters, {"role": "user", "content": "And how do they swim?"}],
        [{"role": "user", "content": "How deep is the sea?"}],
    ]
    documents = {document.source: document for document in read_documents(tmp_path / "data")}
    assert sorted(documents) == [0, 1, 2, 3]
    for number, messages in enumerate(prompts):
        start = documents[number].spans[0][0]
        assert list(documents[number].tokens[:start]) == tokenizer.encode_chat(messages)
    assert distill(line) == 0  # nothing is left to do, and nothing is added
    assert len(list(read_documents(tmp_path / "data"))) == 4


def test_no_conversations_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert distill(f"--out {tmp_path}/data --conversations {tmp_path}/nowhere") == 2
    assert "no saved conversations" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
    open_store(tmp_path / "empty").close()
    assert distill(f"--out {tmp_path}/data --conversations {tmp_path}/empty") == 2
    assert "hold no question" in capsys.readouterr().err


def test_prompts_that_judge_heads_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{evaluation_prompts()[3]}\nWhat colour are flamingos?\n")
    assert distill(f"--out {tmp_path}/data --prompts {prompts} --max-answer 8 --device cpu") == 0
    assert "1 prompts are left out" in capsys.readouterr().err
    assert [document.source for document in read_documents(tmp_path / "data")] == [1]
