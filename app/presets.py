"""Named settings to start from: Precise, Balanced, Creative.

Plain values, no engine: a preset sets every control that shapes the choice of a token, so that changing presets leaves
nothing of the one before. What an answer was made with is saved in full beside it; presets are a convenience only.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["CUSTOM", "DEFAULT_PRESET", "PRESETS", "preset_name", "with_preset"]

CUSTOM = "Custom"
DEFAULT_PRESET = "Precise"

_NEUTRAL: dict[str, float] = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
PRESETS: dict[str, dict[str, float]] = {
    "Precise": _NEUTRAL,  # always the likeliest token
    "Balanced": {**_NEUTRAL, "temperature": 0.7, "top_p": 0.95, "min_p": 0.05},
    "Creative": {**_NEUTRAL, "temperature": 1.1, "min_p": 0.05, "presence_penalty": 0.3},
}


def preset_name(settings: Mapping[str, Any]) -> str:
    """Return the preset that `settings` amount to, or CUSTOM; a missing control counts as its neutral value."""
    chosen = {name: settings.get(name, neutral) for name, neutral in _NEUTRAL.items()}
    return next((name for name, values in PRESETS.items() if values == chosen), CUSTOM)


def with_preset(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return `settings` with the preset's controls in place of their own; raises KeyError for an unknown name."""
    return {**settings, **PRESETS[name]}
