"""What the GPU scripts share: parts that fail alone, results on disk after each part, what the card is and can do."""

import json
import platform
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.kernels.linear_config import LinearConfig
from engine.kernels.tune_nf4 import time_graph

__all__ = ["Report", "bandwidth", "environment", "or_error"]


class Report:
    """Results by part, on disk after every part."""

    def __init__(self, folder: Path, limit: float, name: str = "gpu_kernels") -> None:
        self.path, self.start, self.limit = folder / f"{name}.json", time.time(), limit
        self.parts: dict[str, Any] = {}
        self.best: dict[tuple[int, int, int, int], LinearConfig] = {}  # (decode, n, k, token tiles)
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def elapsed(self) -> float:
        return time.time() - self.start

    def run(self, name: str, part: Callable[["Report"], Any], until: float = 1.0) -> None:
        """Run a part unless the given share of the time limit is spent."""
        if self.elapsed > self.limit * until:
            self.parts[name] = {"skipped": f"after {self.elapsed:.0f} s"}
        else:
            before = time.time()
            try:
                self.parts[name] = part(self)
            except Exception as error:  # one part must not cost the others
                self.parts[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            self.parts[name + "_seconds"] = round(time.time() - before, 1)
        self.path.write_text(json.dumps(self.parts, indent=1))
        print(f"[{self.elapsed:6.1f} s] {name}: {_short(self.parts[name])}", flush=True)


def _short(value: Any) -> str:
    if isinstance(value, dict) and "error" in value:
        return value["error"][:600]
    return str(value)[:160] if not isinstance(value, dict) else f"{len(value)} entries"


def environment(report: Report) -> dict[str, Any]:
    versions = {}
    for name in ("bitsandbytes", "triton", "transformers"):
        try:
            versions[name] = __import__(name).__version__
        except ImportError:
            versions[name] = None
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name, "multiprocessors": properties.multi_processor_count, "l2": properties.L2_cache_size,
        "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"), **versions,
    }  # fmt: skip


def bandwidth(report: Report) -> dict[str, float]:
    """The ceilings of this card: a large copy, and reading alone."""
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_us = time_graph(lambda i: target.copy_(source), 3)
    wide = source.view(torch.float32)
    read_us = time_graph(lambda i: wide.sum(), 3)
    return {"copy_gb_s": 2 * source.nbytes / copy_us / 1e3, "read_gb_s": source.nbytes / read_us / 1e3}


def or_error(measure: Callable[[], float]) -> float | str:
    """A peer that fails must not cost our own numbers."""
    try:
        return measure()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:120]
