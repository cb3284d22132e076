"""A Runner on the C kernels: the whole step of a Llama-family decoder in one call.

Weights keep the codes and scales of their file; activations are rounded to int8 in blocks of 32, with exact integer
sums. One code path runs plain decoding, trees and prompts, so a row has the same bits in all of them.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, Array, c_float, c_int, c_int32, c_size_t, c_void_p

import torch
from torch import Tensor

from engine.backbone import BackboneConfig, BackboneWeights, rotary_tables
from engine.block_weights import BLOCK
from engine.errors import ContextLengthError, OutOfMemoryError
from engine.kernels.cpu_build import CpuKernelsUnavailableError
from engine.kernels.cpu_native import (
    MAX_ROWS,
    NativeLinear,
    NativeThreads,
    Signatures,
    declare,
    int32s,
    pointer,
    release_with,
)
from engine.native_weights import DecoderLayer, PackedPrefix, PackedWeights, PrefixLayer
from engine.prefix_attention import PrefixAttention
from engine.tree import MAX_TREE_NODES, CandidateTree

__all__ = ["NativeRunner"]

_PREFILL_ROWS = 64  # whole chunks of the kernels' 16 rows
_NO_MEMORY = 1
_PARTS = ("norms", "qkv", "attention", "output", "gate_up", "down", "prefix")  # as in cpu/api.h


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab")),
        ("max_positions", c_int32),
        ("eps", c_float),
    ]


_SIGNATURES: Signatures = {
    "decoder_create": (c_void_p, [c_void_p, POINTER(_Config), POINTER(DecoderLayer), *[c_void_p] * 4]),
    "decoder_free": (None, [c_void_p]),
    "decoder_bytes": (c_size_t, [c_void_p]),
    "decoder_length": (c_int, [c_void_p]),
    "decoder_attach": (c_int, [c_void_p, POINTER(PrefixLayer), c_void_p, c_int]),
    "decoder_prefixed": (c_int, [c_void_p]),
    "decoder_step": (c_int, [c_void_p, c_void_p, c_void_p, c_int, c_int, c_void_p]),
    "decoder_commit": (c_int, [c_void_p, c_void_p, c_int]),
    "decoder_heads_state": (c_int, [c_void_p, c_void_p]),
    "decoder_truncate": (c_int, [c_void_p, c_int]),
    "decoder_measure": (None, [c_void_p, c_void_p]),
    "decoder_rows": (None, [c_void_p, c_int, c_void_p, c_void_p]),
}


class NativeRunner:
    """See `engine.runner.Runner`.

    Raises CpuKernelsUnavailableError where the kernels cannot be built, or do not know the model's shape.
    """

    device = "cpu"
    max_tree_nodes = MAX_TREE_NODES

    def __init__(
        self,
        config: BackboneConfig,
        weights: BackboneWeights,
        *,
        source_format: str,
        threads: NativeThreads | None = None,
    ) -> None:
        _check_shape(config)
        self.config = config
        self.threads = threads or NativeThreads()
        self._library = self.threads.library
        declare(self._library, _SIGNATURES)
        self._weights = PackedWeights(weights)
        self._prefix: PackedPrefix | None = None
        self.lm_head = NativeLinear(self.threads, self._weights.lm_head)
        self.embedding = self._weights.embedding
        self.weights = f"{self._weights.label(source_format)} on {self.threads.path_name}, {_count(self.threads.count)}"
        self._tables = [table.contiguous() for table in _half_tables(config)]
        self._decoder = self._create()
        self._num_nodes = 0

    @property
    def num_committed(self) -> int:
        return self._library.decoder_length(self._decoder)

    @property
    def num_prefixed(self) -> int:
        return self._library.decoder_prefixed(self._decoder)

    def attach(self, prefix: PrefixAttention) -> None:
        """See `engine.runner.Runner.attach`. Its features are scaled with the model's eps: the C norms have them so."""
        if self._prefix or self.num_committed:
            found = "one is attached already" if self._prefix else f"{self.num_committed} tokens are committed"
            raise ValueError(f"A prefix attention is attached once, before any text; {found}. Make a new runner.")
        packed, reads = PackedPrefix(prefix, self.config), prefix.config.layers
        if self._library.decoder_attach(self._decoder, packed.layer, int32s(reads), len(reads)):
            raise OutOfMemoryError("There is no memory for the heads' prefix attention; close other programs.")
        self._prefix, self._num_nodes = packed, 0

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        """Run the prompt in chunks; each is a chain, committed whole."""
        if not tokens:
            raise ValueError("A prompt of no tokens has no last hidden state; pass one token or more.")
        self._check_room(len(tokens))
        hidden = torch.empty(0)
        for start in range(0, len(tokens), _PREFILL_ROWS):
            piece = tokens[start : start + _PREFILL_ROWS]
            hidden = self._step(piece, None, depth=len(piece) - 1, for_heads=True)
            self.commit(range(len(piece)))
        return hidden[-1].clone()

    def verify(self, tokens: Sequence[int], tree: CandidateTree, *, for_heads: bool = True) -> Tensor:
        """See `engine.runner.Runner.verify`. Behind rows that the prefix attention has not seen it never runs."""
        if len(tokens) != tree.num_nodes:
            raise ValueError(f"{len(tokens)} tokens for a tree of {tree.num_nodes} nodes; pass one for each node.")
        return self._step(tokens, int32s(tree.parents), tree.max_depth, for_heads)

    def heads_state(self) -> Tensor:
        state = torch.empty(self.config.hidden_size)
        if self._library.decoder_heads_state(self._decoder, state.data_ptr()):
            raise ValueError(
                f"What heads read behind {self.num_committed} tokens is not kept: nothing was committed since the "
                "start, or since later tokens were cut off. Prefill or commit a token first."
            )
        return state

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    def greedy(self, hidden: Tensor) -> list[int]:
        """Return each row's most likely token, the lowest id among equals, for hidden states [rows, hidden]."""
        return self.lm_head.argmax(hidden)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return token embeddings, int64 [...] -> float32 [..., hidden]."""
        return self.embedding.rows(tokens.reshape(-1)).view(*tokens.shape, -1)

    def commit(self, path: Sequence[int]) -> None:
        status = self._library.decoder_commit(self._decoder, int32s(path), len(path))
        if status == _NO_MEMORY:
            raise OutOfMemoryError("The cache cannot grow; close other programs or start a shorter chat.")
        if status:
            raise ValueError(f"{list(path)} is not a path from the root of the last step's {self._num_nodes} nodes.")
        self._num_nodes = 0

    def truncate(self, length: int) -> None:
        if self._library.decoder_truncate(self._decoder, length):
            raise ValueError(f"Cannot truncate {self.num_committed} committed rows to {length}.")
        self._num_nodes = 0

    def memory_bytes(self) -> int:
        tables = sum(table.numel() * table.element_size() for table in self._tables)
        prefix = self._prefix.num_bytes if self._prefix else 0
        return self._weights.num_bytes + prefix + tables + self._library.decoder_bytes(self._decoder)

    def committed_rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return one layer's committed keys and values, float32 [kv_heads, length, head_dim] each.

        An attached prefix attention is the layer after the last; its rows from `num_prefixed` on mean nothing.
        """
        last = self.config.num_layers - (self._prefix is None)
        if not 0 <= layer <= last:
            raise IndexError(f"Layer {layer} is not in 0..{last}.")
        shape = (self.config.num_kv_heads, self.num_committed, self.config.head_dim)
        keys, values = torch.empty(shape), torch.empty(shape)
        self._library.decoder_rows(self._decoder, layer, keys.data_ptr(), values.data_ptr())
        return keys, values

    @contextmanager
    def measure(self) -> Iterator[dict[str, float]]:
        """Fill the yielded dict, when the block ends, with the seconds that its steps spent in each part.

        Parts are norms, qkv, attention, output, gate_up and down, and prefix where a prefix attention is attached.
        """
        times = torch.zeros(len(_PARTS), dtype=torch.float64)
        seconds: dict[str, float] = {}
        self._library.decoder_measure(self._decoder, times.data_ptr())
        try:
            yield seconds
        finally:
            self._library.decoder_measure(self._decoder, None)
            seconds.update(zip(_PARTS, times.tolist(), strict=True))
            if not self._prefix:
                del seconds["prefix"]

    def _step(self, tokens: Sequence[int], parents: Array[c_int32] | None, depth: int, for_heads: bool) -> Tensor:
        config, rows = self.config, len(tokens)
        if not 1 <= rows <= MAX_ROWS:
            raise ValueError(f"A step of {rows} rows; 1 to {MAX_ROWS} are possible.")
        self._check_room(depth + 1)
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= config.vocab_size:
            raise ValueError(f"Token {low if low < 0 else high} is not in 0..{config.vocab_size - 1}.")
        hidden = torch.empty(rows, config.hidden_size)
        with self.threads.lock:
            status = self._library.decoder_step(
                self._decoder, int32s(tokens), parents, rows, for_heads, hidden.data_ptr()
            )
        if status == _NO_MEMORY:
            raise OutOfMemoryError("The cache cannot grow; close other programs or start a shorter chat.")
        assert status == 0, "every way to a bad call is checked above"
        self._num_nodes = rows
        return hidden

    def _check_room(self, count: int) -> None:
        here, limit = self.num_committed, self.config.max_positions
        if here + count > limit:
            raise ContextLengthError(f"{here} tokens and {count} more do not fit the model's {limit} positions.")

    def _create(self) -> int:
        config = self.config
        shape = _Config(
            config.hidden_size,
            config.num_layers,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.intermediate_size,
            config.vocab_size,
            config.max_positions,
            config.rms_norm_eps,
        )
        weights, half = self._weights, (config.max_positions, config.head_dim // 2)
        handle = self._library.decoder_create(
            self.threads.handle,
            shape,
            (DecoderLayer * len(weights.layers))(*weights.layers),
            pointer(weights.norm, torch.float32, (config.hidden_size,)),
            weights.embedding.handle,
            *(pointer(table, torch.float32, half) for table in self._tables),
        )
        if not handle:
            raise OutOfMemoryError("There is no memory for the decoder's buffers; close other programs.")
        release_with(self, self._library.decoder_free, handle)
        return handle


def _check_shape(config: BackboneConfig) -> None:
    """Raise CpuKernelsUnavailableError for what the kernels do not cover."""
    sizes = {
        "hidden size": config.hidden_size,
        "head size": config.head_dim,
        "intermediate size": config.intermediate_size,
    }
    for name, size in sizes.items():
        if size % BLOCK:
            raise CpuKernelsUnavailableError(
                f"The C kernels need a {name} in blocks of {BLOCK}; this model's is {size}."
            )
    if config.head_dim > 256:
        raise CpuKernelsUnavailableError(f"The C kernels take heads of up to 256; this model's are {config.head_dim}.")


def _half_tables(config: BackboneConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each pair, [positions, head_dim / 2]; the tables' first half holds negated sines."""
    cos, sin = rotary_tables(config, torch.float32)
    half = config.head_dim // 2
    return cos[:, :half], sin[:, half:]


def _count(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"
