"""Sampling settings, and the sampler whose randomness is keyed by (seed, position).

The uniform number behind the token at absolute position t depends on (seed, t) alone, and the token is a function of
the processed logits and that number. So a token does not depend on how many nodes were verified beside it, and the
text for a seed is the same with Medusa on and off.
"""

import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import InvalidParameterError

__all__ = ["SamplingParams", "draw_seed", "position_uniform", "sample", "target_probabilities"]


@dataclass(frozen=True)
class SamplingParams:
    """How to answer. `temperature` 0 is greedy; `seed` None draws one and reports it in the result.

    `tree_nodes` counts drafted nodes without the root; None lets the engine choose. `epsilon` and `delta` are the
    typical-acceptance thresholds (MEDUSA, arXiv 2401.10774, section 2.3.1).
    """

    medusa: bool = True
    temperature: float = 0.0
    seed: int | None = None
    max_tokens: int = 512
    tree_nodes: int | None = None
    acceptance: str = "exact"
    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        _require(0.0 <= self.temperature <= 5.0, "temperature", self.temperature, "0 to 5")
        _require(self.seed is None or 0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63-1")
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
        _require(
            self.tree_nodes is None or 1 <= self.tree_nodes <= 64, "tree_nodes", self.tree_nodes, "auto or 1 to 64"
        )
        _require(self.acceptance in ("exact", "typical"), "acceptance", self.acceptance, "exact or typical")
        _require(0.0 < self.epsilon <= 1.0, "epsilon", self.epsilon, "above 0, at most 1")
        _require(0.0 < self.delta <= 1.0, "delta", self.delta, "above 0, at most 1")


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise InvalidParameterError(f"{name} is {value}; allowed is {allowed}.")


def draw_seed() -> int:
    """Return a fresh seed, small enough to read out and type in again."""
    return secrets.randbelow(2**32)


def position_uniform(seed: int, position: int) -> float:
    """Return the uniform number in [0, 1) of the token at absolute `position`: two rounds of splitmix64.

    A counter-based generator, so any position can be asked for in any order.
    """
    return (_mix(_mix(seed) + position) >> 11) * 2.0**-53


def target_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return the distribution that a token is drawn from: float32 logits [..., vocab] -> float64 [..., vocab]."""
    return torch.softmax(logits.double() / params.temperature, dim=-1)


def sample(logits: Tensor, params: SamplingParams, seed: int, position: int) -> int:
    """Draw the token at `position` from its logits [vocab] by inverse CDF; the temperature is above 0."""
    cumulative = target_probabilities(logits, params).cumsum(-1)
    threshold = position_uniform(seed, position) * cumulative[-1]
    return min(int(torch.searchsorted(cumulative, threshold, right=True)), len(cumulative) - 1)


def _mix(value: int) -> int:
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
