"""What Medusa gains here: the median speed of this machine's own answers with it against without it.

Only answers of the same model, device and weights count, and only long enough ones. Knows no page.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

__all__ = ["MIN_TOKENS", "measured_gain"]

MIN_TOKENS = 24  # a shorter answer's speed is mostly noise
MIN_ANSWERS = 2  # of each kind
RECENT = 40  # of each kind: the machine of last month may have been busier


def measured_gain(stats: Sequence[Mapping[str, Any]], device: str, weights: str) -> dict[str, Any]:
    """Return medians as {"gain", "medusa", "plain"} (tokens/s) and how many answers they rest on.

    `stats` are answers' figures, newest first. `gain` is None until there are enough answers of both kinds.
    """
    fitting = [each for each in stats if _counts(each, device, weights)]
    with_it = _speeds(each for each in fitting if each["medusa"])
    without = _speeds(each for each in fitting if not each["medusa"])
    is_enough = min(len(with_it), len(without)) >= MIN_ANSWERS
    return {
        "gain": round(median(with_it) / median(without), 2) if is_enough else None,
        "medusa": round(median(with_it), 1) if with_it else None,
        "plain": round(median(without), 1) if without else None,
        "answers": [len(with_it), len(without)],
    }


def _counts(stats: Mapping[str, Any], device: str, weights: str) -> bool:
    same = stats.get("device") == device and stats.get("weights") == weights
    return same and stats.get("generated_tokens", 0) >= MIN_TOKENS and stats.get("tokens_per_second", 0) > 0


def _speeds(stats: Any) -> list[float]:
    return [each["tokens_per_second"] for each in stats][:RECENT]
