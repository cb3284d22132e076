"""The decoder of the Llama family, over whatever linears it was built with.

It knows layers, norms and rotary positions. How keys and values are kept and who may see whom is the business of the
`attend` callable, so that prefill, tree verification, batched generation and training share this one forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.block_weights import Weight, concat_rows

__all__ = ["Attend", "Backbone", "BackboneConfig", "BackboneWeights", "LayerWeights", "LinearFactory"]

# (layer index, query [..., heads, head_dim], key and value [..., kv_heads, head_dim]) -> [..., heads, head_dim]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
LinearFactory = Callable[[Weight], nn.Module]


@dataclass(frozen=True)
class BackboneConfig:
    """The shape of a Llama-family decoder."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    max_positions: int


@dataclass(frozen=True)
class LayerWeights:
    """One layer's matrices in any weight format, and its two norm vectors."""

    query: Weight
    key: Weight
    value: Weight
    attention_output: Weight
    gate: Weight
    up: Weight
    down: Weight
    attention_norm: Tensor
    mlp_norm: Tensor


@dataclass(frozen=True)
class BackboneWeights:
    """All of a backbone's weights; `lm_head` is the `embedding` itself where they are tied."""

    embedding: Weight
    layers: list[LayerWeights]
    norm: Tensor
    lm_head: Weight


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 row by row."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class DecoderLayer(nn.Module):
    """Attention and SwiGLU around a residual; QKV and gate/up are one matrix each."""

    def __init__(
        self, config: BackboneConfig, weights: LayerWeights, linear: LinearFactory, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config = config
        self.attention_norm = RMSNorm(weights.attention_norm.to(dtype), config.rms_norm_eps)
        self.qkv = linear(concat_rows([weights.query, weights.key, weights.value]))
        self.attention_output = linear(weights.attention_output)
        self.mlp_norm = RMSNorm(weights.mlp_norm.to(dtype), config.rms_norm_eps)
        self.gate_up = linear(concat_rows([weights.gate, weights.up]))
        self.down = linear(weights.down)

    def forward(self, index: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        config = self.config
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, config.head_dim))
        rotated, value = qkv.split((config.num_heads + config.num_kv_heads, config.num_kv_heads), dim=-2)
        query, key = rotate(rotated, cos, sin).split((config.num_heads, config.num_kv_heads), dim=-2)
        x = x + self.attention_output(attend(index, query, key, value).flatten(-2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Backbone(nn.Module):
    """Embedding, layers, final norm and `lm_head`.

    `embed` maps token ids [...] to [..., hidden] and `lm_head` maps [..., hidden] to [..., vocab]; they and every
    linear come from the caller, on one device and in one activation type.
    """

    cos: Tensor  # [positions, head_dim]
    sin: Tensor

    def __init__(
        self,
        config: BackboneConfig,
        weights: BackboneWeights,
        *,
        embed: nn.Module,
        linear: LinearFactory,
        lm_head: nn.Module,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config = config
        self.embed = embed
        self.layers = nn.ModuleList(DecoderLayer(config, layer, linear, dtype) for layer in weights.layers)
        self.norm = RMSNorm(weights.norm.to(dtype), config.rms_norm_eps)
        self.lm_head = lm_head
        cos, sin = rotary_tables(config, dtype)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Return the hidden states after the final norm: tokens and positions [...] -> [..., hidden]."""
        return self.states(tokens, positions, attend, ())[0]

    def states(self, tokens: Tensor, positions: Tensor, attend: Attend, layers: Sequence[int]) -> list[Tensor]:
        """Return the hidden states after the final norm, then what leaves each of `layers`, [..., hidden] each."""
        cos, sin = self.angles(positions)
        x, left = self.embed(tokens), []
        for index, layer in enumerate(self.layers):
            x = layer(index, x, cos, sin, attend)
            if index in layers:
                left.append(x)
        return [self.norm(x), *left]

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of positions [...], [..., 1, head_dim] each."""
        return self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)


def rotary_tables(config: BackboneConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines [positions, head_dim] and sines with the first half negated, both computed in float32.

    The sign is folded into the sines so that a rotation is x * cos + swap_halves(x) * sin.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(config.max_positions, dtype=torch.float32), config.rope_theta**-half)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head's pairs (i, i + head_dim / 2) by their position's angles."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin
