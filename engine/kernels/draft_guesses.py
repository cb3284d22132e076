"""The guesses of a draft head without its scores: an output launch that keeps lists of the best, and who merges them.

Both work on int8 matrices over few hidden features, in the integer arithmetic of cuda/integer_rows.cuh. How rounds are
put together is known in `engine.cuda_rounds`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.fused_ops import bf16_define
from engine.kernels.linear_config import Decode
from engine.kernels.nvrtc import Defines, load_kernel
from engine.kernels.small_batch_linear import LoadKernel, PackedLinear

__all__ = [
    "ROOM_BYTES", "GuessLists", "Guessed", "ListRoom", "Unsettled", "can_list", "embed_guessed", "has_integer_products",
    "list_guesses", "row_defines", "row_stride", "rows_at_once", "settle_guesses", "token_tiles",
]  # fmt: skip

MAX_LISTED = 16  # guesses of a row
MAX_LIST_ROWS = 32
MAX_HIDDEN = 768  # whose weights, of 16 tokens, are the registers of a warp
PAIRED_ROWS = 4  # at most, whose planes share the tensor cores' tiles
BLOCK_TOKENS = 128  # of the draft vocabulary, to a thread block
MAX_LIST_PLACES = 256
ROOM_BYTES = 48 << 10  # of shared memory, for lists that one thread block merges


@dataclass(frozen=True)
class GuessLists:
    """The best of each place: keys int64 [rows, guesses, places], and float32 [rows, places], sums of exponentials."""

    keys: Tensor
    sums: Tensor

    @classmethod
    def empty(cls, vocab: int, rows: int, guesses: int, device: torch.device | str) -> "GuessLists":
        places = num_places(vocab)
        return cls(
            torch.zeros(rows, guesses, places, dtype=torch.int64, device=device),
            torch.zeros(rows, places, device=device),
        )

    @property
    def rows(self) -> int:
        return self.keys.shape[0]

    @property
    def guesses(self) -> int:
        return self.keys.shape[1]

    @property
    def places(self) -> int:
        return self.keys.shape[2]

    @property
    def row_bytes(self) -> int:
        return self.guesses * self.places * 8


class ListRoom:
    """Memory for one head's lists at a time, made before any launch is captured."""

    def __init__(self, device: torch.device | str) -> None:
        self._keys = torch.zeros(0, dtype=torch.int64, device=device)
        self._sums = torch.zeros(0, device=device)
        self._outgrown: list[Tensor] = []  # captured graphs still use them

    def reserve(self, vocab: int, rows: int, guesses: int) -> None:
        """Make room for so many lists; lists that are in use stay where they are."""
        needed = rows * guesses * num_places(vocab), rows * num_places(vocab)
        for name, size in zip(("_keys", "_sums"), needed, strict=True):
            room = getattr(self, name)
            if room.numel() < size:
                self._outgrown.append(room)
                setattr(self, name, torch.zeros(2 * size, dtype=room.dtype, device=room.device))

    def lists(self, vocab: int, rows: int, guesses: int) -> GuessLists:
        places = num_places(vocab)
        keys, sums = self._keys[: rows * guesses * places], self._sums[: rows * places]
        return GuessLists(keys.view(rows, guesses, places), sums.view(rows, places))

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in (self._keys, self._sums, *self._outgrown))


@dataclass(frozen=True)
class Guessed:
    """The tree's nodes that lists are for: `row_of`, `rank_of`, tokens int32 and chances float32, [all nodes]."""

    row_of: Tensor
    rank_of: Tensor
    tokens: Tensor
    chances: Tensor
    nodes: range


@dataclass(frozen=True)
class Unsettled:
    """Guesses that are still in lists, and the sums that nobody needs once they are made (int32, cleared with them)."""

    lists: GuessLists
    guessed: Guessed
    sums: Tensor | None = None

    def arguments(self) -> list[Tensor | None]:
        """Return the memory that every launch which settles them takes."""
        lists, guessed = self.lists, self.guessed
        return [lists.keys, lists.sums, guessed.row_of, guessed.rank_of, guessed.tokens, guessed.chances]

    @property
    def num_cleared(self) -> int:
        """Pieces of 16 bytes."""
        return 0 if self.sums is None else self.sums.nbytes // 16


def num_places(vocab: int) -> int:
    """Return in how many places the best are looked for: an even number."""
    return 2 * math.ceil(vocab / BLOCK_TOKENS / 2)


def has_integer_products(device: torch.device | str) -> bool:
    """Say whether the device multiplies int8 as the launches here ask it to; a CPU that plays a GPU does."""
    return torch.device(device).type != "cuda" or torch.cuda.get_device_capability() >= (8, 0)


def can_list(output: PackedLinear, rows: int, guesses: int) -> bool:
    """Say whether the launches here cover an output matrix, so many rows and guesses of each."""
    fits = output.k <= MAX_HIDDEN and num_places(output.n) <= MAX_LIST_PLACES and output.decode == Decode.INT8
    return fits and rows <= MAX_LIST_ROWS and guesses <= MAX_LISTED


