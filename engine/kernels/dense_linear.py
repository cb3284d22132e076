"""16-bit matrices for the CUDA linear, for `lm_head`: cuBLAS sums a row differently for another number of rows."""

from torch import Tensor

from engine.kernels.linear_config import Decode
from engine.kernels.small_batch_linear import PackedLinear

__all__ = ["pack_dense"]


def pack_dense(values: Tensor) -> PackedLinear:
    """Order a bfloat16 or float16 matrix [N, K] for the kernel; N a multiple of 16, K of 64. Raises ValueError."""
    n, k = values.shape
    if n % 16 or k % 64:
        raise ValueError(f"A {n} x {k} matrix has no kernel here; outputs must be a multiple of 16, inputs of 64.")
    # [tile, g, row, block, step, a0 | a2, q, pair] -> lane (g, q) holds a0, a1, a2, a3 of each step
    tiles = values.view(n // 16, 8, 2, k // 64, 4, 2, 4, 2)
    return PackedLinear(
        weights=tiles.permute(0, 3, 4, 1, 6, 5, 2, 7).contiguous(),
        scales=None,
        byte_tables=None,
        n=n,
        k=k,
        dtype=values.dtype,
        decode=Decode.DENSE,
    )
