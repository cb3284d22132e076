"""Where each head places the tokens that really followed: the one measurement behind calibration and evaluation.

Acceptance is exact, so for a greedy text the ranks of its true tokens decide what any tree would have accepted; no
decoding is needed. Heads that see drafted tokens are given the true ones, which is what they see on an accepted path.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.heads import MedusaHeads, seen_embeddings
from engine.training.states import StateCache

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
def measure_ranks(
    heads: MedusaHeads, cache: StateCache, embedding: Tensor, output: Tensor, chunk: int = 8192
) -> AnswerRanks:
    """Return the ranks of the true tokens at all anchors of the cache.

    embedding [vocab, hidden] and output [output_size, hidden] are the backbone's; `output` the draft vocabulary's rows.
    """
    anchors = cache.anchors()
    # An answer ends where the next anchor is not the next token.
    breaks = torch.ones_like(anchors)
    breaks[1:] = anchors[1:] != anchors[:-1] + 1
    class_of = _class_of(heads, embedding)
    rows = [_rank_chunk(heads, cache, embedding, output, class_of, part) for part in anchors.split(chunk)]
    ranks = torch.cat(rows) if rows else torch.empty(0, heads.config.num_heads, dtype=torch.uint8)
    return AnswerRanks(ranks.cpu(), (breaks.cumsum(0) - 1).cpu())


def _rank_chunk(
    heads: MedusaHeads, cache: StateCache, embedding: Tensor, output: Tensor, class_of: Tensor, anchors: Tensor
) -> Tensor:
    hidden, last = cache.hidden[anchors], cache.num_tokens - 1
    ranks = torch.full((anchors.numel(), heads.config.num_heads), MISSED, dtype=torch.uint8, device=anchors.device)
    exists = torch.ones_like(anchors, dtype=torch.bool)
    for head in range(heads.config.num_heads):
        target = anchors + 2 + head
        place = target.clamp(max=last)
        exists = exists & (target <= last) & cache.is_answer[place] & (cache.document[place] == cache.document[anchors])
        seen = None
        if heads.config.num_seen(head):
            steps = torch.arange(1, heads.config.num_seen(head) + 1, device=anchors.device)
            tokens = cache.tokens[(anchors.unsqueeze(1) + steps).clamp(max=last)]
            seen = seen_embeddings(embedding[tokens])
        with torch.autocast(anchors.device.type, dtype=torch.bfloat16):
            features = heads.features(head, hidden, seen)
        scores = heads.logits(head, features.float(), _Rows(output))
        classes = class_of[cache.tokens[place]]
        true = scores.gather(1, classes.clamp(min=0).unsqueeze(1))
        rank = (scores > true).sum(dim=1).clamp(max=MISSED)
        ranks[:, head] = torch.where(exists & (classes >= 0), rank, MISSED).to(torch.uint8)
    return ranks


class _Rows(nn.Module):
    """Some rows of the backbone's `lm_head`, in float32: equal scores would blur ranks."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.output.float().T


def _class_of(heads: MedusaHeads, embedding: Tensor) -> Tensor:
    ids = torch.arange(embedding.shape[0]) if heads.token_map is None else heads.token_map.cpu()
    classes = torch.full((embedding.shape[0],), -1, dtype=torch.int64)
    classes[ids] = torch.arange(ids.numel())
    return classes.to(embedding.device)