def row_defines(hidden: int, rows: int, copies: int, dtype: torch.dtype) -> Defines:
    """Say to the compiler what cuda/integer_rows.cuh asks for."""
    tiles = (("TOKEN_TILES", token_tiles(rows)), ("PAIRED", int(rows <= PAIRED_ROWS)))
    return (("HIDDEN", hidden), *tiles, ("COPIES", copies), *bf16_define(dtype))


def token_tiles(rows: int) -> int:
    """Return the tiles of 8 rows that a launch is built for: 1, 2 or 4."""
    return 1 << math.ceil(math.log2(math.ceil(rows / 8)))


def rows_at_once(lists: GuessLists) -> int:
    """Return of how many rows a thread block settles the guesses at a time."""
    return max(1, min(8, ROOM_BYTES // lists.row_bytes))


def row_stride(x: Tensor) -> int:
    """Return the values from a row to the next, 0 where all rows are one."""
    return x.shape[1] if len(x) > 1 else 0


def list_guesses(
    x: Tensor,
    output: PackedLinear,
    lists: GuessLists,
    *,
    token_map: Tensor | None = None,
    added: Tensor | None = None,
    table: Tensor | None = None,
    load: LoadKernel = load_kernel,
) -> None:
    """Fill `lists` with the best of x W^T by rows: x [rows or 1, hidden], plus `added` int32 [copies, 8 tiles, hidden].

    `token_map` int32 [vocab] turns the matrix's rows into token ids; among equals the smallest id comes first. With the
    embeddings `table` [tokens, hidden], rows of likely guesses are brought on their way to the GPU's cache.
    """
    rows, hidden = lists.rows, x.shape[1]
    assert can_list(output, rows, lists.guesses) and lists.guesses <= output.n, f"{lists.guesses} guesses of {output.n}"
    assert x.is_contiguous() and output.k == hidden and len(x) in (1, rows), f"x {tuple(x.shape)} for {rows} rows"
    assert lists.places == num_places(output.n), f"{lists.places} places for {output.n} tokens"
    copies = 1 if added is None else added.shape[0]
    assert added is None or added.shape[1:] == (8 * token_tiles(rows), hidden), f"sums for {rows} rows"
    shared_bytes = 8 * token_tiles(rows) * (2 * hidden + 16 + 4 * (BLOCK_TOKENS + 4) + 4)
    kernel = load("draft_output.cuh", "draft_output", row_defines(hidden, rows, copies, x.dtype), shared_bytes)
    row_bytes = 0 if table is None else table.shape[1] * table.element_size()
    arguments = [x, row_stride(x), added, output.weights, output.scales, token_map, lists.keys, lists.sums]
    arguments += [table, row_bytes, rows, output.n, lists.guesses]
    kernel((lists.places,), 256, arguments, shared_bytes)


def settle_guesses(unsettled: Unsettled, *, table: Tensor | None = None, load: LoadKernel = load_kernel) -> None:
    """Give each of the nodes its row's guess of its rank, and the probability of that guess; clear the sums.

    With the embeddings `table` [tokens, hidden], the guesses' rows are brought on their way to the GPU's cache.
    """
    lists, nodes = unsettled.lists, unsettled.guessed.nodes
    block_rows = rows_at_once(lists)
    shared_bytes = block_rows * lists.row_bytes
    kernel = load("draft_settle.cuh", "draft_settle", _places(lists), ROOM_BYTES)
    row_bytes = 0 if table is None else table.shape[1] * table.element_size()
    arguments = [*unsettled.arguments(), table, row_bytes, unsettled.sums, unsettled.num_cleared, lists.rows]
    arguments += [block_rows, lists.guesses, nodes.start, nodes.stop]
    kernel((math.ceil(lists.rows / block_rows),), 256, arguments, shared_bytes)


def embed_guessed(
    unsettled: Unsettled, table: Tensor, record: Tensor, out: Tensor, *, load: LoadKernel = load_kernel
) -> None:
    """Look up a tree's embeddings, [nodes, hidden] in table [vocab, hidden], and settle its last guesses on the way.

    It is `fused_ops.embed_tokens` after `settle_guesses`: the first token is the record's bonus token.
    """
    rows, width = out.shape
    lists, nodes = unsettled.lists, unsettled.guessed.nodes
    assert width % 8 == 0 and table.is_contiguous() and 0 < nodes.start < nodes.stop <= rows, f"{nodes} of {rows}"
    kernel = load("draft_embed.cuh", "embed_guessed", _places(lists), ROOM_BYTES)
    arguments = [*unsettled.arguments(), unsettled.sums, unsettled.num_cleared, lists.guesses, nodes.start, nodes.stop]
    kernel((rows,), 128, [*arguments, table, record, out, width // 8], lists.row_bytes)


def _places(lists: GuessLists) -> Defines:
    return (("PLACES", lists.places), *bf16_define(torch.float16))
