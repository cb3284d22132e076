"""Check and time the engine on a GPU: `python -m engine.bench.gpu_engine --model FILE.gguf --heads FILE --out DIR`.

For each weight format: loading, identical text with every tree, speed with Medusa on and off in turns, step times by
tree size, captures, first token and speed by context, memory; then transformers' `generate` beside it. Results are
written after each part; a part that fails is reported and the others go on.
"""

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from engine import Engine, GenerationResult, SamplingParams
from engine.bench.gpu_report import Report, environment
from engine.bench.loading import load_engine
from engine.captured_decode import CapturedLoop
from engine.cuda_drafter import CudaDrafter
from engine.cuda_runner import CudaRunner
from engine.decode import PLAIN
from engine.models.loader import bundled_path
from engine.pruned_tree import Tree

PROMPTS = Path(__file__).parent / "prompts" / "eval.txt"
SIZES = (4, 7, 8, 15, 31, 63)  # drafted nodes
NODES = (1, 2, 3, 5, 8, 9, 12, 16, 17, 24, 32, 33, 48, 63, 64)  # with the root
CONTEXTS = (100, 1000, 4000)


class Bench:
    """One engine at a time on the GPU, and what is asked of it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.prompts = PROMPTS.read_text().splitlines()
        self.engine: Engine
        self.best = 16

    @property
    def runner(self) -> CudaRunner:
        runner = self.engine._runner
        assert isinstance(runner, CudaRunner), self.engine.info.notes
        return runner

    @property
    def drafter(self) -> CudaDrafter:
        drafter = self.engine._drafter
        assert isinstance(drafter, CudaDrafter), self.engine.info.heads_reason
        return drafter

    def tree(self, drafted: int) -> Tree:
        return self.engine._trees.pruned(drafted) if drafted else PLAIN

    def load(self, quantize: str) -> Callable[[Report], Any]:
        """Load an engine as the app does; what it says comes with the second it was said at."""

        def part(report: Report) -> dict[str, Any]:
            self.engine = None  # type: ignore[assignment]
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            started, said = time.time(), []
            self.engine = load_engine(
                self.arguments.model,
                device="cuda",
                quantize=quantize,
                heads=str(self.arguments.heads),
                progress=lambda message: said.append(f"{time.time() - started:.1f} s: {message}"),
            )
            loaded = time.time() - started
            first = self.answer(self.prompts[0], 0, 8)
            second = self.answer(self.prompts[0], 16, 8)
            return {
                "load_seconds": loaded,
                "said": said,
                "notes": self.engine.info.notes,
                "first_answer_ms": first.time_to_first_token_ms,
                "ready_seconds": time.time() - started,
                "text": second.text,
                "same": first.tokens == second.tokens,
                "memory": self.memory(report),
            }

        return part

    def answer(self, prompt: str, drafted: int, max_tokens: int, **settings: Any) -> GenerationResult:
        params = SamplingParams(medusa=drafted > 0, tree_nodes=drafted or None, max_tokens=max_tokens, **settings)
        *_, last = self.engine.stream([{"role": "user", "content": prompt}], params)
        assert last.result is not None, "the last chunk carries the result"
        return last.result

    def toggle(self, prompts: int, sizes: tuple[int, ...], until: float) -> Callable[[Report], Any]:
        """Answer each prompt plainly and with every tree, one after the other; count the answers that differ."""

        def part(report: Report) -> dict[str, Any]:
            rows: dict[int, list[GenerationResult]] = {size: [] for size in (0, *sizes)}
            for size in rows:  # captured before anything is timed
                self.answer(self.prompts[-1], size, 24)
            for prompt in self.prompts[:prompts]:
                if report.elapsed > report.limit * until:
                    break
                for size, results in rows.items():
                    results.append(self.answer(prompt, size, 256))
            differ = {
                size: [i for i, (a, b) in enumerate(zip(results, rows[0], strict=True)) if a.tokens != b.tokens]
                for size, results in rows.items()
            }
            speeds = {size: median(result.tokens_per_second for result in results) for size, results in rows.items()}
            self.best = max(sizes, key=speeds.__getitem__)
            return {
                "prompts": len(rows[0]),
                "tokens": sum(len(result.tokens) for result in rows[0]),
                "differ": differ,
                "tokens_per_second": {size: round(speed, 1) for size, speed in speeds.items()},
                "tokens_per_step": {s: round(mean(r.tokens_per_step for r in rs), 3) for s, rs in rows.items()},
                "on_over_off": round(speeds[self.best] / speeds[0], 3),
                "best": self.best,
                "failure": self.runner.graphs.failure,
            }

        return part

    def sampled(self, report: Report) -> dict[str, Any]:
        """The same seeds with and without Medusa."""
        found = {}
        for seed in range(3):
            prompt = self.prompts[seed + 3]
            on, off = (self.answer(prompt, n, 64, temperature=0.8 + 0.3 * seed, seed=seed) for n in (16, 0))
            found[str(seed)] = {
                "same": on.tokens == off.tokens,
                "tokens": len(on.tokens),
                "tokens_per_second": [on.tokens_per_second, off.tokens_per_second],
            }
        return found

    def steps(self, report: Report) -> dict[str, Any]:
        """Milliseconds a step by nodes at 500 committed rows: on the GPU alone, and as the loop gets them."""
        found = {}
        for nodes in NODES:
            tree = self.tree(nodes - 1)
            drafter = self.drafter if nodes > 1 else None
            captures = len(self.runner.graphs.capture_seconds)
            self._prefill(500)
            steps = CapturedLoop(self.runner, drafter).steps(tree)
            for _ in range(4):
                next(steps)
            started = time.perf_counter()
            for _ in range(40):
                next(steps)
            loop = (time.perf_counter() - started) / 40 * 1e3
            steps.close()
            seconds = list(self.runner.graphs.capture_seconds.values())[captures:]
            found[nodes] = {
                "gpu_ms": round(self._replay_ms(("step", tree, drafter)), 4),
                "loop_ms": round(loop, 4),
                "capture_s": round(sum(seconds), 3),
            }
        return found

    def parts(self, report: Report) -> dict[str, Any]:
        """Milliseconds of drafting alone and of the backbone alone, captured."""
        found = {}
        has_prefix = self.runner.has_prefix
        for drafted in (4, 15, 31, 63):
            self._prefill(500)
            tree, verified = self.tree(drafted), self.engine._trees.first(drafted)
            filled = tree.filled
            for _ in range(2):
                draft = self.drafter.draft(self.runner.memory.state[0].clone(), 5, filled)
                self.runner.verify(draft.tokens[: verified.num_nodes], verified)
            found[drafted] = {
                "draft_ms": self._replay_ms(("draft", filled, self.drafter)),
                "verify_ms": self._replay_ms(("verify", verified.num_nodes, has_prefix)),
            }
        found["chunk_ms"] = {rows: self._chunk_ms(rows) for rows in (16, 64)}
        return found

    def _chunk_ms(self, rows: int) -> float:
        for _ in range(2):
            self._prefill(rows)
        return self._replay_ms(("chunk", rows))

    def _replay_ms(self, key: Any) -> float:
        graph, times = self.runner.graphs._graphs[key], []
        for _ in range(12):
            self.runner.memory.set_length(500)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return median(times[2:])

    def _prefill(self, count: int) -> int:
        self.runner.truncate(0)
        self.engine._cached = []
        tokens = (self.engine._tokenizer.encode_chat([{"role": "user", "content": " ".join(self.prompts)}]) * 9)[:count]
        return CapturedLoop(self.runner, None).prefill(tokens)

    def contexts(self, report: Report) -> dict[str, Any]:
        """Time to the first token, and tokens per second with and without Medusa, by prompt tokens."""
        found = {}
        for context in CONTEXTS:
            self._prefill(context)  # the cache has grown, its launches are captured
            self._prefill(context)
            firsts = []
            for _ in range(5):
                started = time.perf_counter()
                self._prefill(context)
                firsts.append((time.perf_counter() - started) * 1e3)
            found[context] = {"first_token_ms": round(median(firsts), 2), "capacity": self.runner.memory.capacity}
            for name, drafted in (("off", 0), ("on", self.best)):
                found[context][name] = self._speed(drafted, context)
        return found

    def _speed(self, drafted: int, context: int) -> float:
        self._prefill(context)
        steps = CapturedLoop(self.runner, self.drafter if drafted else None).steps(self.tree(drafted))
        for _ in range(4):
            next(steps)
        started, tokens = time.perf_counter(), 0
        while tokens < 200:
            tokens += len(next(steps).tokens)
        speed = tokens / (time.perf_counter() - started)
        steps.close()
        return round(speed, 1)

    def memory(self, report: Report) -> dict[str, Any]:
        """Megabytes: what the runner counts, what torch holds, what the device lacks."""
        free, total = torch.cuda.mem_get_info()
        counted = {**self.runner.memory_table(), "heads": self.drafter.memory_bytes()}
        numbers = {
            **counted,
            "counted": sum(counted.values()),
            "info": self.engine.info.memory_bytes,
            "allocated": torch.cuda.memory_allocated(),
            "peak_allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "device": total - free,
        }
        return {name: round(number / 2**20, 1) for name, number in numbers.items()} | {
            "cache_rows": self.runner.memory.capacity
        }

    def transformers(self, report: Report) -> dict[str, Any]:
        """`generate` in bfloat16 on the same weights, greedy, 128 tokens."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = bundled_path() if self.arguments.model == "bundled" else Path(self.arguments.model)
        options = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        folder = str(path.parent if options else path)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).to("cuda")
        speeds = []
        for prompt in self.prompts[:4]:
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
    tests = ["tests/test_cuda_runner.py", "tests/test_kernels.py", "tests/test_draft_kernels.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "cuda", *tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    return (done.stdout + done.stderr)[-1800:]


def profile_step(bench: Bench) -> Callable[[Report], Any]:
    """Microseconds by kernel of one eager step with a tree, as torch's profiler sees them."""

    def part(report: Report) -> dict[str, Any]:
        from torch.profiler import ProfilerActivity, profile

        found = {}
        for drafted in (0, 7):
            bench._prefill(500)
            tree, drafter = bench.tree(drafted), bench.drafter if drafted else None
            plan = bench.runner.plan(tree, drafter)
            bench.runner._launch_step(plan, drafter)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as recorded:
                bench.runner._launch_step(plan, drafter)
                torch.cuda.synchronize()
            averages = sorted(recorded.key_averages(), key=lambda e: -e.device_time_total)
            found[drafted] = {e.key[:60]: [e.count, round(e.device_time_total, 1)] for e in averages[:14]}
        return found

    return part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--heads", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--time-limit", type=float, default=460.0)
    parser.add_argument("--formats", nargs="+", default=["int8", "nf4", "none"])
    parser.add_argument("--skip", nargs="*", default=[], choices=["tests", "transformers"])
    bench = Bench(parser.parse_args())
    report = Report(bench.arguments.out, bench.arguments.time_limit, "gpu_engine")
    report.run("environment", environment)
    shares = {0: 0.45, 1: 0.75, 2: 0.9}
    for number, quantize in enumerate(bench.arguments.formats):
        for name, part in _parts(bench, quantize, main=number == 0, until=shares.get(number, 0.95)):
            report.run(f"{quantize} {name}", part, until=shares.get(number, 0.95))
    report.run("load again", bench.load(bench.arguments.formats[0]))
    if "tests" not in bench.arguments.skip:
        report.run("tests", gpu_tests, until=0.75)
    if "transformers" not in bench.arguments.skip:
        report.run("transformers", bench.transformers, until=0.95)
    _print(report)


def _parts(bench: Bench, quantize: str, *, main: bool, until: float) -> Iterator[tuple[str, Callable[[Report], Any]]]:
    yield "load", bench.load(quantize)
    yield "toggle", bench.toggle(10 if main else 5, SIZES, until)
    yield "steps", bench.steps
    if main:
        yield "parts", bench.parts
        yield "profile", profile_step(bench)
    yield "contexts", bench.contexts
    yield "sampled", bench.sampled
    yield "memory", bench.memory
    if quantize != "none":
        yield "toggle 80", bench.toggle(80, (4, 7, 11, 15, 63), until)


def _print(report: Report) -> None:
    for name, part in report.parts.items():
        if isinstance(part, dict) and "error" in part:
            print(f"FAILED {name}: {part['error'][:300]}\n{part['trace'][-800:]}")
        elif not name.endswith("_seconds"):
            print(f"{name}: {part}"[:1500])


if __name__ == "__main__":
    main()
