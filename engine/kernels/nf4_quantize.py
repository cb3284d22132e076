"""Round a matrix to NF4 as bitsandbytes does (blocks of 64, absmax per block), but keep absmax in float32.

Own code, because bitsandbytes' nested absmax costs accuracy that the linear's expanded scales can keep.
"""

import torch
from torch import Tensor

from engine.kernels.nf4_linear import NF4_BLOCK, NF4_VALUES, Nf4Weight

__all__ = ["quantize_nf4"]


def quantize_nf4(values: Tensor) -> Nf4Weight:
    """Give each value of [N, K] the nearest of its block's 16 levels; K must be a multiple of 64. Raises ValueError."""
    rows, columns = values.shape
    if columns % NF4_BLOCK:
        raise ValueError(f"{columns} input features; NF4 blocks need a multiple of {NF4_BLOCK}.")
    levels = torch.tensor(NF4_VALUES, device=values.device)
    blocks = values.float().view(rows, -1, NF4_BLOCK)
    absmax = blocks.abs().amax(dim=-1)
    scaled = blocks / absmax.clamp(min=1e-12).unsqueeze(-1)
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8).view(rows, -1, 2)
    return Nf4Weight(codes[..., 0] << 4 | codes[..., 1], absmax)
