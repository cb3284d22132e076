"""The fastest launches known for this GPU, kept in a file; a matrix that nobody has measured is measured by itself."""

import contextlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from engine.kernels.linear_config import LinearConfig, rows_measured
from engine.kernels.nvrtc import cache_folder
from engine.kernels.small_batch_linear import PackedLinear, Workspace
from engine.kernels.tune_nf4 import tune

__all__ = ["MeasuredConfigs", "choose_config", "kept_configs"]


class MeasuredConfigs:
    """The fastest launches known for this GPU, kept in a file for all models."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or _path()
        self._table: dict[str, LinearConfig] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # measured again
            kept = json.loads(self._path.read_text())
            self._table = {name: LinearConfig(**config) for name, config in kept.items()}

    def get(self, weight: PackedLinear, rows: int) -> LinearConfig | None:
        return self._table.get(_name(weight, rows))

    def put(self, weight: PackedLinear, rows: int, config: LinearConfig) -> None:
        self._table[_name(weight, rows)] = config
        kept = {name: each.to_dict() for name, each in self._table.items()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(kept, indent=1))
        except OSError:
            return  # measured again next time


def _name(weight: PackedLinear, rows: int) -> str:
    return f"{weight.n}x{weight.k}/{weight.decode}/{weight.dtype}/{rows_measured(rows)}{'/norm' * weight.is_normed}"


@cache
def kept_configs() -> MeasuredConfigs:
    """Return what is known in this process, which one file stands behind."""
    return MeasuredConfigs()


def choose_config(
    weight: PackedLinear, tokens: int, workspace: Workspace, clear_cache: Callable[[], object] | None = None
) -> LinearConfig:
    """Return the fastest known configuration for this GPU, measuring the matrix by itself where nobody has yet."""
    found = kept_configs().get(weight, tokens)
    if found is None:
        found = tune(weight, rows_measured(tokens), workspace, clear_cache=clear_cache)[0][1]
        torch.cuda.empty_cache()  # the copies
        kept_configs().put(weight, tokens, found)
    return found


def _path() -> Path:
    name = torch.cuda.get_device_name().replace(" ", "-").replace("/", "-")
    return cache_folder() / f"linear-{name}-v7.json"
