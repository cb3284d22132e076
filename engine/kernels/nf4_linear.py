"""bitsandbytes' NF4 matrices for the CUDA linear: the same codes and absmax, renumbered and reordered for its loads.

The kernel's products take code values rounded to the activations' 16-bit type and its sums take absmax in float32. A
common factor on the 16 values, taken back in absmax, is chosen so that they round least: 0.9e-3 in bfloat16, where
bitsandbytes' rounding of code * absmax costs 1.7e-3.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

from engine.kernels.linear_config import Decode
from engine.kernels.small_batch_linear import PackedLinear

__all__ = ["NF4_BLOCK", "NF4_VALUES", "Nf4Weight", "pack_nf4"]

NF4_BLOCK = 64
# QLoRA (arXiv 2305.14314), appendix E: quantiles of the normal distribution, with an exact zero.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
VALUE_FACTOR = {torch.bfloat16: 1.524658203125, torch.float16: 1.5751953125}


@dataclass(frozen=True)
class Nf4Weight:
    """A matrix [N, K] as bitsandbytes keeps it, with absmax expanded.

    codes uint8 [N, K / 2], the high nibble for even k; absmax float32 [N, K / 64]. K is a multiple of 64.
    """

    codes: Tensor
    absmax: Tensor

    @classmethod
    def from_bitsandbytes(cls, data: Tensor, state: object) -> "Nf4Weight":
        """Take `weight.data` and `weight.quant_state` of a `Linear4bit`; nested absmax is expanded."""
        n, k = state.shape
        if state.quant_type != "nf4" or state.blocksize != NF4_BLOCK or k % NF4_BLOCK:
            raise ValueError(
                f"A {state.quant_type} matrix of {n} x {k} in blocks of {state.blocksize} has no kernel here; "
                "quantise as nf4 in blocks of 64, with a multiple of 64 input features."
            )
        absmax = state.absmax
        if state.nested:
            inner = state.state2
            blocks = torch.arange(absmax.numel(), device=absmax.device) // inner.blocksize
            absmax = inner.code[absmax.long()] * inner.absmax[blocks] + state.offset
        return cls(data.reshape(n, k // 2), absmax.float().reshape(n, k // NF4_BLOCK))

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """Return the values, float32 [N, K]."""
        values = torch.tensor(NF4_VALUES, device=self.codes.device)
        pairs = torch.stack([values[(self.codes >> 4).long()], values[(self.codes & 15).long()]], dim=-1).flatten(1)
        return (pairs.unflatten(1, (-1, NF4_BLOCK)) * self.absmax.unsqueeze(-1)).flatten(1)


def pack_nf4(weights: list[Nf4Weight], dtype: torch.dtype, *, gate_up: bool = False) -> PackedLinear:
    """Stack matrices over the same input along N and order them for the kernel, on their device.

    With `gate_up` there are two, whose rows alternate and whose results become silu(gate) * up.
    """
    codes, absmax = (stack_rows([getattr(w, name) for w in weights], gate_up) for name in ("codes", "absmax"))
    n, k, device = codes.shape[0], 2 * codes.shape[1], codes.device
    order, _, byte_tables = code_tables(dtype)
    number_of = torch.empty(16, dtype=torch.uint8)
    number_of[torch.tensor(order)] = torch.arange(16, dtype=torch.uint8)
    every = torch.arange(256)
    renumbered = (number_of[every >> 4] << 4 | number_of[every & 15]).to(device)
    # [tile, g, row, block, half, step in half, a0 | a2, q]; a lane's 16 bytes are [row, half, step, a0 | a2]
    tiles = renumbered[codes.int()].view(n // 16, 8, 2, k // 64, 2, 2, 2, 4)
    return PackedLinear(
        weights=tiles.permute(0, 3, 1, 7, 2, 4, 5, 6).contiguous(),
        scales=(absmax / VALUE_FACTOR[dtype]).view(n // 16, 8, 2, k // 64).permute(0, 3, 1, 2).contiguous(),
        byte_tables=torch.tensor(byte_tables, dtype=torch.int64).to(torch.int32).to(device),
        n=n,
        k=k,
        dtype=dtype,
        decode=Decode.NF4_TABLE,
        gate_up=gate_up,
    )


def stack_rows(parts: list[Tensor], gate_up: bool) -> Tensor:
    """Concatenate along rows, or alternate the rows of two; N must be a multiple of 16 (callers pad once, at load)."""
    rows = torch.stack(parts, dim=1).flatten(0, 1) if gate_up else torch.cat(parts)
    if rows.shape[0] % 16:
        raise ValueError(f"{rows.shape[0]} output features; pad to a multiple of 16.")
    return rows


@cache
def code_tables(dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the new numbering (old code of each number), the 256 pairs and the eight words of byte tables.

    Numbers i and i + 8 have values of the same sign and the same top bit of the low byte, as the byte permutes need;
    the sign of zero is free.
    """
    values = torch.tensor(NF4_VALUES, dtype=torch.float64) * VALUE_FACTOR[dtype]
    bits = [int(v) & 0xFFFF for v in values.to(dtype).view(torch.int16)]
    for zero_bits in (0, 0x8000):
        bits[7] = zero_bits
        classes = [[c for c in range(16) if bits[c] & 0x8080 == kind] for kind in (0, 0x80, 0x8000, 0x8080)]
        if all(len(members) % 2 == 0 for members in classes):
            break
    else:
        raise AssertionError(f"the factor for {dtype} leaves codes that cannot be paired")
    pairs_of_codes = [pair for members in classes for pair in zip(members[::2], members[1::2], strict=True)]
    order = tuple(first for first, _ in pairs_of_codes) + tuple(second for _, second in pairs_of_codes)
    numbered = [bits[code] for code in order]
    pairs = tuple(numbered[high] | numbered[low] << 16 for high, low in product(range(16), repeat=2))
    return order, pairs, (*_byte_table([b & 255 for b in numbered]), *_byte_table([b >> 8 for b in numbered]))


def _byte_table(values: list[int]) -> tuple[int, ...]:
    """Pack 16 bytes in four words. Where a pair's top bits are set, the upper half's byte is stored inverted.

    The permute for the other half then gives 0xff for it, and 0x00 elsewhere, which the kernel's exclusive or undoes.
    """
    stored = [v ^ 255 if i >= 8 and v & 128 else v for i, v in enumerate(values)]
    return tuple(int.from_bytes(bytes(stored[i : i + 4]), "little") for i in range(0, 16, 4))
