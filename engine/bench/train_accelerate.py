"""Training on one and on two GPUs, killed and resumed, and over quantised backbones: same losses, tokens/s, memory.

    python -m engine.bench.train_accelerate --data DIR --model FILE.gguf --out DIR

DIR holds data-*.npz or shards. Every run is a process of its own, started through accelerate where it has several, with
its own time limit; one that fails is recorded and the next goes on. Needs a machine with two GPUs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from engine.bench.train_heads import import_data
from engine.bench.train_worker import Job
from engine.training.dataset import TextSet, load_text

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 8.0  # for a launcher that is told to end its processes


@dataclass(frozen=True)
class Run:
    """One run of the table: what to train, on how many GPUs, and for how long at most."""

    job: Job
    processes: int = 1
    gpu: int = 0
    limit_s: float = 60.0
    is_killed: bool = False


class Bench:
    """The runs' results so far; the file is written after each of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.start, self.port = args, time.monotonic(), 29510
        self.results: dict[str, dict[str, Any]] = {}
        self.summary: dict[str, Any] = {}
        args.out.mkdir(parents=True, exist_ok=True)
        args.work.mkdir(parents=True, exist_ok=True)

    def report(self, line: str) -> None:
        print(f"[{time.monotonic() - self.start:6.1f} s] {line}", file=sys.stderr, flush=True)

    def left(self) -> float:
        return self.args.time_limit - (time.monotonic() - self.start)

    def together(self, *runs: Run) -> None:
        """Start runs at the same moment, each on its own GPU, and wait for all."""
        if self.left() < GRACE_SECONDS + 15:
            self.report(f"no time left for {', '.join(run.job.name for run in runs)}")
            return
        started = [(run, self._begin(run), time.monotonic()) for run in runs]
        for run, process, began in started:
            self.results[run.job.name] = self._end(run, process, began)
            self.report(f"{run.job.name}: {json.dumps(self._short(run.job.name))}")
        self.write()

    def write(self) -> None:
        about = {"torch": torch.__version__, "hardware": _hardware(), "settings": vars(self.args)}
        content = {"about": about, "runs": self.results, "summary": self.summary}
        (self.args.out / "results.json").write_text(json.dumps(content, indent=1, default=str))

    def losses(self, name: str) -> dict[int, float]:
        """Return a run's mean losses by the step that ends them, without parts of an interval."""
        rows, every = self.results.get(name, {}).get("rows", []), self.args.report_steps
        return {row["step"]: row["loss"] for row in rows if row["step"] - row["since"] == every}

    def _begin(self, run: Run) -> subprocess.Popen:
        job = json.dumps(asdict(run.job))
        worker = ["-m", "engine.bench.train_worker", job]
        command = [sys.executable, *worker]
        environment = {**os.environ, "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        if run.processes > 1:
            self.port += 1
            start = ["--multi_gpu", "--num_processes", str(run.processes), "--main_process_port", str(self.port)]
            command = [sys.executable, "-m", "accelerate.commands.launch", *start, *worker]
        elif self.args.device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = str(run.gpu)
        log = (self.args.work / f"{run.job.name.replace(' ', '_')}.log").open("w")
        with log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)

    def _end(self, run: Run, process: subprocess.Popen, began: float) -> dict[str, Any]:
        limit = max(1.0, min(run.limit_s - (time.monotonic() - began), self.left() - GRACE_SECONDS))
        result: dict[str, Any] = {"job": asdict(run.job), "processes": run.processes}
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            result["failure"], code = f"took more than {limit:.0f} s", _stop(process)
        result |= {"wall_s": round(time.monotonic() - began, 1), "exit_code": code}
        log = Path(run.job.log)
        if log.is_file():
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            result["rows"] = [line for line in lines if "step" in line]
            for line in lines:
                result |= {} if "step" in line else line
        if (code != 0) != run.is_killed:
            text = (self.args.work / f"{run.job.name.replace(' ', '_')}.log").read_text(errors="replace")
            result.setdefault("failure", text[-3000:])
            self.report(text[-1500:])
        return result

    def _short(self, name: str) -> dict[str, Any]:
        result = self.results[name]
        rows = result.get("rows", [])
        short = {key: value for key, value in result.items() if key not in ("rows", "job", "failure")}
        if rows:
            speeds = [row["tokens_per_second"] for row in rows[1:] or rows]
            short |= {"step": rows[-1]["step"], "loss": rows[-1]["loss"], "tokens_per_second": round(median(speeds))}
        return short | ({"failed": True} if "failure" in result else {})


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    bench = Bench(args)
    try:
        _run_all(bench)
    finally:
        bench.summary |= _summary(bench)
        bench.write()
        print(json.dumps(bench.summary, indent=1))
    return 0


