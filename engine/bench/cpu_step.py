"""Time one decode step of the bundled model on the CPU kernels, by rows and context, part by part.

`python -m engine.bench.cpu_step` prints a table: medians over repeats that go round all sizes, so that a busy moment of
the machine falls on all of them alike; beside each the fastest run. Nothing is kept; it only measures.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.models.loader import open_model
from engine.native_runner import NativeRunner
from engine.tree import CandidateTree

__all__ = ["StepTime", "format_table", "measure_steps", "read_speed"]

ROWS = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (100, 1000, 4000)
REPEATS = 15
_LINEARS = ("qkv", "output", "gate_up", "down")


@dataclass(frozen=True)
class StepTime:
    """One size's times in milliseconds; parts and totals are medians, `best_ms` is the fastest whole step."""

    context: int
    rows: int
    linears_ms: float
    attention_ms: float
    rest_ms: float
    lm_head_ms: float
    total_ms: float
    best_ms: float


def measure_steps(
    runner: NativeRunner,
    contexts: Sequence[int] = CONTEXTS,
    rows: Sequence[int] = ROWS,
    repeats: int = REPEATS,
    progress: Callable[[str], None] = lambda text: None,
) -> list[StepTime]:
    """Time verify and greedy for trees of each size behind each context; the runner's text is lost."""
    found = []
    for context in contexts:
        progress(f"context of {context} tokens")
        runner.truncate(0)
        runner.prefill([_token(runner, place) for place in range(context)])
        samples: dict[int, list[dict[str, float]]] = {count: [] for count in rows}
        for _ in range(repeats + 1):
            for count in rows:
                samples[count].append(_time_step(runner, bush(count)))
        found += [_summary(context, count, taken[1:]) for count, taken in samples.items()]  # the first warms up
    return found


def bush(num_nodes: int) -> CandidateTree:
    """Build a tree in which each node has up to three children, level by level."""
    choices: list[tuple[int, ...]] = [()]
    for parent in choices:
        choices += [(*parent, rank) for rank in range(3)][: num_nodes - len(choices)]
        if len(choices) == num_nodes:
            break
    return CandidateTree.from_choices(choices[1:])


def _token(runner: NativeRunner, place: int) -> int:
    return (place % 1000 + 100) % runner.config.vocab_size


def _time_step(runner: NativeRunner, tree: CandidateTree) -> dict[str, float]:
    tokens = [_token(runner, node) for node in range(tree.num_nodes)]
    started = time.perf_counter()
    with runner.measure() as parts:
        hidden = runner.verify(tokens, tree)
    verified = time.perf_counter()
    runner.greedy(hidden)
    done = time.perf_counter()
    linears = sum(parts[name] for name in _LINEARS)
    rest = verified - started - linears - parts["attention"]
    return {
        "linears_ms": linears * 1e3,
        "attention_ms": parts["attention"] * 1e3,
        "rest_ms": rest * 1e3,
        "lm_head_ms": (done - verified) * 1e3,
        "total_ms": (done - started) * 1e3,
    }


def _summary(context: int, rows: int, samples: Sequence[dict[str, float]]) -> StepTime:
    medians = {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}
    return StepTime(context, rows, **medians, best_ms=min(sample["total_ms"] for sample in samples))


def read_speed(num_bytes: int = 256_000_000) -> float:
    """Return how fast this machine reads memory with torch's threads, in bytes a second: the bound of a step."""
    data = torch.ones(num_bytes // 8, dtype=torch.int64)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - started)
    return num_bytes / best


def format_table(times: Sequence[StepTime]) -> str:
    """Return the times as a Markdown table."""
    lines = [
        "| context | rows | linears | attention | rest | lm_head | step, ms | fastest | to 1 row |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    single = {item.context: item.total_ms for item in times if item.rows == 1}
    for item in times:
        parts = (item.linears_ms, item.attention_ms, item.rest_ms, item.lm_head_ms, item.total_ms, item.best_ms)
        cells = [str(item.context), str(item.rows), *(f"{part:.2f}" for part in parts)]
        cells.append(f"{item.total_ms / single[item.context]:.2f}x" if item.context in single else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    model = open_model("bundled")
    runner = NativeRunner(model.config, model.weights, source_format=model.weight_format)
    torch.set_num_threads(runner.threads.count)
    speed, weights = read_speed(), runner.memory_bytes()
    print(f"{model.name}: {runner.weights}; {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs")
    print(
        f"Memory reads at {speed / 1e9:.0f} GB/s, so {weights / 1e6:.0f} MB of weights cannot be read in less than "
        f"{weights / speed * 1e3:.2f} ms."
    )
    print(format_table(measure_steps(runner)))


if __name__ == "__main__":
    main()
