"""Training on two processes: the same as on one, no text twice, one writer, one voice, killed and resumed."""

import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_prefix_attention import PREFIX
from test_training_commands import command
from test_training_medusa2 import random_text, small_heads, small_model

from engine.errors import InvalidParameterError
from engine.training import loop
from engine.training.dataset import TextSet
from engine.training.loop import TrainingLoop, TrainingPlan
from engine.training.medusa1 import HeadTrainer, Vocabulary, build_heads
from engine.training.medusa2 import JointPlan, JointTrainer
from engine.training.processes import ALONE, Processes, open_processes
from engine.training.shards import Document, ShardWriter
from engine.training.windows import Lanes, WindowBatches, build_lanes

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("medusa1", "medusa2")
LOOKING_BACK = ("medusa1 looking back", "medusa2 looking back")  # heads with a prefix attention
PLAN = TrainingPlan(
    epochs=4.0, batch_tokens=256, window=32, learning_rate=1e-3, warmup_steps=2, checkpoint_seconds=0, report_steps=3
)
JOINT_PLAN = JointPlan(**{**vars(PLAN), "batch_tokens": 400}, lambda0=0.5, heads_first=0.3, ramp=0.3)


def make_trainer(
    recipe: str, checkpoint: Path | None, processes: Processes = ALONE, text: TextSet | None = None
) -> TrainingLoop:
    """A small trainer in float32, where what is left of a difference is the order of sums.

    AdamW divides a gradient by its own size, so the rounding of one near zero becomes a step; not with a large eps.
    """
    trainer = _make_trainer(recipe, checkpoint, processes, text)
    for group in trainer.optimizer.param_groups:
        group["eps"] = 1e-3
    return trainer


def _make_trainer(recipe: str, checkpoint: Path | None, processes: Processes, text: TextSet | None) -> TrainingLoop:
    model, text = small_model(), random_text() if text is None else text
    vocabulary = Vocabulary(model, torch.arange(0, 150))
    prefix = PREFIX if recipe in LOOKING_BACK else None
    heads = build_heads(replace(small_heads(vocabulary), prefix=prefix), vocabulary)
    if recipe.startswith("medusa2"):
        return JointTrainer(model, heads, vocabulary, text, JOINT_PLAN, checkpoint, processes)
    layers = () if prefix is None else prefix.layers
    lanes = build_lanes(model, text, PLAN.window, processes, layers=layers)
    return HeadTrainer(heads, vocabulary, lanes, PLAN, checkpoint, processes)


def unlabelled(text: TextSet) -> TextSet:
    """Leave labels in the longest document alone, and one label in another: one process has nothing to learn from."""
    labels = torch.zeros_like(text.labels)
    ends = text.lengths.cumsum(0)
    longest = int(text.lengths.argmax())
    labels[int(ends[longest]) - 4 : int(ends[longest])] = 1
    labels[int(ends[0 if longest else 1]) - 1] = 1
    return replace(text, labels=labels)


def run_part(folder: str, recipe: str, die_at: int = 0, is_bare: bool = False) -> None:
    """What each process of a test runs: train, and write what it saw under its number."""
    torch.set_num_threads(1)
    processes = open_processes("cpu")
    out, number, saves = Path(folder), processes.index, []
    save = loop.save_checkpoint
    loop.save_checkpoint = lambda *args: (saves.append(1), save(*args))  # type: ignore[assignment]
    text = unlabelled(random_text()) if is_bare else None
    trainer = make_trainer(recipe, out / "run.ckpt", processes, text)
    step = trainer.train_step

    def die_or_learn(share: float) -> bool:
        if die_at and trainer.step == die_at and number == processes.count - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(share)

    trainer.train_step = die_or_learn  # type: ignore[method-assign]
    lines: list[str] = []
    trainer.run(lines.append)
    state = {"module": trainer.module.state_dict(), "lines": lines, "saves": len(saves), "step": trainer.step}
    torch.save(state, out / f"part-{number}.pt")
    processes.close()


