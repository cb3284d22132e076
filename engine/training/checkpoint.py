"""A training run's state on disk: weights, optimizer, step and history in one file, replaced as a whole."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from engine.errors import InvalidParameterError

__all__ = ["RunState", "load_checkpoint", "save_checkpoint"]


@dataclass(frozen=True)
class RunState:
    """Where a run stands."""

    settings: Mapping[str, object]
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, object]] = field(default_factory=list)


def load_checkpoint(
    path: Path | None, module: nn.Module, optimizer: Optimizer, settings: Mapping[str, object]
) -> RunState:
    """Restore module and optimizer in place; a fresh RunState where there is nothing yet.

    Raises InvalidParameterError if the file belongs to a run with other settings.
    """
    if path is None or not path.is_file():
        return RunState(settings)
    content = torch.load(path, map_location="cpu", weights_only=True)
    changed = sorted(name for name in settings if content["settings"].get(name) != settings[name])
    if changed:
        raise InvalidParameterError(
            f"{path} belongs to a run with another {', '.join(changed)}; give the same settings or another --out."
        )
    module.load_state_dict(content["module"])
    optimizer.load_state_dict(content["optimizer"])
    return RunState(settings, content["step"], content["seconds"], content["history"])


def save_checkpoint(
    path: Path,
    module: nn.Module,
    optimizer: Optimizer,
    step: int,
    seconds: float,
    history: list[dict[str, object]],
    settings: Mapping[str, object],
) -> None:
    """Write the run's state; a kill at any time leaves the old file or the new one."""
    unfinished = path.with_name(path.name + ".part")
    content = {
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": seconds,
        "history": history,
        "settings": dict(settings),
    }
    torch.save(content, unfinished)
    os.replace(unfinished, path)
