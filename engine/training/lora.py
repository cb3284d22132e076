"""Low-rank adapters (LoRA, arXiv 2106.09685) on a backbone's linears, all switched on and off together.

A backbone's query, key and value matrices are one linear, as are gate and up; each such linear has one adapter. With
the adapters off the backbone computes exactly what it did before, which makes it its own teacher.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.backbone import Backbone

__all__ = ["ALPHA", "RANK", "LoraAdapters", "LoraLinear", "Switch"]

RANK, ALPHA = 32, 16.0  # MEDUSA, section 3
_PARTS = ("qkv", "attention_output", "gate_up", "down")


class Switch:
    """Whether the adapters that share it take part."""

    def __init__(self) -> None:
        self.is_on = True


class Adapter(nn.Module):
    """The factors of one linear's change: `up` [out, rank] @ `down` [rank, in] * scale; `up` starts at zero."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the linear's output: x [..., in] -> [..., out]."""
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype) * self.scale)

    def delta(self) -> Tensor:
        """Return what is added to the linear's matrix, float32 [out, in]; differentiable."""
        return self.scale * (self.up @ self.down)


class LoraLinear(nn.Module):
    """A frozen linear of any format and its adapter."""

    def __init__(self, base: nn.Module, adapter: Adapter, switch: Switch) -> None:
        super().__init__()
        self.base, self.adapter, self.switch = base, adapter, switch

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        return out + self.adapter(x) if self.switch.is_on else out


class LoraAdapters(nn.Module):
    """The adapters of all of a backbone's linears and of its `lm_head`; putting them in changes `backbone`.

    Only the adapters are parameters of this module, so its state is what a checkpoint needs.
    """

    def __init__(self, backbone: Backbone, rank: int = RANK, alpha: float = ALPHA, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.rank, self.alpha, self.switch = rank, alpha, Switch()
        config, device = backbone.config, backbone.cos.device
        scale = alpha / rank
        shapes = _shapes(backbone)
        self.layers = nn.ModuleList(
            nn.ModuleDict({part: Adapter(*shapes[part], rank, scale) for part in _PARTS}) for _ in backbone.layers
        )
        self.lm_head = Adapter(config.hidden_size, config.vocab_size, rank, scale)
        self.to(device)
        for layer, adapters in zip(backbone.layers, self.layers, strict=True):
            for part in _PARTS:
                setattr(layer, part, LoraLinear(getattr(layer, part), adapters[part], self.switch))
        backbone.lm_head = LoraLinear(backbone.lm_head, self.lm_head, self.switch)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Let the backbone compute without its adapters."""
        before, self.switch.is_on = self.switch.is_on, False
        try:
            yield
        finally:
            self.switch.is_on = before

    def take_out(self, backbone: Backbone) -> None:
        """Give `backbone` its own linears back."""
        for layer in backbone.layers:
            for part in _PARTS:
                setattr(layer, part, getattr(layer, part).base)
        backbone.lm_head = backbone.lm_head.base


def _shapes(backbone: Backbone) -> dict[str, tuple[int, int]]:
    """Return (in, out) of each part of a layer."""
    config = backbone.config
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "qkv": (config.hidden_size, queries + 2 * keys),
        "attention_output": (queries, config.hidden_size),
        "gate_up": (config.hidden_size, 2 * config.intermediate_size),
        "down": (config.intermediate_size, config.hidden_size),
    }