def _run_all(bench: Bench) -> None:
    args = bench.args
    data = args.work / "text.pt"
    text = _chosen(import_data(args.data) if any(args.data.glob("data-*.npz")) else load_text(args.data), args)
    torch.save({name: getattr(text, name) for name in ("tokens", "labels", "lengths", "greedy")}, data)
    bench.report(f"{text.num_documents:,} conversations, {text.num_tokens:,} tokens")

    def job(name: str, **settings: object) -> Job:
        common = {"model": args.model, "device": args.device, "data": str(data), "report_steps": args.report_steps}
        shape = {"batch_tokens": args.batch_tokens, "steps": args.steps, "log": str(args.work / f"{name}.jsonl")}
        (args.work / f"{name}.jsonl").unlink(missing_ok=True)
        return Job(name=name, **{**common, **shape, **settings})  # type: ignore[arg-type]

    checkpoint, copied = args.work / "killed.ckpt", args.work / "copied.ckpt"
    die, stop = args.steps // 3, args.steps // 2
    bench.together(Run(job("medusa1-1"), limit_s=args.long_s))
    bench.together(Run(job("medusa1-2"), processes=2, limit_s=args.long_s))
    saved = {"checkpoint": str(checkpoint), "checkpoint_seconds": args.checkpoint_seconds}
    killed = job("medusa1-2-killed", die_at=die, **saved)
    bench.together(Run(killed, processes=2, limit_s=args.short_s, is_killed=True))
    if checkpoint.is_file():
        copied.write_bytes(checkpoint.read_bytes())
    bench.together(Run(job("medusa1-2-resumed", stop_at=stop, **saved), processes=2, limit_s=args.short_s))
    formats = {"steps": args.short_steps, "batch_tokens": args.batch_tokens // 2}
    bench.together(
        Run(job("medusa1-nf4", quantize="nf4", **formats), limit_s=args.short_s),
        Run(job("medusa1-int8", quantize="int8", **formats), gpu=1, limit_s=args.short_s),
    )
    joint = {"recipe": "medusa2", "steps": args.joint_steps}
    bench.together(
        Run(job("medusa2-1", **joint), limit_s=args.short_s),
        Run(job("medusa1-resumed-on-1", stop_at=stop, checkpoint=str(copied)), gpu=1, limit_s=args.short_s),
    )
    bench.together(Run(job("medusa2-2", **joint), processes=2, limit_s=args.short_s))
    bench.together(
        Run(job("medusa2-nf4", quantize="nf4", **joint), limit_s=args.short_s),
        Run(job("medusa1-plain", **formats), gpu=1, limit_s=args.short_s),
    )


def _summary(bench: Bench) -> dict[str, object]:
    """Return what the runs say: speeds, memory, and how far losses at the same step are apart."""
    pairs = {
        "medusa1, 2 GPUs": ("medusa1-1", "medusa1-2"),
        "medusa1, killed and resumed on 2": ("medusa1-2", "medusa1-2-resumed"),
        "medusa1, killed on 2 and resumed on 1": ("medusa1-2", "medusa1-resumed-on-1"),
        "medusa2, 2 GPUs": ("medusa2-1", "medusa2-2"),
    }
    apart = {}
    for title, (one, other) in pairs.items():
        ours, theirs = bench.losses(one), bench.losses(other)
        common = sorted(set(ours) & set(theirs))
        if common:
            gaps = [abs(ours[step] - theirs[step]) for step in common]
            apart[title] = {"steps": [common[0], common[-1]], "largest": max(gaps), "last": gaps[-1]}
    return {
        "runs": {name: bench._short(name) for name in bench.results},
        "losses_apart": apart,
        "failed": [name for name, result in bench.results.items() if "failure" in result],
        "seconds": round(time.monotonic() - bench.start, 1),
    }


def _chosen(text: TextSet, args: argparse.Namespace) -> TextSet:
    order = torch.randperm(text.num_documents, generator=torch.Generator().manual_seed(3))
    return text.select(order[text.lengths[order].cumsum(0) <= args.max_tokens])


def _stop(process: subprocess.Popen) -> int:
    """End a run; its launcher, told so, ends its processes first."""
    process.terminate()
    try:
        return process.wait(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def _hardware() -> str:
    if not torch.cuda.is_available():
        return "CPU"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/train_accelerate"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--time-limit", type=float, default=290, help="seconds for everything")
    parser.add_argument("--long-s", type=float, default=95, help="limit of the two long runs")
    parser.add_argument("--short-s", type=float, default=50, help="limit of the others")
    parser.add_argument("--max-tokens", type=int, default=8_000_000, help="of the data")
    parser.add_argument("--batch-tokens", type=int, default=32768, help="a step, of all processes together")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--short-steps", type=int, default=300)
    parser.add_argument("--joint-steps", type=int, default=60)
    parser.add_argument("--report-steps", type=int, default=20)
    parser.add_argument("--checkpoint-seconds", type=float, default=2)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
