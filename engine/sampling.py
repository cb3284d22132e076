"""Sampling settings: every control with its allowed range, and the seed behind an answer.

The order in which the controls act on a row of logits (see `engine.sampler`): `logit_bias`, `repetition_penalty`,
`presence_penalty` and `frequency_penalty`, `temperature`, `top_k`, `min_p`, `top_p`, then the draw. Plain values only,
so that settings can be saved with an answer and read back.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from engine.errors import InvalidParameterError

__all__ = ["SamplingParams", "draw_seed"]

MAX_STOPS, MAX_STOP_LENGTH, MAX_BIASES = 16, 200, 1024


@dataclass(frozen=True)
class SamplingParams:
    """How to answer. Every control's default leaves the model's own distribution as it is.

    - `temperature` 0 is greedy: bias and penalties still act, filters cannot matter.
    - `top_k` 0 keeps all tokens; `top_p` 1 and `min_p` 0 too. `min_p` is relative to the likeliest token; `top_p`
      counts what `top_k` and `min_p` left. Equal logits go by token id, the lower one first.
    - `repetition_penalty` divides positive and multiplies negative logits of tokens in the prompt or the answer;
      `presence_penalty` is subtracted once for a token in the answer, `frequency_penalty` for each time it is there.
    - `stop`: the answer ends before the first of these strings. `logit_bias` holds (token id, bias) pairs.
    - `seed` None draws one and reports it in the result.
    - `tree_nodes` counts drafted nodes without the root; None lets the engine choose.
    - `acceptance` "exact" keeps plain decoding's text; "typical" has the thresholds `epsilon` and `delta` (MEDUSA,
      arXiv 2401.10774, section 2.3.1). At temperature 0 both are the same.
    """

    medusa: bool = True
    temperature: float = 0.0
    seed: int | None = None
    max_tokens: int = 512
    tree_nodes: int | None = None
    acceptance: str = "exact"
    epsilon: float = 0.09
    delta: float = 0.3
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        _require(isinstance(self.medusa, bool), "medusa", self.medusa, "true or false")
        _require_number("temperature", self.temperature, 0.0, 5.0)
        _require_whole("seed", self.seed, 0, 2**63 - 1, "auto or 0 to 2^63-1", optional=True)
        _require_whole("max_tokens", self.max_tokens, 1, 2**31 - 1, "1 or more")
        _require_whole("tree_nodes", self.tree_nodes, 1, 64, "auto or 1 to 64", optional=True)
        _require(self.acceptance in ("exact", "typical"), "acceptance", self.acceptance, "exact or typical")
        _require_number("epsilon", self.epsilon, 0.0, 1.0, above=True)
        _require_number("delta", self.delta, 0.0, 1.0, above=True)
        _require_whole("top_k", self.top_k, 0, 2**31 - 1, "0 (all tokens) or more")
        _require_number("top_p", self.top_p, 0.0, 1.0, above=True)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        _require_number("repetition_penalty", self.repetition_penalty, 0.1, 10.0)
        _require_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _require_stops(self.stop)
        _require_biases(self.logit_bias)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SamplingParams":
        """Build settings from plain values, such as those of `to_dict` after JSON; other keys are passed over.

        `stop` may be one string, `logit_bias` a mapping of ids to biases. Raises InvalidParameterError.
        """
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in values.items() if name in known}
        if "stop" in given:
            given["stop"] = _as_stops(given["stop"])
        if "logit_bias" in given:
            given["logit_bias"] = _as_biases(given["logit_bias"])
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as values that JSON has; `from_dict` reads them back."""
        return {
            **asdict(self),
            "stop": list(self.stop),
            "logit_bias": [[token, bias] for token, bias in self.logit_bias],
        }

    @property
    def has_penalties(self) -> bool:
        """Whether a token's chances depend on the tokens before it beyond the model's own doing."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def is_argmax(self) -> bool:
        """Whether each token is simply the model's likeliest: greedy, without bias and penalties."""
        return self.temperature == 0 and not self.has_penalties and not self.logit_bias

    @property
    def is_typical(self) -> bool:
        """Whether typical acceptance has an effect."""
        return self.acceptance == "typical" and self.temperature > 0


def draw_seed() -> int:
    """Return a fresh seed, small enough to read out and type in again."""
    return secrets.randbelow(2**32)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise InvalidParameterError(f"{name} is {value}; allowed is {allowed}.")


def _require_number(name: str, value: object, low: float, high: float, above: bool = False) -> None:
    holds = _is_number(value) and low <= value <= high and not (above and value == low)  # type: ignore[operator]
    _require(holds, name, value, f"above {low:g}, at most {high:g}" if above else f"{low:g} to {high:g}")


def _require_whole(name: str, value: object, low: int, high: int, allowed: str, optional: bool = False) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    _require(is_whole or (optional and value is None), name, value, allowed)


def _require_stops(stops: object) -> None:
    holds = isinstance(stops, tuple) and len(stops) <= MAX_STOPS
    holds = holds and all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops)  # type: ignore[attr-defined]
    allowed = f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters"
    _require(holds, "stop", stops, allowed)


def _require_biases(biases: object) -> None:
    holds = isinstance(biases, tuple) and len(biases) <= MAX_BIASES and all(_is_bias(pair) for pair in biases)
    holds = holds and len({token for token, _ in biases}) == len(biases)  # type: ignore[attr-defined]
    allowed = f"at most {MAX_BIASES} pairs of a token id (each once) and a bias of -100 to 100"
    _require(holds, "logit_bias", biases, allowed)


def _is_bias(pair: object) -> bool:
    if not isinstance(pair, tuple) or len(pair) != 2:
        return False
    token, bias = pair
    is_id = isinstance(token, int) and not isinstance(token, bool) and token >= 0
    return is_id and _is_number(bias) and -100 <= bias <= 100


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _as_stops(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, Sequence) else value


def _as_biases(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = [(int(key) if isinstance(key, str) and key.isdecimal() else key, bias) for key, bias in value.items()]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(tuple(pair) if isinstance(pair, (list, tuple)) else pair for pair in value)
    return value