def launch(folder: Path, recipe: str, count: int = 2, die_at: int = 0, is_bare: bool = False) -> list[int]:
    """Start `run_part` in `count` processes and return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = f"from test_training_processes import run_part; run_part({str(folder)!r}, {recipe!r}, {die_at}, {is_bare})"
    common = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env={**common, "RANK": str(number), "LOCAL_RANK": str(number)})
        for number in range(count)
    ]
    return [process.wait(timeout=120) for process in started]


def part(folder: Path, number: int) -> dict:
    return torch.load(folder / f"part-{number}.pt", weights_only=True)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-5, msg=lambda text, name=name: name + text)


def numbers(line: str) -> list[float]:
    """Return what a line of progress says, but for the speed at its end."""
    return [float(found) for found in re.findall(r"\d+(?:\.\d+)?", line.rpartition(", ")[0])]


@pytest.mark.parametrize("recipe", RECIPES + LOOKING_BACK)
def test_two_processes_learn_what_one_does_with_the_same_step(tmp_path: Path, recipe: str) -> None:
    alone, fresh = make_trainer(recipe, None), make_trainer(recipe, None)
    said: list[str] = []
    alone.run(said.append)
    assert alone.step >= 5
    assert launch(tmp_path, recipe) == [0, 0]
    first, second = part(tmp_path, 0), part(tmp_path, 1)
    assert_same(alone.module.state_dict(), first["module"])
    assert all(torch.equal(tensor, second["module"][name]) for name, tensor in first["module"].items())
    begun, ended = fresh.module.state_dict(), alone.module.state_dict()
    moved = max(float((ended[name] - begun[name]).abs().max()) for name in ended.keys() & begun.keys())
    assert moved > 1e-3  # a hundred times the tolerance
    # One voice, with everybody's figures, and one writer.
    assert len(first["lines"]) == len(said) and not second["lines"]
    for ours, theirs in zip(said, first["lines"], strict=True):
        assert numbers(theirs) == pytest.approx(numbers(ours), abs=0.01)
    assert first["saves"] > 0 and second["saves"] == 0


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is not on Windows")
def test_a_killed_run_goes_on_with_another_number_of_processes(tmp_path: Path, recipe: str) -> None:
    whole = make_trainer(recipe, None)
    whole.run(lambda line: None)
    codes = launch(tmp_path, recipe, die_at=3)
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    resumed = make_trainer(recipe, tmp_path / "run.ckpt")
    assert resumed.step == 3
    resumed.run(lambda line: None)
    assert_same(whole.module.state_dict(), resumed.module.state_dict())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_of_one_goes_on_with_three(tmp_path: Path, recipe: str) -> None:
    whole, begun = make_trainer(recipe, None), make_trainer(recipe, tmp_path / "run.ckpt")
    whole.run(lambda line: None)
    learn = begun.train_step

    def stop_at_two(share: float) -> bool:
        if begun.step == 2:
            raise KeyboardInterrupt
        return learn(share)

    begun.train_step = stop_at_two  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        begun.run(lambda line: None)
    assert launch(tmp_path, recipe, count=3) == [0, 0, 0]
    assert part(tmp_path, 2)["step"] == whole.step
    assert_same(whole.module.state_dict(), part(tmp_path, 0)["module"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_process_with_nothing_to_learn_from_keeps_step(tmp_path: Path, recipe: str) -> None:
    alone = make_trainer(recipe, None, text=unlabelled(random_text()))
    alone.run(lambda line: None)
    assert all(bool(tensor.isfinite().all()) for tensor in alone.module.state_dict().values())
    assert launch(tmp_path, recipe, is_bare=True) == [0, 0]
    assert_same(alone.module.state_dict(), part(tmp_path, 0)["module"])


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_text_without_overlap(count: int) -> None:
    model, text = small_model(), random_text()
    whole = build_lanes(model, text, PLAN.window)
    shares = [Processes(index, count, torch.device("cpu")) for index in range(count)]
    parts = [build_lanes(model, text, PLAN.window, share) for share in shares]
    assert sorted(lane for own in parts for lane in own.own) == list(range(len(whole.sizes)))
    assert sum(own.cache.num_tokens for own in parts) == whole.num_tokens == text.num_tokens
    assert all(own.sizes == whole.sizes for own in parts)

    def learnt(lanes: Lanes, step: int) -> list[tuple[int, ...]]:
        """What a head would learn at: the hidden state's first number stands for the place in the text."""
        batch = WindowBatches(lanes, PLAN.window, 8, 3, seed=5).batch(step)
        if batch is None:
            return []
        places = batch.hidden[batch.rows, 0].tolist()
        return list(zip(places, batch.tokens[batch.rows].tolist(), batch.run.tolist(), strict=True))

    for step in range(6):
        together = [row for own in parts for row in learnt(own, step)]
        assert sorted(together) == sorted(learnt(whole, step)) != []


