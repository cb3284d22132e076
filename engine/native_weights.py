"""A model's weights as the C decoder reads them: matrices packed into one arena, and where each of them lies.

What is computed with them is not known here (see `engine.native_runner`).
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_void_p

from torch import Tensor

from engine.backbone import BackboneConfig, BackboneWeights, LayerWeights
from engine.block_weights import DenseWeight, Q4Affine, Q8Symmetric, Weight, quantize_q4
from engine.errors import CheckpointMismatchError
from engine.kernels.cpu_native import NativeArena, NativeMatrix, to_q8
from engine.prefix_attention import PrefixAttention

__all__ = ["DecoderLayer", "PackedPrefix", "PackedWeights", "PrefixLayer"]

_MATRICES = ("query", "key", "value", "attention_output", "gate", "up", "down")


class DecoderLayer(ctypes.Structure):
    """A layer as in cpu/api.h."""

    _fields_ = [(name, c_void_p) for name in (*_MATRICES, "attention_norm", "mlp_norm")]


class PrefixLayer(ctypes.Structure):
    """The heads' prefix attention as in cpu/api.h."""

    _fields_ = [(name, c_void_p) for name in ("query", "key", "value", "output")]


class PackedWeights:
    """A model's matrices in one arena, and its norms in float32."""

    def __init__(self, weights: BackboneWeights) -> None:
        self.is_rounded = False
        layers = [[self._block(getattr(layer, name)) for name in _MATRICES] for layer in weights.layers]
        embedding = self._block(weights.embedding)
        is_tied = weights.lm_head is weights.embedding
        lm_head = embedding if is_tied else self._block(weights.lm_head)
        every = [*(matrix for layer in layers for matrix in layer), embedding, *([] if is_tied else [lm_head])]
        self.arena = NativeArena(every)
        self.embedding = NativeMatrix(self.arena, embedding)
        self.lm_head = self.embedding if is_tied else NativeMatrix(self.arena, lm_head)
        self.norm = weights.norm.float().contiguous()
        self._norms: list[Tensor] = []
        self.layers = [self._layer(packed, layer) for packed, layer in zip(layers, weights.layers, strict=True)]

    @property
    def num_bytes(self) -> int:
        return self.arena.num_bytes + 4 * sum(norm.numel() for norm in (self.norm, *self._norms))

    def label(self, source_format: str) -> str:
        return f"{source_format} rounded to int8" if self.is_rounded else source_format

    def _block(self, weight: Weight) -> Q4Affine | Q8Symmetric:
        if not isinstance(weight, DenseWeight):
            return weight
        self.is_rounded = True
        return to_q8(weight)

    def _layer(self, packed: Sequence[Q4Affine | Q8Symmetric], layer: LayerWeights) -> DecoderLayer:
        norms = [norm.float().contiguous() for norm in (layer.attention_norm, layer.mlp_norm)]
        self._norms += norms
        handles = [NativeMatrix(self.arena, weight).handle for weight in packed]
        return DecoderLayer(*handles, *(norm.data_ptr() for norm in norms))


class PackedPrefix:
    """The matrices of a heads' prefix attention, in an arena of their own. Raises CheckpointMismatchError."""

    def __init__(self, prefix: PrefixAttention, config: BackboneConfig) -> None:
        prefix.config.check_fits(config)
        wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        joint, output = prefix.query_key_value.weight.detach(), prefix.output.weight.detach()
        inputs = prefix.config.num_features * config.hidden_size
        if joint.shape != (wide + 2 * narrow, inputs) or output.shape != (config.hidden_size, wide):
            raise CheckpointMismatchError(
                f"The heads' prefix attention is over states of {output.shape[0]}; the model's are of "
                f"{config.hidden_size}. Load the model that they were trained on."
            )
        weights = [_round_prefix(rows) for rows in (*joint.split((wide, narrow, narrow)), output)]
        self.arena = NativeArena(weights)
        self.layer = PrefixLayer(*(NativeMatrix(self.arena, weight).handle for weight in weights))

    @property
    def num_bytes(self) -> int:
        return self.arena.num_bytes


def _round_prefix(values: Tensor) -> Q4Affine | Q8Symmetric:
    """4 bits, as guesses need no exactness."""
    return quantize_q4(values)
