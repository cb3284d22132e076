"""Block-quantised weight matrices as they lie in a file: codes and scales, not yet packed for any kernel.

Blocks of 32 run along K (the input features), so matrices over the same input concatenate along N without loss, and
rows may be permuted freely.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["BLOCK", "DenseWeight", "Q4Affine", "Q8Symmetric", "Weight", "concat_rows", "quantize_q4"]

BLOCK = 32


@dataclass(frozen=True)
class Q4Affine:
    """value = scale * code + minimum (GGUF Q4_1; Q4_0 with minimum = -8 * scale).

    codes uint8 [N, K] in 0..15; scale and minimum float16 [N, K / 32].
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """Return the values, float32 [N, K]."""
        blocks = self.codes.view(self.codes.shape[0], -1, BLOCK).float()
        return (blocks * self.scale.float().unsqueeze(-1) + self.minimum.float().unsqueeze(-1)).flatten(1)

    def permute_rows(self, order: Tensor | slice) -> "Q4Affine":
        return replace(self, codes=self.codes[order], scale=self.scale[order], minimum=self.minimum[order])


@dataclass(frozen=True)
class Q8Symmetric:
    """value = scale * code (GGUF Q8_0). codes int8 [N, K]; scale float16 [N, K / 32]."""

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """Return the values, float32 [N, K]."""
        blocks = self.codes.view(self.codes.shape[0], -1, BLOCK).float()
        return (blocks * self.scale.float().unsqueeze(-1)).flatten(1)

    def permute_rows(self, order: Tensor | slice) -> "Q8Symmetric":
        return replace(self, codes=self.codes[order], scale=self.scale[order])


@dataclass(frozen=True)
class DenseWeight:
    """Plain values [N, K] in any float type."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def dequantize(self) -> Tensor:
        """Return the values, float32 [N, K]."""
        return self.values.float()

    def permute_rows(self, order: Tensor | slice) -> "DenseWeight":
        return DenseWeight(self.values[order])


Weight = Q4Affine | Q8Symmetric | DenseWeight


def concat_rows(weights: Sequence[Weight]) -> Weight:
    """Stack matrices over the same input along N; of mixed kinds, as dense values."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if isinstance(first, Q4Affine) and all(isinstance(weight, Q4Affine) for weight in weights):
        return Q4Affine(*(_stack(weights, name) for name in ("codes", "scale", "minimum")))
    if isinstance(first, Q8Symmetric) and all(isinstance(weight, Q8Symmetric) for weight in weights):
        return Q8Symmetric(*(_stack(weights, name) for name in ("codes", "scale")))
    if isinstance(first, DenseWeight) and all(isinstance(weight, DenseWeight) for weight in weights):
        return DenseWeight(_stack(weights, "values"))
    return DenseWeight(torch.cat([weight.dequantize() for weight in weights]))


def _stack(weights: Sequence[Weight], name: str) -> Tensor:
    return torch.cat([getattr(weight, name) for weight in weights])


def quantize_q4(values: Tensor) -> Q4Affine:
    """Round a matrix [N, K] to 16 even steps between each block's smallest and largest value."""
    blocks = values.float().view(values.shape[0], -1, BLOCK)
    low, high = blocks.aminmax(dim=-1)
    minimum = low.half()
    scale = ((high - low) / 15).clamp(min=1e-8).half()
    codes = (blocks - minimum.float().unsqueeze(-1)) / scale.float().clamp(min=1e-8).unsqueeze(-1)
    return Q4Affine(codes.round().clamp(0, 15).to(torch.uint8).flatten(1), scale, minimum)
