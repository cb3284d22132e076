"""One engine at a time on a GPU, as the app loads it, and what the parts of `gpu_engine` ask of it."""

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine import Engine, GenerationResult, SamplingParams
from engine.bench.gpu_report import Report
from engine.bench.gpu_timing import replay_ms
from engine.captured_decode import CapturedLoop
from engine.cuda_drafter import CudaDrafter
from engine.cuda_runner import CudaRunner
from engine.decode import PLAIN
from engine.tree import CandidateTree

__all__ = ["EngineOnGpu"]

PROMPTS = Path(__file__).parent / "prompts" / "eval.txt"


class EngineOnGpu:
    """An engine, the prompts, and `best`, the size of tree that was fastest last."""

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

    def tree(self, drafted: int) -> CandidateTree:
        return self.engine._trees.first(drafted) if drafted else PLAIN

    def load(self, quantize: str) -> Callable[[Report], Any]:
        """Load an engine as the app does; what it says comes with the second it was said at."""

        def part(report: Report) -> dict[str, Any]:
            self.engine = None  # type: ignore[assignment]
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            started, said = time.time(), []
            self.engine = Engine.load(
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
            }

        return part

    def answer(self, prompt: str, drafted: int, max_tokens: int, **settings: Any) -> GenerationResult:
        params = SamplingParams(medusa=drafted > 0, tree_nodes=drafted or None, max_tokens=max_tokens, **settings)
        *_, last = self.engine.stream([{"role": "user", "content": prompt}], params)
        assert last.result is not None, "the last chunk carries the result"
        return last.result

    def prefill(self, count: int) -> int:
        """Run a prompt of `count` tokens from an empty cache; return the first token after it."""
        self.runner.truncate(0)
        self.engine._cached = []
        tokens = (self.engine._tokenizer.encode_chat([{"role": "user", "content": " ".join(self.prompts)}]) * 9)[:count]
        return CapturedLoop(self.runner, None).prefill(tokens)

    def replay_ms(self, key: Any) -> float:
        """Return the milliseconds of what was captured under `key`, behind 500 committed rows."""
        return replay_ms(self.runner.graphs._graphs[key], lambda: self.runner.memory.set_length(500))
