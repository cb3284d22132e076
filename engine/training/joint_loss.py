"""How far a backbone has moved from its teacher: KL(teacher || student) of the next token, from hidden states.

Scores over the whole vocabulary live only inside one chunk of rows: gradients are computed on the spot, and the
backward pass only scales them.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["divergence"]


def divergence(
    hidden: Tensor, output: Tensor, teacher_hidden: Tensor, teacher_output: Tensor, chunk: int = 2048
) -> tuple[Tensor, Tensor]:
    """Return (summed KL over rows in nats, number of rows with the same best token).

    hidden and teacher_hidden [rows, hidden]; output and teacher_output [vocab, hidden]. Differentiable in `hidden` and
    `output`.
    """
    return _Divergence.apply(hidden, output, teacher_hidden, teacher_output, chunk)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, output: Tensor, teacher_hidden: Tensor, teacher_output: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), device=hidden.device)
        same = torch.zeros((), dtype=torch.int64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_output = torch.zeros_like(output, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            scores, teacher_scores = hidden[part] @ output.T, teacher_hidden[part] @ teacher_output.T
            same += (scores.argmax(-1) == teacher_scores.argmax(-1)).sum()
            log_chance = scores.log_softmax(-1, dtype=torch.float32)
            target = teacher_scores.log_softmax(-1, dtype=torch.float32)
            chance = target.exp()
            total += (chance * target.sub_(log_chance)).sum()
            grad_scores = log_chance.exp_().sub_(chance).to(hidden.dtype)
            grad_hidden[part] = grad_scores @ output
            if grad_output is not None:
                grad_output += grad_scores.T @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_output)
        ctx.mark_non_differentiable(same)
        return total, same

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad_same: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_output = ctx.saved_tensors
        scaled = None if grad_output is None else grad_output * grad_total
        return (grad_hidden.float() * grad_total).to(grad_hidden.dtype), scaled, None, None, None
