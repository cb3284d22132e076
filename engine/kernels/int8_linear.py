"""int8 matrices with one scale a row for the CUDA linear: codes widen exactly, the scale is applied to sums."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.linear_config import Decode
from engine.kernels.nf4_linear import stack_rows
from engine.kernels.small_batch_linear import PackedLinear

__all__ = ["Int8Weight", "pack_int8"]

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Int8Weight:
    """value = scale * code: codes int8 [N, K] with K a multiple of 64, scale float32 [N]."""

    codes: Tensor
    scale: Tensor

    @classmethod
    def from_bitsandbytes(cls, codes: Tensor, row_absmax: Tensor) -> "Int8Weight":
        """Take `CB` (or `weight.data`) and `SCB` of a `Linear8bitLt`."""
        return cls(codes, row_absmax.float() / 127)

    @classmethod
    def from_dense(cls, values: Tensor) -> "Int8Weight":
        """Quantise to 127 steps of each row's largest magnitude, some rows at a time: an output matrix is large."""
        parts = [_quantize_rows(rows.float()) for rows in values.split(ROWS_AT_ONCE)]
        codes, scale = (torch.cat(kind) for kind in zip(*parts, strict=True))
        return cls(codes, scale)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """Return the values, float32 [N, K]."""
        return self.codes.float() * self.scale.unsqueeze(1)


def _quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    absmax = values.abs().amax(dim=1).clamp(min=1e-12)
    return (values * (127 / absmax).unsqueeze(1)).round_().to(torch.int8), absmax / 127


def pack_int8(weights: list[Int8Weight], dtype: torch.dtype, *, gate_up: bool = False) -> PackedLinear:
    """Stack matrices over the same input along N and order them for the kernel; `gate_up` as in `pack_nf4`."""
    codes, scale = (stack_rows([getattr(w, name) for w in weights], gate_up) for name in ("codes", "scale"))
    n, k = codes.shape
    if k % 64:
        raise ValueError(f"{k} input features; the int8 kernel needs a multiple of 64.")
    # [tile, g, row, block, half, step in half, a0 | a2, q, pair]; a lane's 16 bytes are [row, step, a0 | a2, pair]
    tiles = codes.view(torch.uint8).view(n // 16, 8, 2, k // 64, 2, 2, 2, 4, 2)
    return PackedLinear(
        weights=tiles.permute(0, 3, 4, 1, 7, 2, 5, 6, 8).contiguous(),
        scales=scale.contiguous(),
        byte_tables=None,
        n=n,
        k=k,
        dtype=dtype,
        decode=Decode.INT8,
        gate_up=gate_up,
    )
