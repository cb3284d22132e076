"""The sampler whose randomness is keyed by (seed, position).

The uniform number behind the token at absolute position t depends on (seed, t) alone, and the token is a function of
the processed logits and that number. So a token does not depend on how many nodes were verified beside it, and the
text for a seed is the same with Medusa on and off.
"""

import torch
from torch import Tensor

from engine.sampling import SamplingParams

__all__ = ["position_uniform", "sample", "target_probabilities"]


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
