"""What a figure was measured on: machine, versions and date, as plain values."""

import os
import platform
from datetime import date
from importlib import metadata
from typing import Any

import torch

from engine.engine import Engine
from engine.tuning import device_name

__all__ = ["describe", "usable_cores"]

_PACKAGES = ("torch", "transformers", "bitsandbytes", "llama-cpp-python")


def describe(engine: Engine) -> dict[str, Any]:
    """Return date, hardware, versions and what was loaded."""
    info = engine.info
    return {
        "date": date.today().isoformat(),
        "hardware": {
            "device": device_name(info.device),
            "cpu": device_name("cpu"),
            "usable_cores": usable_cores(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "model": {
            "name": info.model,
            "device": info.device,
            "weights": info.weights,
            "heads": info.num_heads,
            "max_context": info.max_context,
            "notes": list(info.notes),
        },
    }


def usable_cores() -> int:
    """Return the cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions() -> dict[str, str]:
    found = {"cuda": torch.version.cuda} if torch.version.cuda else {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
