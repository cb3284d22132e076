"""Prefix attention: what draft heads read where the last hidden state alone says too little.

A backbone's last hidden state is made for the next token; heads guess those after it. So one more attention looks back
over the whole text, at the last hidden states and at those of a few middle layers, and its answer is added to the
hidden state that heads read, as in Hydra++ (arXiv 2402.05109, section 5) with the fused features of EAGLE-3 (arXiv
2503.01840, section 3.1). It has the shape of the backbone's attention, so that it can run as one more layer in the same
cache, and no part in what the backbone computes: the text does not depend on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from engine.backbone import Attend, BackboneConfig, rotate
from engine.errors import CheckpointMismatchError

__all__ = ["PrefixAttention", "PrefixConfig", "feature", "middle_layers"]


@dataclass(frozen=True)
class PrefixConfig:
    """`layers` (from 0, rising) are the backbone's whose outputs are read besides the last hidden state."""

    layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @staticmethod
    def of(backbone: BackboneConfig, layers: Sequence[int] | None = None) -> "PrefixConfig":
        """Return the shape that fits a backbone; it reads `layers`, by default two in the middle."""
        chosen = middle_layers(backbone) if layers is None else tuple(layers)
        return PrefixConfig(chosen, backbone.num_heads, backbone.num_kv_heads, backbone.head_dim)

    @property
    def num_features(self) -> int:
        """States of a token that are read, the last hidden state among them."""
        return len(self.layers) + 1

    def check_fits(self, backbone: BackboneConfig) -> None:
        """Raise CheckpointMismatchError unless this can be one more layer of that backbone's."""
        ours = self.num_heads, self.num_kv_heads, self.head_dim
        theirs = backbone.num_heads, backbone.num_kv_heads, backbone.head_dim
        if ours != theirs:
            raise CheckpointMismatchError(
                f"The heads' prefix attention has {ours[0]} heads, {ours[1]} of keys, of {ours[2]}; the model has "
                f"{theirs[0]}, {theirs[1]}, of {theirs[2]}. Load the model that they were trained on."
            )
        if list(self.layers) != sorted(set(self.layers)) or not set(self.layers) <= set(range(backbone.num_layers)):
            raise CheckpointMismatchError(
                f"The heads read layers {list(self.layers)} of a model that has {backbone.num_layers}; "
                "load the model that they were trained on."
            )


class PrefixAttention(nn.Module):
    """h + O attention(h, m_1, m_2, ..): h the last hidden state, m_j a middle layer's `feature`.

    `query_key_value` [(heads + 2 kv heads) x head_dim, features x hidden] and `output` [hidden, heads x head_dim]; O is
    zero at the start, so that heads begin with the hidden state itself.
    """

    def __init__(self, config: PrefixConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.query_key_value = nn.Linear(config.num_features * hidden_size, rows, bias=False)
        self.output = nn.Linear(config.num_heads * config.head_dim, hidden_size, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, features: Tensor, cos: Tensor, sin: Tensor, attend: Attend, layer: int = 0) -> Tensor:
        """Return what heads read: features [..., features x hidden], the hidden state first -> [..., hidden].

        `cos` and `sin` [..., 1, head_dim] as in the backbone; `attend` keeps its keys and values as those of `layer`.
        """
        config = self.config
        qkv = self.query_key_value(features).unflatten(-1, (-1, config.head_dim))
        rotated, value = qkv.split((config.num_heads + config.num_kv_heads, config.num_kv_heads), dim=-2)
        query, key = rotate(rotated, cos, sin).split((config.num_heads, config.num_kv_heads), dim=-2)
        hidden = features[..., : self.output.weight.shape[0]]
        return hidden + self.output(attend(layer, query, key, value).flatten(-2))


def middle_layers(backbone: BackboneConfig) -> tuple[int, ...]:
    """Return the layers at a third and two thirds of a backbone's depth."""
    return tuple(sorted({max(0, part * backbone.num_layers // 3 - 1) for part in (1, 2)}))


def feature(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale what leaves a layer [..., hidden] to unit RMS, in float32 row by row: few tokens have huge states."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)
