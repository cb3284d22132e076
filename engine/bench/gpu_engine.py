"""Check and time the engine on a GPU: `python -m engine.bench.gpu_engine --model FILE.gguf --heads FILE --out DIR`.

For each weight format: loading, identical text with every tree, speed with Medusa on and off in turns, step times by
tree size, captures, first token and speed by context, memory; then transformers' `generate` beside it. Results are
written after each part; a part that fails is reported and the others go on. `--skip` leaves parts out, such as
`--skip tests transformers`.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from engine import GenerationResult
from engine.bench.gpu_engine_times import contexts, draft_and_verify, profile_step, step_times
from engine.bench.gpu_loaded import EngineOnGpu
from engine.bench.gpu_report import Report, environment

SIZES = (4, 8, 15, 16, 31, 63)  # drafted nodes
# Without "load" the other parts of a format have nothing to ask.
CAN_SKIP = (
    "toggle", "steps", "parts", "profile", "contexts", "sampled", "memory", "toggle 80", "load again", "tests",
    "transformers",
)  # fmt: skip


def toggle(bench: EngineOnGpu, prompts: int, sizes: tuple[int, ...], until: float) -> Callable[[Report], Any]:
    """Answer each prompt plainly and with every tree, one after the other; count the answers that differ."""

    def part(report: Report) -> dict[str, Any]:
        rows: dict[int, list[GenerationResult]] = {size: [] for size in (0, *sizes)}
        for size in rows:  # captured before anything is timed
            bench.answer(bench.prompts[-1], size, 24)
        for prompt in bench.prompts[:prompts]:
            if report.elapsed > report.limit * until:
                break
            for size, results in rows.items():
                results.append(bench.answer(prompt, size, 256))
        differ = {
            size: [i for i, (a, b) in enumerate(zip(results, rows[0], strict=True)) if a.tokens != b.tokens]
            for size, results in rows.items()
        }
        speeds = {size: median(result.tokens_per_second for result in results) for size, results in rows.items()}
        bench.best = max(sizes, key=speeds.__getitem__)
        return {
            "prompts": len(rows[0]),
            "tokens": sum(len(result.tokens) for result in rows[0]),
            "differ": differ,
            "tokens_per_second": {size: round(speed, 1) for size, speed in speeds.items()},
            "tokens_per_step": {s: round(mean(r.tokens_per_step for r in rs), 3) for s, rs in rows.items()},
            "on_over_off": round(speeds[bench.best] / speeds[0], 3),
            "best": bench.best,
            "failure": bench.runner.graphs.failure,
        }

    return part


def sampled(bench: EngineOnGpu, report: Report) -> dict[str, Any]:
    """The same seeds with and without Medusa."""
    found = {}
    for seed in range(3):
        prompt = bench.prompts[seed + 3]
        on, off = (bench.answer(prompt, n, 64, temperature=0.8 + 0.3 * seed, seed=seed) for n in (16, 0))
        found[str(seed)] = {
            "same": on.tokens == off.tokens,
            "tokens": len(on.tokens),
            "tokens_per_second": [on.tokens_per_second, off.tokens_per_second],
        }
    return found


def memory(bench: EngineOnGpu, report: Report) -> dict[str, Any]:
    """Megabytes: what the runner counts, what torch holds, what the device lacks."""
    free, total = torch.cuda.mem_get_info()
    counted = {**bench.runner.memory_table(), "heads": bench.drafter.memory_bytes()}
    numbers = {
        **counted,
        "counted": sum(counted.values()),
        "info": bench.engine.info.memory_bytes,
        "allocated": torch.cuda.memory_allocated(),
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "device": total - free,
    }
    return {name: round(number / 2**20, 1) for name, number in numbers.items()} | {
        "cache_rows": bench.runner.memory.capacity
    }


def transformers(bench: EngineOnGpu, report: Report) -> dict[str, Any]:
    """`generate` in bfloat16 on the same weights, greedy, 128 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(bench.arguments.model)
    options = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = str(path.parent if options else path)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    model.to("cuda")
    speeds = []
    for prompt in bench.prompts[:4]:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        ids = (inputs if isinstance(inputs, torch.Tensor) else inputs["input_ids"]).to("cuda")
        torch.cuda.synchronize()
        started = time.perf_counter()
        out = model.generate(ids, max_new_tokens=128, min_new_tokens=128, do_sample=False)
        torch.cuda.synchronize()
        speeds.append((out.shape[1] - ids.shape[1]) / (time.perf_counter() - started))
    return {"tokens_per_second": [round(speed, 1) for speed in speeds], "median": round(median(speeds[1:]), 1)}


def gpu_tests(report: Report) -> str:
    """The runner's own tests on this GPU."""
    tests = ["tests/test_cuda_runner.py", "tests/test_kernels.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "cuda", *tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    return (done.stdout + done.stderr)[-1800:]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _arguments(argv)
    bench = EngineOnGpu(arguments)
    report = Report(arguments.out, arguments.time_limit, "gpu_engine")

    def run(name: str, part: Callable[[Report], Any], label: str = "", until: float = 1.0) -> None:
        if name not in arguments.skip:
            report.run(label or name, part, until)

    run("environment", environment)
    shares = {0: 0.45, 1: 0.75, 2: 0.9}
    for number, quantize in enumerate(arguments.formats):
        until = shares.get(number, 0.95)
        for name, part in _parts(bench, quantize, main=number == 0, until=until):
            run(name, part, f"{quantize} {name}", until)
    run("load again", bench.load(arguments.formats[0]))
    run("tests", gpu_tests, until=0.75)
    run("transformers", partial(transformers, bench), until=0.95)
    _print(report)


def _parts(
    bench: EngineOnGpu, quantize: str, *, main: bool, until: float
) -> Iterator[tuple[str, Callable[[Report], Any]]]:
    yield "load", bench.load(quantize)
    yield "toggle", toggle(bench, 10 if main else 5, SIZES, until)
    yield "steps", partial(step_times, bench)
    if main:
        yield "parts", partial(draft_and_verify, bench)
        yield "profile", partial(profile_step, bench)
    yield "contexts", partial(contexts, bench)
    yield "sampled", partial(sampled, bench)
    yield "memory", partial(memory, bench)
    if quantize != "none":
        yield "toggle 80", toggle(bench, 80, (4, 8, 63), until)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--heads", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--time-limit", type=float, default=460.0)
    parser.add_argument("--formats", nargs="+", default=["int8", "nf4", "none"])
    parser.add_argument("--skip", nargs="+", default=[], choices=CAN_SKIP, metavar="PART", help=", ".join(CAN_SKIP))
    return parser.parse_args(argv)


def _print(report: Report) -> None:
    for name, part in report.parts.items():
        if isinstance(part, dict) and "error" in part:
            print(f"FAILED {name}: {part['error'][:300]}\n{part['trace'][-800:]}")
        elif not name.endswith("_seconds"):
            print(f"{name}: {part}"[:1500])


if __name__ == "__main__":
    main()
