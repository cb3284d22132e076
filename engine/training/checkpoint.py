"""The state of a training run on disk, replaced as a whole, so that a killed run goes on where it last was."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.errors import InvalidParameterError

__all__ = ["load_checkpoint", "save_checkpoint", "saved_settings"]


def save_checkpoint(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    elapsed: float,
    settings: Mapping[str, object],
) -> None:
    """Write weights, optimiser state, step count and seconds used; a kill leaves the old file or the new one."""
    unfinished = path.with_name(path.name + ".part")
    state = {
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "elapsed": elapsed,
        "settings": dict(settings),
    }
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def load_checkpoint(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, object]
) -> tuple[int, float]:
    """Restore weights and optimiser in place; return (step, seconds used).

    Raises InvalidParameterError where the file belongs to a run with other settings.
    """
    state = _read(path)
    changed = sorted(name for name, value in settings.items() if state["settings"].get(name) != value)
    if changed:
        raise InvalidParameterError(
            f"{path} belongs to a run with another {', '.join(changed)}; give the same settings or another --out."
        )
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["elapsed"]


def saved_settings(path: Path) -> dict[str, Any]:
    """Return the settings that a run to be gone on with was started with; none where there is no checkpoint."""
    # Mapped: the tensors are not read. (Those that stay must not be mapped, or Windows could not replace the file.)
    return _read(path, mmap=True)["settings"] if path.is_file() else {}


def _read(path: Path, mmap: bool = False) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InvalidParameterError(f"{path} is no checkpoint of a training run; delete it to begin anew.") from error
