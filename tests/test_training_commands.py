"""The training commands: one after the other on the CPU, killed and resumed; calibration on data made by hand."""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import Engine, SamplingParams
from engine.heads import HeadsConfig, MedusaHeads
from engine.models.heads_file import load_heads, save_heads
from engine.nested_tree import NestedTree, tree_file
from engine.training.calibrate import calibrate, node_order, tokens_per_step, write_calibration
from engine.training.chat_format import read_chat_format
from engine.training.dataset import TextSet, build_cache
from engine.training.dense import TrainingModel, load_model
from engine.training.evaluate import greedy_answers
from engine.training.joint_quality import compare
from engine.training.joint_result import HEADS_FILE
from engine.training.medusa1 import Vocabulary, build_heads
from engine.training.ranks import MISSED, AnswerRanks, measure_ranks
from engine.training.shards import read_documents, read_index

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = """Why is the sky blue?
How do I boil an egg?
Name three planets.
What does a bee do?
What is the capital of France?
How do magnets work?
Write a sentence about a cat.
Explain fractions to a child.
"""
THINGS = ("bread", "a bridge", "the moon", "rain", "a violin", "sleep", "glass", "a whale", "coffee", "the wheel")
MORE_PROMPTS = PROMPTS + "".join(f"What is {thing}?\nTell me a fact about {thing}.\n" for thing in THINGS)
UNSEEN = ["What is a mountain?", "Tell me a fact about the sea.", "Why do birds sing?", "How do I cook rice?"]
TINY = "--width 256 --draft-vocab 1024 --batch-tokens 256 --device cpu"


def command(line: str) -> int:
    """Run a training command in this process."""
    name, *words = line.split()
    module = importlib.import_module("app.cli_distill" if name == "distill" else f"engine.training.cli_{name}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args(words))


def kill_once(line: str, is_time: str) -> None:
    """Run a command in another process and kill it at the first line of progress that holds `is_time`."""
    code = f"from test_training_commands import command; command({line!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    with process.stderr:
        assert any(is_time in text for text in process.stderr), "it ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def top1(model: TrainingModel, heads: MedusaHeads, text: TextSet) -> float:
    """Return how often the heads' best guess is right."""
    ranks = measure_ranks(heads, build_cache(model, text, heads=heads), Vocabulary(model, heads.token_map)).ranks
    return (ranks == 0).float().mean().item()


def answer(engine: Engine, medusa: bool) -> tuple[int, ...]:
    question = [{"role": "user", "content": "Why is the sky blue?"}]
    *_, last = engine.stream(question, SamplingParams(medusa=medusa, temperature=0.0, max_tokens=24))
    assert last.result is not None
    return last.result.tokens


@pytest.mark.slow
def test_commands_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "prompts.txt").write_text(MORE_PROMPTS)
    data, heads_path, tuned_path = tmp_path / "data", tmp_path / "h.safetensors", tmp_path / "tuned"
    assert command(f"distill --out {data} --prompts {tmp_path}/prompts.txt --max-answer 32 --device cpu") == 0
    assert command(f"train --data {data} --out {heads_path} --epochs 15 {TINY}") == 0
    assert command(f"calibrate --heads {heads_path} --device cpu --answers 4 --max-answer 24") == 0
    content = json.loads(tree_file(heads_path).read_text())
    assert len(content["expected_tokens_per_step"]) == len(content["order"]) + 1
    by_depth = content["expected_by_depth"]
    depths = range(1, len(by_depth) + 1)
    assert [len(row) for row in by_depth] == [1 + sum(len(node) <= d for node in content["order"]) for d in depths]
    frequent = content["expected_by_depth_of_frequent"]  # none where all draft tokens are scored everywhere
    assert (content["frequent_tokens"], [len(row) for row in frequent]) in ((0, []), (6144, [len(r) for r in by_depth]))
    assert by_depth[-1][-1] == pytest.approx(content["expected_tokens_per_step"][-1], abs=0.02)  # nothing is pruned

    model, heads = load_model("bundled", "cpu"), load_heads(heads_path)
    held_back = greedy_answers(model, read_chat_format(model.tokenizer), UNSEEN, 32)
    fresh = build_heads(heads.config, Vocabulary(model, heads.token_map))
    assert top1(model, heads, held_back) > top1(model, fresh, held_back) + 0.02
    assert len(answer(Engine.load("bundled", device="cpu", heads=str(heads_path)), medusa=True)) > 0

    capsys.readouterr()
    joint = f"--recipe medusa2 --start-heads {heads_path} --lambda0 1 --epochs 1 --batch-tokens 256 --device cpu"
    assert command(f"train --data {data} --out {tuned_path} {joint}") == 0
    said = capsys.readouterr()
    assert "KL" in said.err and "Against the original: KL" in said.out
    tuned = load_model(str(tuned_path), "cpu")
    assert compare(model, tuned, held_back).kl > 0
    tuned_heads = load_heads(tuned_path / HEADS_FILE)
    assert top1(tuned, tuned_heads, held_back) > top1(tuned, fresh, held_back) + 0.02
    engine = Engine.load(str(tuned_path), device="cpu")
    assert engine.info.has_heads and NestedTree.beside(tuned_path / HEADS_FILE).expected
    more = f"distill --out {tmp_path}/more --model {tuned_path} --prompts {tmp_path}/prompts.txt --tokens 40"
    assert command(f"{more} --max-answer 8 --slots 2 --device cpu") == 0
    assert next(read_documents(tmp_path / "more")).num_labels > 0
    assert answer(engine, medusa=True) == answer(engine, medusa=False)


