"""A model's matrices in the order that the CUDA linear reads, in one of its formats, on one device.

Which formats a device offers and how they are chosen is known in `engine.build`; how a matrix is launched, in
`engine.cuda_linear`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from engine.backbone import BackboneConfig, BackboneWeights
from engine.block_weights import DenseWeight, Q4Affine, Q8Symmetric, Weight
from engine.errors import EngineError
from engine.kernels.dense_linear import pack_dense
from engine.kernels.int8_linear import Int8Weight, pack_int8
from engine.kernels.nf4_linear import pack_nf4, stack_rows
from engine.kernels.nf4_quantize import quantize_nf4
from engine.kernels.small_batch_linear import PackedLinear
from engine.kernels.tree_attention import HEAD_DIMS

__all__ = ["CudaKernelsUnavailableError", "PackedBackbone", "PackedLayer", "pack_backbone", "pack_matrix", "require"]

PIECE_VALUES = 2 << 20  # of a matrix that are packed at a time


class CudaKernelsUnavailableError(EngineError):
    """The CUDA kernels do not know a shape of this model, or cannot run on this machine."""


@dataclass(frozen=True)
class PackedLayer:
    """One layer: QKV and gate/up are one matrix each, gate and up rows alternating."""

    attention_norm: Tensor
    qkv: PackedLinear
    attention_output: PackedLinear
    mlp_norm: Tensor
    gate_up: PackedLinear
    down: PackedLinear


@dataclass(frozen=True)
class PackedBackbone:
    """All of a backbone; the embedding stays a plain table [vocab, hidden] in the activations' type."""

    embedding: Tensor
    layers: list[PackedLayer]
    norm: Tensor
    lm_head: PackedLinear

    @property
    def matrices(self) -> list[PackedLinear]:
        """Every matrix, `lm_head` last."""
        packed = [getattr(layer, field.name) for layer in self.layers for field in fields(layer)]
        return [*(matrix for matrix in packed if isinstance(matrix, PackedLinear)), self.lm_head]

    @property
    def num_bytes(self) -> int:
        norms = 2 * len(self.layers) + 1
        return self.embedding.nbytes + norms * self.norm.nbytes + sum(matrix.num_bytes for matrix in self.matrices)


def pack_backbone(
    config: BackboneConfig, weights: BackboneWeights, *, quantize: str, dtype: torch.dtype, device: str
) -> PackedBackbone:
    """Round and order a model's weights; `quantize` is "nf4", "int8" or "none", `dtype` the activations' type.

    `lm_head` is rounded to int8 at most. Raises CudaKernelsUnavailableError for shapes that the kernels do not know.
    """
    check_shape(config)

    def pack(*matrices: Weight, gate_up: bool = False) -> PackedLinear:
        return pack_matrix(matrices, quantize, dtype, device, gate_up=gate_up)

    def norm(values: Tensor) -> Tensor:
        return values.to(device=device, dtype=dtype).contiguous()

    layers = [
        PackedLayer(
            attention_norm=norm(layer.attention_norm),
            qkv=replace(pack(layer.query, layer.key, layer.value), is_normed=True),
            attention_output=pack(layer.attention_output),
            mlp_norm=norm(layer.mlp_norm),
            gate_up=replace(pack(layer.gate, layer.up, gate_up=True), is_normed=True),
            down=pack(layer.down),
        )
        for layer in weights.layers
    ]
    return PackedBackbone(
        embedding=torch.cat([dense_values(piece, device).to(dtype) for piece in _pieces(weights.embedding)]),
        layers=layers,
        norm=norm(weights.norm),
        lm_head=replace(
            pack_matrix([weights.lm_head], "int8" if quantize == "int8" else "none", dtype, device), is_normed=True
        ),
    )


def pack_matrix(
    matrices: Sequence[Weight], quantize: str, dtype: torch.dtype, device: str, *, gate_up: bool = False
) -> PackedLinear:
    """Pack matrices over the same input as one; with `gate_up` the rows of the two alternate.

    It goes by pieces of rows, because a piece takes several times its values' memory on the way.
    """
    unit = 8 if gate_up else 16  # rows of each matrix that end with a tile
    if any(matrix.shape[0] % unit for matrix in matrices):
        groups = [list(matrices)]
    elif gate_up:
        groups = [list(group) for group in zip(*map(_pieces, matrices), strict=True)]
    else:
        groups = [[piece] for matrix in matrices for piece in _pieces(matrix)]
    parts = [_pack_piece(group, quantize, dtype, device, gate_up) for group in groups]
    return parts[0] if len(parts) == 1 else _joined(parts)


def _pieces(weight: Weight) -> list[Weight]:
    rows, columns = weight.shape
    step = max(16, PIECE_VALUES // columns // 16 * 16)
    return [weight.permute_rows(slice(start, start + step)) for start in range(0, rows, step)]


def _pack_piece(
    matrices: Sequence[Weight], quantize: str, dtype: torch.dtype, device: str, gate_up: bool
) -> PackedLinear:
    values = [dense_values(matrix, device) for matrix in matrices]
    if quantize == "nf4":
        return pack_nf4([quantize_nf4(value) for value in values], dtype, gate_up=gate_up)
    if quantize == "int8":
        return pack_int8([Int8Weight.from_dense(value) for value in values], dtype, gate_up=gate_up)
    return replace(pack_dense(stack_rows(values, gate_up).to(dtype)), gate_up=gate_up)


def _joined(parts: Sequence[PackedLinear]) -> PackedLinear:
    """Put matrices below each other: rows lie in tiles of 16, one tile after the other."""
    weights = torch.cat([part.weights.flatten() for part in parts])
    scales = [part.scales.flatten() for part in parts if part.scales is not None]
    return replace(parts[0], weights=weights, scales=torch.cat(scales) if scales else None, n=sum(p.n for p in parts))


def dense_values(weight: Weight, device: str) -> Tensor:
    """Return a matrix's values, float32 [N, K], expanded on the device."""
    if isinstance(weight, DenseWeight):
        return weight.values.to(device).float()
    moved = {field.name: getattr(weight, field.name).to(device) for field in fields(weight)}
    return (Q4Affine(**moved) if isinstance(weight, Q4Affine) else Q8Symmetric(**moved)).dequantize()


def check_shape(config: BackboneConfig) -> None:
    """Raise CudaKernelsUnavailableError for what the kernels do not cover."""
    require(config.head_dim in HEAD_DIMS, "heads of 64 or 128", config.head_dim)
    require(config.num_heads % config.num_kv_heads == 0, "whole groups of query heads", config.num_heads)
    for name in ("hidden_size", "intermediate_size"):
        size = getattr(config, name)
        require(size % 64 == 0, f"a multiple of 64 as {name}", size)
    require(config.hidden_size <= 16384, "a hidden size of at most 16384", config.hidden_size)
    require(config.vocab_size % 16 == 0, "a multiple of 16 tokens", config.vocab_size)


def require(holds: bool, needed: str, value: object) -> None:
    """Raise CudaKernelsUnavailableError where a condition of the kernels does not hold."""
    if not holds:
        raise CudaKernelsUnavailableError(f"The CUDA kernels need {needed}; this model has {value}.")