def test_an_epoch_of_windows_visits_almost_everything_once() -> None:
    lanes = build_lanes(small_model(), random_text(), PLAN.window)
    batches = WindowBatches(lanes, PLAN.window, 1, 3, seed=0)
    assert len(lanes.sizes) > 1
    starts = [start for step in range(batches.num_steps) for start, _ in batches._windows(step)]
    assert len(starts) == len(set(starts)) == batches.num_slots
    gaps = [later - sooner for sooner, later in zip(sorted(starts), sorted(starts)[1:], strict=False)]
    assert min(gaps) >= PLAN.window
    assert len(starts) * PLAN.window > 0.7 * lanes.num_tokens  # the rest is each lane's odd end


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_broken_checkpoint_is_told_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.ckpt").write_bytes(content)
    with pytest.raises(InvalidParameterError, match=r"run\.ckpt is no checkpoint"):
        make_trainer("medusa1", tmp_path / "run.ckpt")


SCRIPT = """
import os, pathlib, sys
sys.path[:0] = {paths!r}
from test_training_commands import command
pathlib.Path({folder!r}, "pid-" + os.environ["RANK"]).write_text(str(os.getpid()))
sys.exit(command({line!r}))
"""


def write_data(folder: Path) -> None:
    """Conversations of the bundled model's tokens, short enough for a CPU."""
    writer = ShardWriter(folder, {"model": "SmolLM2-135M-Instruct.Q4_1"}, 10_000)
    for number in range(30):
        writer.add(Document([7 * (number + place) for place in range(40)], [(4, 40)], is_greedy=True, source=number))
    writer.flush()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is not on Windows")
def test_accelerate_launches_the_command_and_a_killed_run_goes_on_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_data(tmp_path / "data")
    out = tmp_path / "h.safetensors"
    tiny = "--width 64 --draft-vocab 256 --batch-tokens 512 --device cpu"
    line = f"train --data {tmp_path}/data --out {out} --epochs 1000 {tiny}"
    paths, script = [str(ROOT), str(ROOT / "tests")], tmp_path / "train.py"
    script.write_text(SCRIPT.format(paths=paths, folder=str(tmp_path), line=line + " --save-every 0 --time-limit 60"))
    start = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    launcher = subprocess.Popen([sys.executable, *start, str(script)], stderr=subprocess.PIPE, text=True)
    assert launcher.stderr is not None
    said = []
    with launcher.stderr:
        for text in launcher.stderr:
            said.append(text)
            if "loss" in text:
                os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
                break
        launcher.stderr.read()
    assert launcher.wait() != 0 and "2 processes share every step of 512 tokens" in "".join(said)
    step = torch.load(out.with_suffix(".ckpt"), weights_only=True)["step"]
    assert step > 0 and not out.exists()
    # The step's tokens are the stopped run's, also where they are not given again.
    assert command(line.replace("--batch-tokens 512", "--time-limit 10")) == 0
    assert f"going on at step {step} of" in capsys.readouterr().err and out.exists()
