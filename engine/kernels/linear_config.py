"""How the CUDA linear is cut: warps, slices of K and shared memory of a launch, and what its source is compiled with.

Any configuration gives the same bits for a row, for any number of rows beside it (see cuda/linear_parts.cuh), so tuning
is free to pick one per number of rows.
"""

import math
from dataclasses import asdict, dataclass, replace

import torch

from engine.kernels.nvrtc import shared_memory_limit

__all__ = [
    "MAX_NORM_WIDTH", "MAX_PLACES", "MAX_RESIDENT", "MAX_TOKENS", "MAX_WORKSPACE", "SLICES", "Decode", "LinearConfig",
    "default_config", "rows_measured", "token_tiles_for",
]  # fmt: skip

MAX_TOKENS = 64
MAX_WORKSPACE = 2 << 20  # float32 partial sums
TABLE_BYTES, WIDE_TABLE_BYTES = 32 << 10, 64 << 10  # of the pairs that a byte of NF4 stands for
MAX_PLACES = 640  # of which the largest result is told, so that one thread block looks through them quickly
MAX_RESIDENT = 4096  # input features whose values a thread block may hold at once
MAX_NORM_WIDTH = 2048  # input features that the kernel can normalise on their way
SLICES = 8  # of K, in the kernel's fixed summation order


class Decode:
    """How the kernel turns codes into operands."""

    NF4_TABLE, NF4_PERMUTE, INT8, DENSE = 0, 1, 2, 3


