"""Other programs on the same weights: transformers' `generate`, and llama.cpp through llama-cpp-python.

Each runs in a process of its own (`engine.bench.peer_process` starts it), with as many threads as this engine uses:
a crash in there costs one column of the comparison, and idle threads cannot spin on this engine's cores.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from engine.bench.contenders import Ends, Run

__all__ = ["LlamaCpp", "Transformers"]


class TokenClock:
    """A `streamer` for generate: notes when the prompt and each batch of tokens passed."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(value.numel())

    def end(self) -> None:
        """Generate calls this; every time is known already."""


class Transformers:
    """`generate` on a folder or a .gguf file, in `dtype` or bitsandbytes' NF4; `lookup` drafts from the prompt."""

    def __init__(self, path: Path, device: str, dtype: str, threads: int) -> None:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        settings: dict[str, Any] = {"dtype": torch.bfloat16 if dtype == "nf4" else getattr(torch, dtype)}
        if dtype == "nf4":
            settings["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
        source: Path = path.parent if path.is_file() else path
        extra = {"gguf_file": path.name} if path.is_file() else {}
        model: Any = AutoModelForCausalLM.from_pretrained(str(source), **extra, **settings)
        self.about = f"torch {torch.__version__}, {threads} threads"
        self._model = model.eval() if dtype == "nf4" else model.to(device).eval()
        self._threads = threads

    def run(self, prompt: Sequence[int], max_tokens: int, ends: Ends, lookup: bool = False) -> Run:
        clock, ids = TokenClock(), torch.tensor([list(prompt)], device=self._model.device)
        extra = {"prompt_lookup_num_tokens": 10} if lookup else {}
        with torch_threads(self._threads), torch.inference_mode():
            started = time.perf_counter()
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                min_new_tokens=None if ends else max_tokens,
                do_sample=False,
                eos_token_id=sorted(ends) or None,
                pad_token_id=0,
                streamer=clock,
                **extra,
            )
        tokens = out[0, len(prompt) :].tolist()
        first = clock.times[1]  # times[0] is the prompt's own
        decoded = sum(clock.counts[2:])
        kept = tokens[:-1] if tokens and tokens[-1] in ends else tokens
        decode_ms, steps = (clock.times[-1] - first) * 1e3, len(clock.times) - 2
        return Run(tuple(kept), len(prompt), (first - started) * 1e3, decode_ms, steps, decoded)


class LlamaCpp:
    """llama.cpp on a .gguf file; on a GPU all layers are offloaded where it was built for one."""

    def __init__(self, path: Path, device: str, threads: int, context: int) -> None:
        import llama_cpp

        self.about = llama_cpp.llama_print_system_info().decode().strip(" |")  # what it was built for
        self._llama = llama_cpp.Llama(
            model_path=str(path),
            n_ctx=context,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=-1 if device == "cuda" else 0,
            verbose=False,
        )

    def run(self, prompt: Sequence[int], max_tokens: int, ends: Ends, lookup: bool = False) -> Run:
        self._llama.reset()
        started = time.perf_counter()
        tokens: list[int] = []
        stream = self._llama.generate(list(prompt), temp=0.0, repeat_penalty=1.0, reset=True)
        first = last = started
        decoded = 0
        for token in stream:
            last = time.perf_counter()
            first = last if not tokens else first
            decoded += bool(tokens)
            if token in ends:
                break
            tokens.append(token)
            if len(tokens) == max_tokens:
                break
        stream.close()
        return Run(tuple(tokens), len(prompt), (first - started) * 1e3, (last - first) * 1e3, decoded, decoded)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads for a while: this engine leaves it one, so that they do not spin on its cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def serve(settings: dict[str, Any]) -> None:
    """Answer one JSON request a line on standard input; whatever a library prints goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    path, device, threads = Path(settings["path"]), settings["device"], settings["threads"]
    peer: Transformers | LlamaCpp
    if settings["kind"] == "llama.cpp":
        peer = LlamaCpp(path, device, threads, settings["context"])
    else:
        peer = Transformers(path, device, settings["dtype"], threads)
    print(json.dumps({"ready": True, "about": peer.about}), file=replies, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        run = peer.run(asked["prompt"], asked["max_tokens"], frozenset(asked["ends"]), asked["lookup"])
        print(json.dumps(asdict(run)), file=replies, flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
