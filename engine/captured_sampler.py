"""Sampling inside a captured step: every node's next token, chosen on the device from the step's own memory.

What changes between answers (settings, seed, what has been said) lies in buffers that stay where they are, so a
captured step serves all answers of one `kind`. Nothing here waits for the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.accept import typical_threshold
from engine.cuda_memory import StepMemory
from engine.cuda_plan import VerifiedNodes
from engine.kernels.fused_ops import LENGTH, MAX_PATH, NUM_ACCEPTED, PATH_TOKENS
from engine.sampler import Kind, Sampler
from engine.sampling import SamplingParams

__all__ = ["StepChooser", "typical_targets"]


class StepKind(NamedTuple):
    """Which launches a step needs to choose its tokens."""

    sampler: Kind
    is_typical: bool


class StepChooser:
    """Chooses tokens for the runner whose memory it reads; one answer at a time."""

    kind: StepKind

    def __init__(self, memory: StepMemory) -> None:
        self.sampler = Sampler(memory.config.vocab_size, memory.device)
        self._memory = memory
        self._epsilon, self._delta = (torch.zeros(1, dtype=torch.float64, device=memory.device) for _ in range(2))
        self._places = torch.arange(MAX_PATH, device=memory.device)

    def start(self, params: SamplingParams, seed: int, prompt: Sequence[int]) -> None:
        """Begin an answer after `prompt`."""
        self.sampler.start(params, seed, prompt)
        self._epsilon.fill_(params.epsilon)
        self._delta.fill_(params.delta)
        self.kind = StepKind(self.sampler.kind, params.is_typical)

    def first(self, logits: Tensor, position: int) -> int:
        """Choose the token after the prompt from logits [1, vocab]; waits for it."""
        none, nowhere = torch.zeros(0, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.bool)
        arguments = (part.to(logits.device) for part in (torch.tensor([position]), none, nowhere))
        return int(self.sampler.choose(logits, *arguments))

    def launch(self, logits: Tensor, nodes: VerifiedNodes) -> Tensor:
        """Return the token to follow at each node, as the keys that the accepting kernel reads: int64 [nodes, 1]."""
        tokens, is_above = nodes.tokens.long(), nodes.is_above
        positions = self._memory.record[LENGTH] + nodes.depth.long() + 1
        chosen = self.sampler.choose(logits, positions, tokens, is_above)
        if self.kind.is_typical:
            chances = self.sampler.probabilities(logits, tokens, is_above)
            thresholds = typical_threshold(chances, self._epsilon, self._delta)
            chosen = typical_targets(chances, thresholds, tokens, chosen, nodes.parents.long(), is_above)
        return (0xFFFFFFFF - chosen).unsqueeze(1)

    def note_accepted(self) -> None:
        """Count the tokens of the path that the step has just accepted."""
        record = self._memory.record
        path = record[PATH_TOKENS : PATH_TOKENS + MAX_PATH].long()
        self.sampler.history.add(path, self._places <= record[NUM_ACCEPTED])


def typical_targets(
    chances: Tensor, thresholds: Tensor, tokens: Tensor, chosen: Tensor, parents: Tensor, is_above: Tensor
) -> Tensor:
    """Return the tokens to follow at each node so that exact acceptance takes the path of `accept_typical`.

    chances float64 [nodes, vocab] and thresholds [nodes] as there; tokens, chosen and parents int64 [nodes], where
    `chosen` are the nodes' own samples; is_above bool [nodes, nodes] is the tree's `ancestors`. Never waits.
    """
    is_root = parents < 0
    above = parents.clamp(min=0)
    chance = chances[above, tokens]
    is_typical = is_root | (chance > thresholds[above])
    is_allowed = ~(is_above & ~is_typical).any(-1)
    log_chance = torch.where(is_root | ~is_typical, 0.0, chance.log())
    likelihood = torch.where(is_above, log_chance, 0.0).sum(-1)
    depth = torch.where(is_allowed, is_above.sum(-1), 0)
    best = torch.where(depth == depth.max(), likelihood, -torch.inf).argmax()
    # [parent, child] for the links of the best path; no node has two children on it
    nodes = torch.arange(len(above), device=above.device)
    links = is_above[best] & ~is_root & (above == nodes.unsqueeze(1))
    return torch.where(links.any(-1), torch.where(links, tokens, 0).sum(-1), chosen)
