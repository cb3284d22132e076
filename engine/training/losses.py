"""The heads' loss: cross entropy against a mixture of the true token and the backbone's own distribution.

The gradient of cross entropy against any fixed distribution q is softmax(logits) - q, so it is computed in the forward
and no log-probabilities are kept: at 16,384 tokens by 16,384 classes one matrix is half a gigabyte.
"""

import torch
from torch import Tensor

__all__ = ["head_weights", "mixture_cross_entropy"]


def head_weights(num_heads: int, decay: float = 0.8) -> list[float]:
    """Return each head's share of the loss, decay^k for head k (MEDUSA, equation 1)."""
    return [decay**head for head in range(num_heads)]


class _MixtureCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, teacher: Tensor, labels: Tensor, hard: Tensor, weights: Tensor) -> Tensor:
        picked = labels.clamp(min=0).unsqueeze(1)
        log_total = torch.logsumexp(logits, dim=1).float()
        true = logits.gather(1, picked).squeeze(1).float()
        expected = torch.linalg.vecdot(teacher, logits).float()
        loss = log_total - hard * true - (1 - hard) * expected
        gradient = torch.softmax(logits, dim=1)
        gradient.addcmul_(teacher, (hard - 1).unsqueeze(1).to(teacher.dtype))
        gradient.scatter_add_(1, picked, -hard.unsqueeze(1).to(gradient.dtype))
        ctx.save_for_backward(gradient, weights)
        return (loss * weights).sum()

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        gradient, weights = ctx.saved_tensors
        return gradient * (upstream * weights).unsqueeze(1).to(gradient.dtype), None, None, None, None


def mixture_cross_entropy(
    logits: Tensor, teacher: Tensor, labels: Tensor, weights: Tensor, share: float = 0.5
) -> Tensor:
    """Return the weighted sum of cross entropies of rows against share * onehot(label) + (1 - share) * teacher.

    logits and teacher [rows, classes], the teacher as probabilities; labels int64 [rows], -1 where the true token is no
    class (the teacher alone counts there); weights float32 [rows], 0 for rows without a label.
    """
    hard = torch.where(labels >= 0, share, 0.0).float()
    return _MixtureCrossEntropy.apply(logits, teacher, labels, hard, weights)
