"""What the command `bench` calls: the suite with its tables, or the GPU kernels' own script."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.bench.fresh_process import Setup
from engine.bench.report_text import report_text
from engine.bench.suite import Plan, run_suite
from engine.errors import UnsupportedDeviceError

__all__ = ["bench", "bench_kernels"]

ROOT = Path(__file__).resolve().parents[2]


def bench(
    setup: Setup,
    prompts: list[list[dict[str, str]]] | None,
    *,
    quick: bool,
    peers: bool,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], str]:
    """Run the suite; return its figures, and the tables for people. Raises EngineError."""
    report = run_suite(setup, Plan.usual(prompts, quick=quick, peers=peers), say)
    return report, report_text(report)


def bench_kernels(device: str, folder: Path) -> int:
    """Check and time the GPU kernels in a process of their own, which prints its tables; return its exit code.

    Raises UnsupportedDeviceError without a GPU.
    """
    if device == "cpu" or not torch.cuda.is_available():
        raise UnsupportedDeviceError(
            "bench --kernels times the GPU's kernels, and torch finds no CUDA device to use; leave --kernels out."
        )
    command = [sys.executable, "-m", "engine.bench.gpu_kernels", "--out", str(folder)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode
