"""The kernels' arithmetic in plain torch, for tests: float64 where it can be, one obvious line where it may."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["accept_greedy", "linear", "rms_norm", "rotate", "swiglu", "tree_attention"]


def linear(x: Tensor, values: Tensor) -> Tensor:
    """x W^T in float64: x [tokens, K], values [N, K] as dequantised."""
    return x.double() @ values.double().T


def swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(x gate^T) * (x up^T) in float64."""
    return F.silu(linear(x, gate)) * linear(x, up)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight by rows, in float64."""
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2): x [..., head_dim], angles (cos, sin) [..., head_dim / 2, 2], in float64."""
    low, high = x.double().chunk(2, dim=-1)
    cos, sin = angles.double().unbind(-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scratch_keys: Tensor,
    scratch_values: Tensor,
    length: int,
    ancestors: Tensor,
) -> Tensor:
    """Attention in float64, shapes as in `kernels.tree_attention`; ancestors bool [nodes, nodes]."""
    group = query.shape[1] // keys.shape[0]
    all_keys = torch.cat([keys[:, :length], scratch_keys.transpose(0, 1)], dim=1).double().repeat_interleave(group, 0)
    all_values = torch.cat([values[:, :length], scratch_values.transpose(0, 1)], dim=1).double()
    scores = query.double().transpose(0, 1) @ all_keys.transpose(1, 2) * query.shape[-1] ** -0.5  # [heads, nodes, keys]
    mask = torch.cat([torch.ones(len(query), length, dtype=torch.bool, device=query.device), ancestors], dim=1)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ all_values.repeat_interleave(group, 0)).transpose(0, 1)


def accept_greedy(targets: list[int], tokens: list[int], parents: list[int]) -> list[int]:
    """Return the accepted path, root first: while a child's token is the target's choice, go there."""
    path = [0]
    while True:
        node = path[-1]
        children = (i for i, parent in enumerate(parents) if parent == node and tokens[i] == targets[node])
        follows = next(children, None)
        if follows is None:
            return path
        path.append(follows)
