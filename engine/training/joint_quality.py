"""What is left of a model after joint training: divergence from the original, perplexity on held-back answers."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from engine.training.dataset import HiddenCache, TextSet, build_cache
from engine.training.dense import TrainingModel
from engine.training.joint_loss import divergence

__all__ = ["Quality", "compare"]


@dataclass(frozen=True)
class Quality:
    """`kl` is the mean KL(original || tuned) a token in nats, `same_best` the share of tokens with the same argmax."""

    kl: float
    same_best: float
    perplexity_original: float
    perplexity_tuned: float
    positions: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def compare(original: TrainingModel, tuned: TrainingModel, text: TextSet) -> Quality:
    """Compare two models of one vocabulary on the answers in `text`, each token after the true ones before it."""
    ours, theirs = build_cache(original, text), build_cache(tuned, text)
    rows = ours.anchors()
    total, same = divergence(theirs.hidden[rows], tuned.lm_head_weight, ours.hidden[rows], original.lm_head_weight)
    count = max(1, rows.numel())
    return Quality(
        kl=float(total) / count,
        same_best=float(same) / count,
        perplexity_original=_perplexity(original, ours, rows),
        perplexity_tuned=_perplexity(tuned, theirs, rows),
        positions=rows.numel(),
    )


def _perplexity(model: TrainingModel, cache: HiddenCache, rows: Tensor, chunk: int = 2048) -> float:
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for part in rows.split(chunk):
        log_chance = (cache.hidden[part] @ model.lm_head_weight.T).log_softmax(-1, dtype=torch.float32)
        total -= log_chance.gather(1, cache.tokens[part + 1].unsqueeze(1)).sum()
    return float((total / max(1, rows.numel())).exp())