def kill_after_shards(line: str, count: int) -> None:
    """Run a command in another process that is killed at the moment its shard number `count` is finished."""
    code = f"""
import os, signal
from engine.training.shards import ShardWriter
from test_training_commands import command
flush = ShardWriter.flush
def flush_and_die(writer):
    flush(writer)
    if writer.num_shards == {count}:
        os.kill(os.getpid(), signal.SIGKILL)
ShardWriter.flush = flush_and_die
command({line!r})
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is not on Windows")
def test_killed_runs_go_on_without_losing_or_repeating(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    data, out = tmp_path / "data", tmp_path / "h.safetensors"
    # Two at a time, a shard each: some answers are on disk and others under way when the run dies.
    line = f"distill --out {data} --prompts {tmp_path}/prompts.txt --max-answer 24 --shard-tokens 1 --slots 2"
    line += " --device cpu"
    kill_after_shards(line, 2)
    before, kept = read_index(data), [document.tokens for document in read_documents(data)]
    assert before is not None and len(before["shards"]) == len(kept) == 2
    assert command(line) == 0
    after, documents = read_index(data), list(read_documents(data))
    assert after is not None and after["shards"][:2] == before["shards"]
    assert [document.tokens for document in documents[:2]] == kept
    sources = [document.source for document in documents]
    assert len(sources) == len(set(sources)) > 2

    train = f"train --data {data} --out {out} --epochs 300 --save-every 0 {TINY}"
    kill_once(train, "loss")
    step = torch.load(out.with_suffix(".ckpt"), weights_only=True)["step"]
    assert step > 0 and not out.exists()
    capsys.readouterr()
    assert command(train.replace("--save-every 0", "--save-every 60")) == 0
    assert f"going on at step {step} of" in capsys.readouterr().err
    assert out.exists() and torch.load(out.with_suffix(".ckpt"), weights_only=True)["step"] > step


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("distill --out {0}/d", "needs --tokens"),
        ("distill --out {0}/d --prompts {0}/gone.txt", "cannot be read"),
        ("train --data {0} --out {0}/h.safetensors --recipe medusa2", "name a folder"),
        ("train --data {0} --out {0}/h.safetensors --start-heads {0}/gone.safetensors", "no heads at"),
        ("train --data {0} --out {0}/h.bin", ".safetensors"),
        ("train --data {0} --out {0}/h.safetensors", "holds no training data"),
        ("calibrate --heads {0}/gone.safetensors", "no heads at"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture, line: str, said: str) -> None:
    assert command(line.format(tmp_path)) == 2
    text = capsys.readouterr().err
    assert said in text and text.count("\n") == 1


def test_calibration_of_hand_made_ranks(tmp_path: Path) -> None:
    # Two answers of nine anchors: head 0 is right at rank 1, head 1 at rank 0, always.
    ranks = torch.tensor([[1, 0]] * 18, dtype=torch.uint8)
    measured = AnswerRanks(ranks, torch.tensor([0] * 9 + [1] * 9))
    found = calibrate(measured, sizes=(1, 2))
    assert found.order[:2] == [(1,), (1, 0)]
    # Both accepted with two nodes: every step takes three tokens.
    assert found.expected[:3] == [1.0, 2.0, 3.0]
    missed = AnswerRanks(torch.full((18, 2), MISSED, dtype=torch.uint8), measured.answer)
    assert tokens_per_step(found.order, missed, [2]) == [1.0]
    write_calibration(tmp_path / "h.tree.json", found)
    read = NestedTree.beside(tmp_path / "h.safetensors")
    assert read.order == tuple(found.order)
    assert read.expected[1] == tuple(found.expected)  # without figures of pruned trees, those of fixed ones
    flat = [1 + sum(len(node) == 1 for node in found.order[:size]) for size in range(len(found.order) + 1)]
    assert read.expected[0][:2] == (1.0, 2.0) and len(read.expected[0]) == flat[-1]


def test_parents_come_before_children_in_an_order() -> None:
    order = node_order(lambda path: 0.5 ** (len(path) + sum(path)), 3, 40)
    assert len(order) == len(set(order)) == 40
    assert all(len(node) == 1 or node[:-1] in order[:place] for place, node in enumerate(order))


@pytest.mark.parametrize(("storage", "tolerance"), [("float32", 0.0), ("bfloat16", 0.005), ("int8", 0.005)])
def test_heads_file_round_trip(tmp_path: Path, storage: str, tolerance: float) -> None:
    config = HeadsConfig(16, 40, num_heads=2, num_layers=2, width=8, sees="path", output="truncated", draft_vocab=5)
    heads = MedusaHeads(config, torch.tensor([3, 7, 11, 20, 39]))
    for parameter in heads.parameters():
        torch.nn.init.uniform_(parameter, -1, 1)
    save_heads(tmp_path / "h.safetensors", heads, {"base_model": "x"}, storage=storage)
    back = load_heads(tmp_path / "h.safetensors")
    assert back.config == config
    for name, tensor in heads.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor, rtol=0, atol=tolerance)
