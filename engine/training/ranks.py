"""Where each head places the tokens that really followed: the one measurement behind calibration and evaluation.

Acceptance is exact, so for a greedy text the ranks of its true tokens decide what any tree would have accepted; no
decoding is needed. Heads that see drafted tokens are given the true ones, which is what they see on an accepted path.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.heads import MedusaHeads
from engine.training.dataset import HiddenCache
from engine.training.medusa1 import Vocabulary

__all__ = ["MISSED", "AnswerRanks", "measure_ranks"]

MISSED = 15  # rank of a token that no tree would hold, or that does not exist


@dataclass(frozen=True)
class AnswerRanks:
    """Ranks at every anchor of some answers, uint8 [anchors, heads] on the CPU, 0 the best, MISSED at most.

    Anchor t stands where a step could start (its next token is the root). `answer` int64 [anchors] numbers the answers
    in order; anchors of one answer are consecutive.
    """

    ranks: Tensor
    answer: Tensor

    @property
    def num_answers(self) -> int:
        return int(self.answer[-1]) + 1 if self.answer.numel() else 0

    def halves(self) -> tuple["AnswerRanks", "AnswerRanks"]:
        """Split by answers: even ones, odd ones."""
        return self._select(self.answer % 2 == 0), self._select(self.answer % 2 == 1)

    def _select(self, chosen: Tensor) -> "AnswerRanks":
        _, numbered = torch.unique(self.answer[chosen], return_inverse=True)
        return AnswerRanks(self.ranks[chosen], numbered)


@torch.no_grad()
def measure_ranks(heads: MedusaHeads, cache: HiddenCache, vocabulary: Vocabulary, chunk: int = 8192) -> AnswerRanks:
    """Return the ranks of the true tokens at all anchors of the cache."""
    anchors = cache.anchors()
    # An answer ends where the next anchor is not the next token.
    breaks = torch.ones_like(anchors)
    breaks[1:] = anchors[1:] != anchors[:-1] + 1
    outputs = [vocabulary.output_of(heads, head).float() for head in range(heads.config.num_heads)]
    rows = [_rank_chunk(heads, cache, vocabulary, outputs, part) for part in anchors.split(chunk)]
    ranks = torch.cat(rows) if rows else torch.empty(0, heads.config.num_heads, dtype=torch.uint8)
    return AnswerRanks(ranks.cpu(), (breaks.cumsum(0) - 1).cpu())


def _rank_chunk(
    heads: MedusaHeads, cache: HiddenCache, vocabulary: Vocabulary, outputs: list[Tensor], anchors: Tensor
) -> Tensor:
    hidden, run = cache.hidden[anchors], cache.run[anchors + 1]
    ranks = torch.empty(anchors.numel(), heads.config.num_heads, dtype=torch.uint8, device=anchors.device)
    for head in range(heads.config.num_heads):
        seen = vocabulary.seen_by(heads, head, cache.tokens, anchors)
        with torch.autocast(anchors.device.type, torch.bfloat16):
            features = heads.features(head, hidden, seen)
        scores = features.float() @ outputs[head].T  # in float32: scores that round to the same value would blur ranks
        gold = vocabulary.place[cache.tokens[(anchors + head + 2).clamp(max=cache.num_tokens - 1)]]
        true = scores.gather(1, gold.clamp(min=0).unsqueeze(1))
        rank = (scores > true).sum(dim=1).clamp(max=MISSED)
        ranks[:, head] = torch.where((run >= head + 2) & (gold >= 0), rank, MISSED).to(torch.uint8)
    return ranks
