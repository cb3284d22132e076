"""A draft head's wide block as one launch, which adds to sums in fixed point (cuda/draft_block.cuh).

The launch may settle the guesses of the head before on its way. How rounds are put together is known in
`engine.cuda_rounds`.
"""

from torch import Tensor

from engine.kernels.draft_guesses import (
    ROOM_BYTES,
    GuessLists,
    Unsettled,
    row_defines,
    row_stride,
    rows_at_once,
    token_tiles,
)
from engine.kernels.linear_config import Decode
from engine.kernels.linear_inputs import Seen
from engine.kernels.nvrtc import load_kernel, shared_memory_limit
from engine.kernels.small_batch_linear import LoadKernel, PackedLinear

__all__ = ["MAX_BLOCK_ROWS", "add_block", "can_add_block", "can_merge"]

MAX_BLOCK_ROWS = 16
MAX_HIDDEN = 768
MAX_BLOCKS = 64  # of 64 input features, whose weights a thread block has in registers
MAX_MERGED_ROWS = 16
MAX_KNOWN = 4 * 32  # rows that four warps bring beside those merging, a lane's turn each
STATIC_BYTES = 4096  # of shared memory, at most, that the kernel declares itself, and the driver
THREADS, WARPS = 256, 8


def can_add_block(up: PackedLinear, down: PackedLinear, rows: int) -> bool:
    """Say whether the launch covers the matrices of a block, and so many rows."""
    is_int8 = up.decode == down.decode == Decode.INT8
    fits = is_int8 and down.n <= MAX_HIDDEN and up.k // 64 <= MAX_BLOCKS and up.n % 64 == 0 and rows <= MAX_BLOCK_ROWS
    return fits and _fits(_shared_bytes(up, down, rows, None))


def can_merge(lists: GuessLists, up: PackedLinear, down: PackedLinear, rows: int) -> bool:
    """Say whether every thread block of a block's launch can merge these lists for itself."""
    is_small = lists.rows * lists.row_bytes <= ROOM_BYTES and lists.rows <= MAX_MERGED_ROWS
    num_known = 2 + rows * (up.k // down.n - 3)
    return is_small and num_known <= MAX_KNOWN and _fits(_shared_bytes(up, down, rows, lists))


def _fits(shared_bytes: int) -> bool:
    return shared_bytes + STATIC_BYTES <= shared_memory_limit()


def add_block(
    base: Tensor,
    up: PackedLinear,
    down: PackedLinear,
    sums: Tensor,
    *,
    rows: int,
    added: Tensor | None = None,
    x_out: Tensor | None = None,
    seen: Seen | None = None,
    unsettled: Unsettled | None = None,
    merges: bool = False,
    load: LoadKernel = load_kernel,
) -> None:
    """Add D silu(U x) to `sums`, int32 [copies, 8 tiles, hidden] that are zero, for so many rows x [rows, hidden].

    x is `base` [1 or rows, hidden] with what was `added` to it (sums of the block before), and goes to `x_out` [rows,
    hidden] where that is asked for. With `seen`, x is put together from the hidden state `base` and tokens' embeddings.
    Guesses that are `unsettled` get settled; with `merges` the last token that each row sees is one of them.
    """
    hidden, width, num_seen = down.n, up.n, up.k // down.n - 1
    copies, tiles = sums.shape[0], token_tiles(rows)
    assert can_add_block(up, down, rows) and (seen is not None) == (num_seen > 0), f"{num_seen} tokens, {rows} rows"
    assert sums.shape == (copies, 8 * tiles, hidden) and (added is None or added.shape == sums.shape)
    assert base.shape[1] == hidden and len(base) in (1, rows) and (not seen or len(base) == 1)
    assert not (unsettled and seen) or unsettled.guessed.tokens is seen.tokens, "one tree's tokens"
    assert not merges or (unsettled is not None and can_merge(unsettled.lists, up, down, rows)), "lists"
    places = unsettled.lists.places if unsettled else 0  # whose clerk takes rows as `rows_at_once` says
    defines = (("SEEN", num_seen), ("WIDTH", width), ("PLACES", places), ("MERGED", int(merges)))
    defines = (*defines, ("ROOM_BYTES", ROOM_BYTES if unsettled else 0), *row_defines(hidden, rows, copies, base.dtype))
    shared_bytes = _shared_bytes(up, down, rows, unsettled.lists if unsettled and merges else None)
    if unsettled:
        shared_bytes = max(shared_bytes, rows_at_once(unsettled.lists) * unsettled.lists.row_bytes)
    most = _shared_bytes(up, down, rows, None) + (ROOM_BYTES if unsettled else 0)  # one kernel for lists of any size
    kernel = load("draft_block.cuh", "draft_block", defines, most if _fits(most) else shared_bytes)
    arguments = [base, row_stride(base), added, x_out, up.weights, up.scales, down.weights, down.scales, sums, rows]
    arguments += [seen.table, seen.record, seen.ancestor_at, seen.row_nodes] if seen else [None] * 4
    arguments += _settling(unsettled) if unsettled else [None] * 4 + [seen and seen.tokens, None, None] + [0] * 5
    kernel((width // 16 + (unsettled is not None),), THREADS, arguments, shared_bytes)


def _settling(unsettled: Unsettled) -> list[Tensor | int | None]:
    lists, nodes = unsettled.lists, unsettled.guessed.nodes
    numbers = [unsettled.num_cleared, lists.rows, lists.guesses, nodes.start, nodes.stop]
    return [*unsettled.arguments(), unsettled.sums, *numbers]


def _shared_bytes(up: PackedLinear, down: PackedLinear, rows: int, merged: GuessLists | None) -> int:
    """Return the dynamic shared memory: rows and their scales, then lists to merge or what warps exchange."""
    hidden, tiles = down.n, token_tiles(rows)
    num_seen = up.k // hidden - 1
    kept = 8 * tiles * (num_seen - 1) + 2 if num_seen else 8 * tiles
    lists = merged.rows * merged.row_bytes if merged else 0
    return kept * (2 * hidden + 16) + -(-kept // 4) * 16 + max(tiles * (WARPS * 512 + 256), lists)
