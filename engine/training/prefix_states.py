"""A prefix attention in training: what heads read in whole texts, and how its features are made comparable.

A few channels of a backbone's states are tens of times larger than the others. Learnt as they are, those alone decide
the first attention scores, and what looks back learns nothing. So training sees every channel at unit scale; when it is
done, the factors are made part of the matrix.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from engine.backbone import Backbone
from engine.prefix_attention import PrefixAttention, feature
from engine.training.processes import ALONE, Processes

__all__ = ["attend_repeated", "begin_scaled", "end_scaled", "heads_states", "middle_features"]

SMALLEST = 0.5  # of the median channel's scale: smaller ones are not raised further, or rounding would suffer


def heads_states(prefix: PrefixAttention | None, backbone: Backbone, hidden: Tensor, middle: Tensor | None) -> Tensor:
    """Return what heads read in texts that begin at position 0, [texts, length, hidden].

    hidden [texts, length, hidden]; middle [texts, length, layers x hidden] where there is a prefix. Differentiable.
    """
    if prefix is None:
        return hidden
    assert middle is not None, "a prefix attention reads middle layers; build the cache with them"
    cos, sin = backbone.angles(torch.arange(hidden.shape[1], device=hidden.device))
    features = torch.cat([hidden, middle.to(hidden.dtype)], dim=-1)
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=hidden.dtype == torch.bfloat16):
        return prefix(features, cos, sin, attend_repeated).to(hidden.dtype)


def middle_features(left: list[Tensor]) -> Tensor | None:
    """Return what `Backbone.states` gave of middle layers as features side by side, [..., layers x hidden]."""
    return torch.cat([feature(x) for x in left], dim=-1) if left else None


def attend_repeated(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`attend_causal` with keys and values repeated for the heads that share them.

    Torch's own grouping in a backward pass has given NaN and stray memory accesses for these shapes (2.11, H100).
    """
    group = query.shape[-2] // key.shape[-2]
    key, value = (tensor.repeat_interleave(group, dim=-2) for tensor in (key, value))
    query, key, value = (tensor.transpose(1, 2).contiguous() for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


class _ColumnScale(nn.Module):
    """A matrix [N, K] as the product of what is learnt and one factor a column [K]."""

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, learnt: Tensor) -> Tensor:
        return learnt * self.factor

    def right_inverse(self, matrix: Tensor) -> Tensor:
        return matrix / self.factor


def begin_scaled(prefix: PrefixAttention, parts: Iterable[Tensor], processes: Processes = ALONE) -> None:
    """Learn the matrix over features as if every channel had the same scale in all processes' parts [rows, K].

    Fresh weights are taken as they are, for scaled channels; the factors become part of the module's state.
    """
    linear = prefix.query_key_value
    scale = _channel_scales(parts, linear.weight, processes)
    factor = 1 / scale.clamp(min=SMALLEST * float(scale.median()) + 1e-6)
    if not bool(prefix.output.weight.any()):  # fresh: nothing has been learnt for unscaled channels
        linear.weight.data *= factor
    parametrize.register_parametrization(linear, "weight", _ColumnScale(factor))


def end_scaled(prefix: PrefixAttention) -> None:
    """Make the factors part of the matrix, where there are some."""
    if parametrize.is_parametrized(prefix.query_key_value):
        parametrize.remove_parametrizations(prefix.query_key_value, "weight")


def _channel_scales(parts: Iterable[Tensor], matrix: Tensor, processes: Processes) -> Tensor:
    """Return the root mean square [K] of every column of the parts together; a process may have no rows."""
    sums = torch.zeros(matrix.shape[1] + 1, dtype=torch.float64, device=matrix.device)  # of squares, then of rows
    for part in parts:
        sums[:-1] += part.float().pow(2).sum(0)
        sums[-1] += len(part)
    sums = processes.add_up(sums)
    return (sums[:-1] / sums[-1]).sqrt().float()
