"""One run of `train_accelerate`, in a process (or several) of its own: `python -m engine.bench.train_worker JOB`.

JOB is a `Job` as JSON. Figures go to its log, one JSON object a line: a row for every report, then what is known at the
end. A job may let its last process kill itself at a step, or stop at one as a person would.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.heads import HeadsConfig
from engine.models.heads_file import load_heads
from engine.models.loader import bundled_heads_path
from engine.training.dataset import TextSet, build_cache, most_used_tokens
from engine.training.dense import TrainingModel, load_model
from engine.training.kernel_checks import check_kernels
from engine.training.loop import TrainingLoop, TrainingPlan
from engine.training.medusa1 import HeadTrainer, Vocabulary, build_heads
from engine.training.medusa2 import JointPlan, JointTrainer
from engine.training.processes import Processes, open_processes
from engine.training.ranks import measure_ranks
from engine.training.windows import build_lanes

HELD_BACK = 200  # conversations that only the top-1 at the end is measured on
DRAFT_VOCAB, WIDTH = 16384, 2048


@dataclass(frozen=True)
class Job:
    """What to train; `die_at` and `stop_at` are steps, 0 for never, and `log` and `checkpoint` are files."""

    name: str
    model: str
    device: str
    data: str
    log: str
    steps: int
    batch_tokens: int
    report_steps: int
    recipe: str = "medusa1"
    quantize: str = "none"
    checkpoint: str = ""
    checkpoint_seconds: float = 1e9
    die_at: int = 0
    stop_at: int = 0


class Stopped(Exception):
    """The job's last step is reached."""


def main(argv: list[str]) -> int:
    job = Job(**json.loads(argv[0]))
    start = time.monotonic()
    torch.set_float32_matmul_precision("highest")
    processes = open_processes(job.device)
    say = processes.spoken(lambda line: print(f"[{time.monotonic() - start:6.1f} s] {line}", flush=True))
    text = TextSet(**torch.load(job.data, weights_only=True))
    held, train = (text.select(part) for part in _parts(text))
    model = load_model(job.model, job.device, quantize=job.quantize)
    say(f"{model.name} loaded")
    if job.device == "cuda":
        check_kernels(say)
    train_job(job, model, train, held, processes, say, start)
    return 0


def train_job(
    job: Job,
    model: TrainingModel,
    train: TextSet,
    held: TextSet,
    processes: Processes,
    say: Callable[[str], None],
    start: float,
) -> None:
    """Train, write the log, and measure the heads on held-back text where the recipe leaves the model alone."""
    trainer = _trainer(job, model, train, processes, say)
    first_step = trainer.step
    _watch(job, trainer, processes)
    began = time.monotonic()
    try:
        trainer.run(say)
    except Stopped:
        say(f"stopped at step {trainer.step}")
    figures: dict[str, object] = {
        "first_step": first_step,
        "setup_s": round(began - start, 1),
        "training_s": round(time.monotonic() - began, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if job.device == "cuda" else None,
        "weights_gib": round(_bytes_of(model) / 2**30, 4),
    }
    processes.close()
    if processes.is_first:
        if isinstance(trainer, HeadTrainer):
            ranks = measure_ranks(
                trainer.heads, build_cache(model, held, heads=trainer.heads), trainer.vocabulary
            ).ranks
            figures["top1_held_back"] = [round(value, 4) for value in (ranks < 1).float().mean(0).tolist()]
        _write(job, figures)


def _trainer(
    job: Job, model: TrainingModel, train: TextSet, processes: Processes, say: Callable[[str], None]
) -> TrainingLoop:
    plan: dict[str, Any] = {
        "epochs": job.steps * job.batch_tokens / train.num_tokens,
        "batch_tokens": job.batch_tokens,
        "report_steps": job.report_steps,
        "report_seconds": float("inf"),
        "checkpoint_seconds": job.checkpoint_seconds,
        "warmup_steps": max(1, min(100, job.steps // 10)),
    }
    checkpoint = Path(job.checkpoint) if job.checkpoint else None
    if job.recipe == "medusa2":
        heads = load_heads(bundled_heads_path()).to(model.device)
        vocabulary = Vocabulary(model, heads.token_map)
        return JointTrainer(model, heads, vocabulary, train, JointPlan(**plan), checkpoint, processes)
    config = model.backbone.config
    vocabulary = Vocabulary(model, most_used_tokens(train, DRAFT_VOCAB, config.vocab_size))
    shape: dict[str, Any] = {"num_layers": 2, "width": WIDTH, "sees": "path", "output": "truncated"}
    shape |= {"draft_vocab": vocabulary.rows.shape[0], "frequent_first": True}
    heads = build_heads(HeadsConfig(config.hidden_size, config.vocab_size, **shape), vocabulary)
    lanes = build_lanes(model, train, TrainingPlan.window, processes, say)
    say(f"{lanes.cache.num_tokens:,} of {lanes.num_tokens:,} tokens here")
    return HeadTrainer(heads, vocabulary, lanes, TrainingPlan(**plan), checkpoint, processes)


def _watch(job: Job, trainer: TrainingLoop, processes: Processes) -> None:
    """Log every report with its steps; die or stop where the job says so."""
    learn, tell, since = trainer.train_step, trainer.report, trainer.step

    def train_step(share: float) -> bool:
        if job.die_at == trainer.step and job.die_at and processes.index == processes.count - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if job.stop_at and trainer.step >= job.stop_at:
            raise Stopped
        return learn(share)

    def report(share: float, seconds: float, say: Callable[[str], None]) -> dict[str, float]:
        nonlocal since
        figures = tell(share, seconds, say)
        if processes.is_first:
            _write(job, {"step": trainer.step, "since": since, **figures})
        since = trainer.step
        return figures

    trainer.train_step, trainer.report = train_step, report  # type: ignore[assignment, method-assign]


def _write(job: Job, row: dict[str, object]) -> None:
    with open(job.log, "a", encoding="utf-8") as log:
        log.write(json.dumps(row) + "\n")


def _parts(text: TextSet) -> tuple[torch.Tensor, torch.Tensor]:
    held = min(HELD_BACK, text.num_documents // 10)
    return torch.arange(text.num_documents).split([held, text.num_documents - held])


def _bytes_of(model: TrainingModel) -> int:
    """Count the backbone's bytes once each, a tied matrix too; nested statistics of nf4 (0.5 %) are left out."""
    tensors = {item.data_ptr(): item for item in (*model.backbone.parameters(), *model.backbone.buffers())}
    return sum(item.numel() * item.element_size() for item in tensors.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
