"""Linears on a GPU through bitsandbytes: 4-bit NormalFloat and int8 weight-only.

bitsandbytes picks another kernel for another number of rows, so these rows are not independent of their neighbours.
The import is here alone, because the package is needed on a GPU only.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.block_weights import Weight

__all__ = ["BnbInt8Linear", "NF4Linear"]


class NF4Linear(nn.Module):
    """bitsandbytes NF4 in blocks of 64 with nested absmax; computes in the activations' type."""

    codes: Tensor

    def __init__(self, weight: Weight, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        import bitsandbytes as bnb

        values = weight.dequantize().to(device=device, dtype=dtype)
        self.shape = weight.shape
        codes, self.state = bnb.functional.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
        self.register_buffer("codes", codes)

    def forward(self, x: Tensor) -> Tensor:
        import bitsandbytes as bnb

        return bnb.matmul_4bit(x, self.codes.t(), quant_state=self.state)


class BnbInt8Linear(nn.Module):
    """int8 weights with one scale a row, dequantised for the product: weight-only, no outlier path."""

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Weight, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        import bitsandbytes as bnb

        values = weight.dequantize().to(device=device, dtype=torch.float16)
        codes, absmax, _ = bnb.functional.int8_vectorwise_quant(values)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", (absmax / 127).to(dtype).unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes.to(x.dtype) * self.scale)
