"""The controls of a conversation's next answers: which there are, their ranges, and how a page's values are checked.

Plain values in and out; what each control does to a token is the engine's matter (`engine.SamplingParams`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from app.presets import CUSTOM, PRESETS, preset_name
from engine import EngineError, SamplingParams

__all__ = ["CONTROLS", "MAX_SYSTEM_LENGTH", "SettingsError", "checked_settings", "params_from", "settings_options"]

MAX_SYSTEM_LENGTH = 20_000


class SettingsError(ValueError):
    """A setting has an impossible value; the sentence names the allowed range."""


@dataclass(frozen=True)
class Control:
    """One number on the page: its name in SamplingParams, the range of its slider, and what it does in a sentence."""

    name: str
    label: str
    low: float
    high: float
    step: float
    help: str


CONTROLS = (
    Control("temperature", "Temperature", 0, 2, 0.05, "0 always takes the likeliest token; higher is more varied."),
    Control("top_k", "Top-k", 0, 200, 1, "Only the k likeliest tokens; 0 keeps all."),
    Control("top_p", "Top-p", 0.01, 1, 0.01, "The likeliest tokens that together have this probability."),
    Control("min_p", "Min-p", 0, 1, 0.01, "Tokens at least this likely, relative to the likeliest."),
    Control("repetition_penalty", "Repetition penalty", 0.5, 2, 0.01, "Above 1, words used before become less likely."),
    Control("presence_penalty", "Presence penalty", -2, 2, 0.05, "Taken once from each token the answer holds."),
    Control("frequency_penalty", "Frequency penalty", -2, 2, 0.05, "Taken each time a token was used."),
    Control("max_tokens", "Longest answer", 1, 8192, 1, "In tokens; an answer that reaches it can be continued."),
)
_THRESHOLDS = (
    Control("epsilon", "Epsilon", 0.01, 1, 0.01, "Typical acceptance: the least probability that is accepted."),
    Control("delta", "Delta", 0.01, 1, 0.01, "Typical acceptance: how far entropy lowers that threshold."),
)


def settings_options() -> dict[str, Any]:
    """What the page builds its settings from: controls, presets and every default."""
    return {
        "controls": [asdict(control) for control in CONTROLS],
        "thresholds": [asdict(control) for control in _THRESHOLDS],
        "presets": PRESETS,
        "custom": CUSTOM,
        "defaults": {"system": "", **SamplingParams().to_dict()},
    }


def checked_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return complete settings as they are saved, with the preset's name; raises SettingsError."""
    system = values.get("system") or ""
    if not isinstance(system, str) or len(system) > MAX_SYSTEM_LENGTH:
        raise SettingsError(f"The system prompt is longer than {MAX_SYSTEM_LENGTH} characters; shorten it.")
    settings = {"system": system, **params_from(values).to_dict()}
    return {**settings, "preset": preset_name(settings)}


def params_from(values: Mapping[str, Any]) -> SamplingParams:
    """The sampling part of saved or sent settings; raises SettingsError."""
    try:
        return SamplingParams.from_dict(values)
    except EngineError as error:
        raise SettingsError(str(error)) from error
