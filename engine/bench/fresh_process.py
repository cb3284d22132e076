"""A process that loads the engine, answers, and reports what that took: `python -m engine.bench.fresh_process`.

The parent (`time_to_answer`, `measure_memory`) sees what a person sees: everything from the start of Python on.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["Setup", "measure_memory", "time_to_answer"]

Setup = dict[str, Any]  # model, device, quantize, heads: the arguments of Engine.load
_CONTEXT, _ANSWER = 1000, 64


def time_to_answer(setup: Setup) -> float:
    """Return the seconds from the start of a process to its first token."""
    started = time.perf_counter()
    with _start(setup, "first-token") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - started
        process.stdout.read()
    if process.returncode or not line:
        raise RuntimeError(f"A fresh process could not answer; it ended with status {process.returncode}.")
    return seconds


def measure_memory(setup: Setup) -> dict[str, Any]:
    """Return what a fresh process held while it answered, beside what the engine says that it holds."""
    with _start(setup, "memory") as process:
        assert process.stdout is not None
        text = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"Memory could not be measured; the process ended with status {process.returncode}.")
    return json.loads(text.splitlines()[-1])


def _start(setup: Setup, task: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "engine.bench.fresh_process", task, json.dumps(setup)]
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def _answer_first(setup: Setup) -> None:
    from engine import SamplingParams
    from engine.bench.loading import load_engine

    engine = load_engine(**setup)
    for chunk in engine.stream([{"role": "user", "content": "Name three colours."}], SamplingParams(max_tokens=1)):
        if chunk.tokens:
            print("first token", flush=True)


def _memory(setup: Setup) -> dict[str, Any]:
    from engine.bench.contenders import Own
    from engine.bench.contexts import prompt_of
    from engine.bench.loading import load_engine
    from engine.decode import PLAIN

    on_gpu = _gpu_memory(setup["device"])
    tokenizer = 0 if on_gpu else _tokenizer_bytes(setup["model"])
    before = on_gpu() if on_gpu else _resident()
    engine = load_engine(**setup)
    loaded = on_gpu() if on_gpu else _resident()
    chosen = engine._tuner.tree if engine._tuner else PLAIN
    length = min(_CONTEXT, engine.info.max_context - 2 * _ANSWER)
    _reset_peak(bool(on_gpu))
    for tree in dict.fromkeys((PLAIN, chosen)):
        Own(engine, tree).run(prompt_of(engine, length), _ANSWER, frozenset())
    peak = (on_gpu() if on_gpu else _peak()) - before
    engine._runner.prefill(prompt_of(engine, length + _ANSWER))  # the cache as it was at the answer's end
    parts = {**engine.memory_table(), "tokenizer (measured)": tokenizer}
    held = sum(parts.values())
    return {
        "where": "GPU memory" if on_gpu else "anonymous memory of the process",
        "context": length,
        "parts_bytes": parts,
        "held_bytes": held,
        "after_loading_bytes": loaded - before,
        "peak_bytes": peak,
        "peak_over_held": round(peak / held, 3),
    }


def _tokenizer_bytes(model: str) -> int:
    """Return what a tokenizer's tables add to this process, which then gives them back."""
    import gc

    from engine.build import return_freed_memory
    from engine.models.loader import open_model

    open_model(model)  # whatever is loaded once only comes now
    sizes = []
    for keep in (False, True):
        kept = open_model(model).tokenizer if keep else None
        gc.collect()
        return_freed_memory()
        sizes.append(_resident())
    del kept
    gc.collect()
    return_freed_memory()
    return max(0, sizes[1] - sizes[0])


def _gpu_memory(device: str) -> Any:
    """Return a function that tells the GPU's used bytes, or None on a CPU."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return None
    torch.zeros(1, device="cuda")  # the context is the driver's, not the engine's

    def used() -> int:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free

    return used


def _resident(field: str = "VmRSS") -> int:
    """Return this process's resident bytes (VmHWM: their peak) without pages of files: mostly libraries.

    Raises OSError where there is no /proc.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
    return 1024 * (sizes[field] - sizes["RssFile"])


def _peak() -> int:
    return _resident("VmHWM")


def _reset_peak(is_gpu: bool) -> None:
    if not is_gpu:
        Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("first-token", "memory"))
    parser.add_argument("setup", type=json.loads)
    args = parser.parse_args()
    if args.task == "first-token":
        _answer_first(args.setup)
    else:
        print(json.dumps(_memory(args.setup)))


if __name__ == "__main__":
    main()
