"""Where an engine's time on a GPU goes: steps by tree size, drafting and verifying, kernel by kernel, by context."""

import time
from functools import partial
from statistics import median
from typing import Any

import torch

from engine.bench.gpu_loaded import EngineOnGpu
from engine.bench.gpu_report import Report
from engine.bench.gpu_timing import kernel_times
from engine.captured_decode import CapturedLoop

__all__ = ["contexts", "draft_and_verify", "profile_step", "step_times"]

NODES = (1, 2, 3, 5, 8, 9, 12, 16, 17, 24, 32, 33, 48, 63, 64)  # with the root
CONTEXTS = (100, 1000, 4000)


def step_times(bench: EngineOnGpu, report: Report) -> dict[str, Any]:
    """Milliseconds a step by nodes at 500 committed rows: on the GPU alone, and as the loop gets them."""
    found: dict[str, Any] = {}
    for nodes in NODES:
        tree = bench.tree(nodes - 1)
        drafter = bench.drafter if nodes > 1 else None
        captures = len(bench.runner.graphs.capture_seconds)
        bench.prefill(500)
        steps = CapturedLoop(bench.runner, drafter).steps(tree)
        for _ in range(4):
            next(steps)
        started = time.perf_counter()
        for _ in range(40):
            next(steps)
        loop = (time.perf_counter() - started) / 40 * 1e3
        steps.close()
        seconds = list(bench.runner.graphs.capture_seconds.values())[captures:]
        found[str(nodes)] = {
            "gpu_ms": round(bench.replay_ms(("step", tree, drafter)), 4),
            "loop_ms": round(loop, 4),
            "capture_s": round(sum(seconds), 3),
        }
    return found


def draft_and_verify(bench: EngineOnGpu, report: Report) -> dict[str, Any]:
    """Milliseconds of drafting alone and of the backbone alone, captured."""
    found: dict[str, Any] = {}
    for drafted in (4, 15, 31, 63):
        bench.prefill(500)
        tree = bench.tree(drafted)
        for _ in range(2):
            draft = bench.drafter.draft(bench.runner.memory.state[0].clone(), 5, tree)
            bench.runner.verify(torch.tensor(draft.tokens), tree)
        found[str(drafted)] = {
            "draft_ms": bench.replay_ms(("draft", tree, bench.drafter)),
            "verify_ms": bench.replay_ms(("verify", tree)),
        }
    found["chunk_ms"] = {str(rows): _chunk_ms(bench, rows) for rows in (16, 64)}
    return found


def profile_step(bench: EngineOnGpu, report: Report) -> dict[str, Any]:
    """Microseconds by kernel of one eager step with a tree, as torch's profiler sees them."""
    found: dict[str, Any] = {}
    for drafted in (0, 15):
        bench.prefill(500)
        tree, drafter = bench.tree(drafted), bench.drafter if drafted else None
        plan = bench.runner.plan(tree, drafter)
        times = kernel_times(partial(bench.runner._launch_step, plan, drafter))
        found[str(drafted)] = {name[:60]: [count, us] for name, (us, count) in list(times.items())[:14]}
    return found


def contexts(bench: EngineOnGpu, report: Report) -> dict[str, Any]:
    """Time to the first token, and tokens per second with and without Medusa, by prompt tokens."""
    found: dict[str, Any] = {}
    for context in CONTEXTS:
        bench.prefill(context)  # the cache has grown, its launches are captured
        bench.prefill(context)
        firsts = []
        for _ in range(5):
            started = time.perf_counter()
            bench.prefill(context)
            firsts.append((time.perf_counter() - started) * 1e3)
        found[str(context)] = {"first_token_ms": round(median(firsts), 2), "capacity": bench.runner.memory.capacity}
        for name, drafted in (("off", 0), ("on", bench.best)):
            found[str(context)][name] = _speed(bench, drafted, context)
    return found


def _chunk_ms(bench: EngineOnGpu, rows: int) -> float:
    for _ in range(2):
        bench.prefill(rows)
    return bench.replay_ms(("chunk", rows))


def _speed(bench: EngineOnGpu, drafted: int, context: int) -> float:
    bench.prefill(context)
    steps = CapturedLoop(bench.runner, bench.drafter if drafted else None).steps(bench.tree(drafted))
    for _ in range(4):
        next(steps)
    started, tokens = time.perf_counter(), 0
    while tokens < 200:
        tokens += len(next(steps).tokens)
    speed = tokens / (time.perf_counter() - started)
    steps.close()
    return round(speed, 1)
