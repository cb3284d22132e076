"""Linears and embeddings over quantised weights, one module per weight format.

Each maps [..., K] to [..., N] and is built from a block weight. The formats with packed kernels compute a row the same
way whatever rows stand beside it; `DenseLinear` on a CPU does not promise that (see `RowwiseLinear`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.block_weights import BLOCK, Q4Affine, Q8Symmetric, Weight

__all__ = ["DenseLinear", "Int8Linear", "PackedInt4Linear", "QuantizedEmbedding", "RowwiseLinear"]


class PackedInt4Linear(nn.Module):
    """A Q4_1 matrix in torch's packed int4 CPU layout, codes unchanged.

    The kernel's value is (code - 8) * scale + zero with zero = minimum + 8 * scale, in groups of 32, so repacking
    changes no code; scales and zeros are rounded from float16 to the activations' bfloat16.
    """

    def __init__(self, weight: Q4Affine) -> None:
        super().__init__()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1)
        scale, minimum = weight.scale.float(), weight.minimum.float()
        scale_and_zero = torch.stack([scale, minimum + 8 * scale], dim=-1).transpose(0, 1)  # [K / 32, N, 2]
        self.register_buffer("packed", packed)
        self.register_buffer("scale_and_zero", scale_and_zero.to(torch.bfloat16).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, BLOCK, self.scale_and_zero)
        return out.view(*x.shape[:-1], -1)


class Int8Linear(nn.Module):
    """An int8 matrix with one scale a row, for torch's packed int8 CPU kernel.

    Block formats with no kernel of their own (Q8_0, dense) come here: the values are rounded once more, to 127 steps of
    each row's largest magnitude.
    """

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        values = weight.dequantize()
        scale = values.abs().amax(dim=1).clamp(min=1e-12) / 127
        self.register_buffer("codes", (values / scale.unsqueeze(1)).round().to(torch.int8))
        self.register_buffer("scale", scale.to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = torch.ops.aten._weight_int8pack_mm(rows, self.codes, self.scale)
        return out.view(*x.shape[:-1], -1)


class DenseLinear(nn.Module):
    """A plain matrix in the activations' type."""

    def __init__(self, weight: Weight, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.dequantize().to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class RowwiseLinear(DenseLinear):
    """A plain matrix applied to one row at a time while rows are few.

    CPU libraries pick another summation order for another number of rows; a verified tree must get the bits that plain
    decoding gets, so up to `MAX_ROWS` rows pay for it. Longer inputs are prefill, the same with and without Medusa.
    """

    MAX_ROWS = 65

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[0] > self.MAX_ROWS:
            return super().forward(x)
        return torch.cat([super(RowwiseLinear, self).forward(row) for row in x.split(1)])


class QuantizedEmbedding(nn.Module):
    """Embedding rows kept as Q8_0 blocks, dequantised exactly as they are looked up."""

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Q8Symmetric, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)

    def forward(self, tokens: Tensor) -> Tensor:
        blocks = self.codes[tokens].unflatten(-1, (-1, BLOCK)).float()
        return (blocks * self.scale[tokens].float().unsqueeze(-1)).flatten(-2).to(self.dtype)
