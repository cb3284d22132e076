"""Sampling settings, and the sampler whose randomness is keyed by (seed, position).

The uniform number behind the token at absolute position t depends on (seed, t) alone, and the token is a function of
the processed logits and that number. So a token does not depend on how many nodes were verified beside it, and the
text for a seed is the same with Medusa on and off.
"""

from dataclasses import dataclass

from engine.errors import InvalidParameterError

__all__ = ["SamplingParams"]


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
