"""The heads' loss: half hard label, half the backbone's own distribution, over the output vocabulary.

Scores over the vocabulary are the largest tensors of training, so they live only inside this function: the gradient
with respect to the features is computed on the spot, chunk by chunk, and the backward pass only scales it.
"""

from typing import Any

import torch
from torch import Tensor

try:  # optional: absent on CPU machines, where the plain version runs
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["HARD_SHARE", "IGNORED", "HeadLoss", "head_loss", "row_loss", "row_loss_plain"]

HARD_SHARE = 0.5
IGNORED = -1


def head_loss(
    features: Tensor,
    output: Tensor,
    teacher: Tensor,
    teacher_rows: Tensor,
    gold: Tensor,
    weight: Tensor,
    chunk: int = 16384,
) -> tuple[Tensor, Tensor]:
    """Return (sum of weighted losses over rows, rank of the gold token a row).

    features [rows, hidden]; output [vocab, hidden]; teacher [any, vocab]: scores of the backbone, of which
    `teacher_rows` int64 [rows] names each row's; gold int64 [rows], IGNORED where it is not in the vocabulary; weight
    float32 [rows], 0 takes a row out. Rank 0 is the best; rows with an ignored gold have rank `vocab`. Differentiable
    in features and output.
    """
    return HeadLoss.apply(features, output, teacher, teacher_rows, gold, weight, chunk)


class HeadLoss(torch.autograd.Function):
    """Loss and gradients in one pass; see `head_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        output: Tensor,
        teacher: Tensor,
        teacher_rows: Tensor,
        gold: Tensor,
        weight: Tensor,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        matrix = output.to(features.dtype)
        grad_features = torch.empty_like(features)
        grad_output = torch.zeros_like(output, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        # No rows at all is a sum of nothing, not an error.
        losses, ranks = [torch.zeros((), device=features.device)], [gold[:0]]
        for start in range(0, features.shape[0], chunk):
            part = slice(start, start + chunk)
            scores = features[part] @ matrix.T
            loss, rank = row_loss(scores, teacher, teacher_rows[part], gold[part], weight[part])
            # From here on `scores` hold their gradient.
            grad_features[part] = scores @ matrix
            if grad_output is not None:
                grad_output += scores.T @ features[part]
            losses.append(loss.sum())
            ranks.append(rank)
        ctx.save_for_backward(grad_features, grad_output)
        rank = torch.cat(ranks)
        ctx.mark_non_differentiable(rank)
        return torch.stack(losses).sum(), rank

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_rank: Tensor) -> tuple[Tensor | None, ...]:
        grad_features, grad_output = ctx.saved_tensors
        scaled = None if grad_output is None else grad_output * grad_loss
        return (grad_features.float() * grad_loss).to(grad_features.dtype), scaled, None, None, None, None, None


def row_loss(
    scores: Tensor, teacher: Tensor, teacher_rows: Tensor, gold: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (weighted loss float32 [rows], rank int64 [rows]) and overwrite `scores` with their gradient.

    scores [rows, vocab], teacher [any, vocab], the others [rows].
    """
    compute = row_loss_triton if scores.is_cuda and triton is not None else row_loss_plain
    return compute(scores, teacher, teacher_rows, gold, weight)


def row_loss_plain(
    scores: Tensor, teacher: Tensor, teacher_rows: Tensor, gold: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The CPU path, and the kernel's oracle."""
    has_gold = gold >= 0
    place = gold.clamp(min=0).unsqueeze(1)
    log_chance = scores.float().log_softmax(-1)
    target = teacher[teacher_rows].float().softmax(-1)
    hard = torch.where(has_gold, HARD_SHARE, 0.0) * weight
    soft = (1 - HARD_SHARE) * weight
    gold_score = scores.gather(1, place)
    rank = torch.where(has_gold, (scores > gold_score).sum(-1), scores.shape[1])
    loss = -hard * log_chance.gather(1, place).squeeze(1) - soft * (target * log_chance).sum(-1)
    grad = log_chance.exp() * (hard + soft).unsqueeze(1) - target * soft.unsqueeze(1)
    grad.scatter_add_(1, place, -hard.unsqueeze(1))
    scores.copy_(grad)
    return loss, rank


if triton is not None:

    @triton.jit
    def _row_loss_kernel(
        scores,
        teacher,
        teacher_rows,
        gold,
        weight,
        loss,
        rank,
        stride,
        teacher_stride,
        hard_share,
        VOCAB,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        factor = tl.load(weight + row)
        label = tl.load(gold + row).to(tl.int32)
        column = tl.arange(0, BLOCK)
        inside = column < VOCAB
        if factor == 0:
            tl.store(scores + row * stride + column, tl.zeros([BLOCK], tl.float32), mask=inside)
            tl.store(loss + row, 0.0)
            tl.store(rank + row, VOCAB)
        else:
            x = tl.load(scores + row * stride + column, mask=inside, other=float("-inf")).to(tl.float32)
            source = tl.load(teacher_rows + row)
            t = tl.load(teacher + source * teacher_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
            target = tl.exp(t - tl.max(t, axis=0))
            target = target / tl.sum(target, axis=0)
            shifted = x - tl.max(x, axis=0)
            power = tl.exp(shifted)
            total = tl.sum(power, axis=0)
            log_total = tl.log(total)
            is_gold = column == label
            gold_score = tl.sum(tl.where(is_gold, shifted, 0.0), axis=0)
            hard = tl.where(label >= 0, hard_share, 0.0) * factor
            soft = (1 - hard_share) * factor
            log_chance = tl.where(inside, shifted - log_total, 0.0)
            value = -hard * (gold_score - log_total) - soft * tl.sum(target * log_chance, axis=0)
            better = tl.sum(tl.where(shifted > gold_score, 1, 0), axis=0)
            grad = power / total * (hard + soft) - target * soft - tl.where(is_gold, hard, 0.0)
            tl.store(scores + row * stride + column, grad.to(scores.dtype.element_ty), mask=inside)
            tl.store(loss + row, value)
            tl.store(rank + row, tl.where(label >= 0, better, VOCAB))


def row_loss_triton(
    scores: Tensor, teacher: Tensor, teacher_rows: Tensor, gold: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The same with one program a row that holds the whole row."""
    rows, vocab = scores.shape
    assert scores.stride(1) == 1 and teacher.stride(1) == 1
    block = triton.next_power_of_2(vocab)
    if block > 65536:
        return row_loss_plain(scores, teacher, teacher_rows, gold, weight)
    loss = torch.empty(rows, dtype=torch.float32, device=scores.device)
    rank = torch.empty(rows, dtype=torch.int64, device=scores.device)
    _row_loss_kernel[(rows,)](
        scores,
        teacher,
        teacher_rows,
        gold,
        weight,
        loss,
        rank,
        scores.stride(0),
        teacher.stride(0),
        HARD_SHARE,
        vocab,
        BLOCK=block,
        num_warps=16 if block >= 8192 else 4,
    )
    return loss, rank