@dataclass(frozen=True)
class LinearConfig:
    """How the work is cut: none of it changes a result's bits, `wgmma` where the tensor cores' two instructions agree.

    A warp takes `row_tiles` x 16 rows and one of the eight slices of K; `depth` blocks of 64 k are in flight. With
    `resident` (for few input features) all weights of a warp, which takes 8 / `slice_warps` slices, are in flight and
    `depth` is 0; a thread block goes through `row_loop` row blocks, and the values may be normalised on their way. With
    `wgmma` (compute capability 9.0 alone), four row warps multiply together, a warp takes a run of slices, `cluster`
    thread blocks share rows, `depth` buffers of `x_blocks` blocks of 64 k lie in shared memory, and a `wide_table` of
    NF4 pairs takes fewer instructions and twice the shared memory. `prefetch` asks for all weights of a thread block
    ahead. `ablate` leaves a stage out (cuda/linear_parts.cuh), for measurements only.
    """

    decode: int
    token_tiles: int
    row_tiles: int
    row_warps: int
    slice_warps: int
    depth: int
    min_blocks: int = 1
    prefetch: int = 0
    wgmma: int = 0
    cluster: int = 1
    x_blocks: int = 0
    wide_table: int = 0
    ablate: int = 0
    resident: int = 0
    row_loop: int = 1

    def __post_init__(self) -> None:
        if self.resident:
            assert self.depth == self.x_blocks == self.wgmma == 0, str(self)
        elif self.wgmma:
            assert self.row_warps % 4 == 0 and self.row_tiles == 1 and self.row_warps % self.cluster == 0, str(self)
            assert SLICES % (self.slice_warps * self.cluster) == 0 and self.slice_warps <= 4, str(self)
            assert self.depth > 2 and self.x_blocks in (2, 4, 8), str(self)
        else:
            assert self.cluster == 1 and self.x_blocks == 0 and not self.wide_table, str(self)

    @property
    def threads(self) -> int:
        return 32 * (self.row_warps * self.slice_warps + 4 * self.wgmma)  # four more warps copy tokens

    @property
    def block_rows(self) -> int:
        return 16 * self.row_tiles * self.row_warps

    @property
    def parts(self) -> int:
        """Thread blocks that share a row."""
        return self.cluster if self.wgmma else 1 if self.resident else SLICES // self.slice_warps

    @property
    def _has_wide_table(self) -> bool:
        return self.decode == Decode.NF4_TABLE and bool(self.wide_table)

    @property
    def _left_registers(self) -> int:
        """Registers of a thread that multiplies, when those that feed have given theirs away."""
        each = 65536 // self.min_blocks // self.threads // 8 * 8
        return (each * self.threads - 72 * 128) // (32 * self.row_warps * self.slice_warps) // 8 * 8

    @property
    def _holds_level(self) -> bool:
        """HELD of cuda/linear_wgmma.cuh: whether finished slices wait in registers."""
        sets = 2 if self.decode < Decode.INT8 and 12 * self.token_tiles + 72 <= self._left_registers else 1
        needed = (8 + 4 * sets) * self.token_tiles + 72
        return self.slice_warps * self.cluster < SLICES and needed <= self._left_registers

    def grid(self, n: int) -> tuple[int, int]:
        blocks = math.ceil(n / self.block_rows)
        return (self.cluster, blocks) if self.wgmma else (math.ceil(blocks / self.row_loop), self.parts)

    def shared_bytes(self, k: int) -> int:
        """Dynamic shared memory for `k` input features."""
        if self.resident:
            exchange = self.slice_warps * self.block_rows // 16 * self.token_tiles * 512 if self.slice_warps > 1 else 0
            return 8 * self.token_tiles * (2 * k + 16) + min(self.row_loop, 2) * exchange
        if self.wgmma:
            groups = self.slice_warps * self.cluster
            tile = {Decode.INT8: 1024, Decode.DENSE: 2048}.get(self.decode, 512 + 64)  # 16 rows x 64 k, with scales
            ring = self.slice_warps * self.depth * self.x_blocks * (self.row_warps * tile + self.token_tiles * 1024)
            levels = int(math.log2(SLICES // groups)) - self._holds_level
            waiting = levels * 32 * self.row_warps * self.slice_warps * self.token_tiles * 16
            exchange = groups * self.row_warps // self.cluster * self.token_tiles * 512 if groups > 1 else 0
            gates = 16 * self.depth * self.slice_warps
            table = WIDE_TABLE_BYTES if self._has_wide_table else 0
            exchange = 0 if 2 * exchange <= table else exchange  # between the table's rows
            return 1024 + ring + waiting + exchange + gates + table
        blocks = math.ceil(k / 64 / SLICES)
        exchange = self.threads // 2 * 16 * self.row_tiles * self.token_tiles if self.slice_warps > 1 else 0
        stage = 8 * self.token_tiles * (self.depth * self.slice_warps * 128 + 16)
        return max(min(math.ceil(blocks / self.depth), 2) * stage, exchange)

    def fits(self, k: int, limit: int) -> bool:
        """Say whether a multiprocessor's shared memory holds it, with the table, and its registers the weights."""
        table = TABLE_BYTES if self.decode == Decode.NF4_TABLE and not self._has_wide_table else 0
        registers = min(255, 65536 // (self.threads * self.min_blocks))
        if self.resident and self._registers(k) > registers:
            return False
        return self.threads <= 1024 and self.min_blocks * (self.shared_bytes(k) + table + 1040) <= limit

    def num_places(self, n: int) -> int:
        """Of how many places the kernel tells the largest result, with `best`."""
        return self.grid(n)[0] * self.block_rows // 16

    def can_gather(self, slots: int, tokens: int) -> bool:
        """Say whether the kernel can put together inputs of `slots` parts itself (32 turns of each warp)."""
        return bool(self.resident) and tokens * slots <= 32 * self.row_warps * self.slice_warps

    def can_normalize(self, k: int) -> bool:
        """Say whether the kernel can normalise its input itself."""
        return bool(self.resident) and k <= MAX_NORM_WIDTH

    def _registers(self, k: int) -> int:
        """Estimate a thread's registers: the weights of all its blocks, then the norm or sums and operands."""
        group = SLICES // self.slice_warps
        blocks = k // 64 // SLICES * group + min(k // 64 % SLICES, group)
        loads = (5, 5, 8, 16)[self.decode]
        weights = self.row_tiles * blocks * loads
        sums = 4 * self.row_tiles * self.token_tiles * (group + (self.decode < Decode.INT8))
        products = 16 * self.row_tiles + sums + 8 * min(4, self.token_tiles) + 28
        norm = math.ceil(k / 256) * 8 + 32 if self.can_normalize(k) else 0
        return weights + max(products, norm)

    def defines(self, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
        """Return what the source is compiled with."""
        left_out = {"wgmma", "resident"}
        if self.resident:
            left_out |= {"depth", "prefetch", "cluster", "x_blocks", "wide_table"}
        else:
            left_out |= {"row_loop", "prefetch"} if self.wgmma else {"row_loop", "cluster", "x_blocks", "wide_table"}
        named = {name: value for name, value in self.to_dict().items() if name not in left_out}
        if "row_loop" in named:
            named["row_loop"] = min(self.row_loop, 2)  # the source asks only whether there is a loop
        return (*((name.upper(), value) for name, value in named.items()), ("BF16", int(dtype == torch.bfloat16)))

    def kernel(
        self, k: int, dtype: torch.dtype, *, norm: bool = False, seen: int = 0, best: bool = False
    ) -> tuple[str, str, tuple[tuple[str, int], ...], int]:
        """Return what `load_kernel` is asked for; the options are for `resident` (cuda/linear_resident.cuh)."""
        if self.resident:
            options = (("BLOCKS", k // 64), ("NORM", int(norm)), ("SEEN", seen), ("BEST", int(best)))
            defines = (*self.defines(dtype), *options)
            return "linear_resident.cuh", "linear_resident", defines, self.shared_bytes(k)
        name = "linear_wgmma" if self.wgmma else "linear"
        return f"{name}.cuh", name, self.defines(dtype), self.shared_bytes(k)

    def workspace_floats(self, n: int) -> int:
        if self.wgmma:
            return 0
        blocks = math.ceil(n / self.block_rows)
        return blocks * self.block_rows * self.parts * self.token_tiles * 8 if self.parts > 1 else 0

    def is_frugal(self, n: int) -> bool:
        """Say whether its partial sums fit the room that linears share."""
        return self.workspace_floats(n) <= MAX_WORKSPACE

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def default_config(n: int, k: int, tokens: int, decode: int) -> LinearConfig:
    """Pick a configuration that suits a large GPU and fits this one; `tune_nf4` replaces it by a measured one."""
    tiles, limit = token_tiles_for(tokens), shared_memory_limit()
    resident = [LinearConfig(decode, tiles, *cut, resident=1) for cut in ((1, 1, 8, 0, 2), (1, 1, 8, 0, 1))]
    if k <= MAX_RESIDENT and n <= 8192:
        for config in resident:
            if config.fits(k, limit):
                return config
    if tiles == 1:
        cuts = [(1, 1, 8, 4, 2), (1, 1, 8, 2, 1)]
    elif n <= 2048:
        cuts = [(1, 1, 8, 2 if tiles == 2 else 1, 1)]
    else:
        cuts = [(2, 4, 2, 4 if tiles < 8 else 2, 1)]
    built = [LinearConfig(decode, tiles, *cut) for cut in (*cuts, (1, 4, 1, 2, 1))]
    permute = Decode.NF4_PERMUTE if decode == Decode.NF4_TABLE else decode  # needs no table in shared memory
    usable = (config for config in built if config.fits(k, limit) and config.is_frugal(n))
    return next(usable, replace(built[-1], decode=permute))


def token_tiles_for(tokens: int) -> int:
    """Return the tiles of 8 tokens that a launch is built for: 1, 2, 4 or 8."""
    assert 1 <= tokens <= MAX_TOKENS, f"{tokens} tokens; the kernel takes 1 to {MAX_TOKENS}"
    return 1 << max(0, math.ceil(math.log2(tokens / 8)))


def rows_measured(tokens: int) -> int:
    """Return the number of tokens whose measured launch serves so many: one, or the whole tiles of a launch."""
    return 1 if tokens == 1 else 8 * token_tiles_for(tokens)
