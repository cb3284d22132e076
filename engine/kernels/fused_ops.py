"""The small steps of a decode step as single launches over static buffers: norm, rotary, acceptance, commit.

All of them can be captured: what changes between steps (committed length, accepted path) is read from the step record
in device memory, which is also the one thing the host copies after a step.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.nvrtc import Defines, load_kernel
from engine.kernels.small_batch_linear import LoadKernel

__all__ = [
    "ARGMAX_CHUNK", "MAX_MIDDLE", "MAX_PATH", "RECORD_SIZE", "StepRecord", "accept_greedy", "argmax_keys",
    "best_tokens", "bf16_define", "commit_path", "embed_tokens", "gather_features", "new_record", "rms_norm",
    "rotary_angles", "rotate_into_cache",
]  # fmt: skip

SOURCE = "fused_ops.cuh"
MAX_PATH = 16
LENGTH, OLD_LENGTH, NUM_ACCEPTED, BONUS, PATH = 0, 1, 2, 3, 4
PATH_TOKENS = PATH + MAX_PATH
RECORD_SIZE = PATH_TOKENS + MAX_PATH
ARGMAX_CHUNK = 8192
MAX_MIDDLE = 3  # middle layers that `gather_features` takes


class StepRecord:
    """The host's view of a copied step record: the int32 numbers of `new_record` as a list."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    @property
    def length(self) -> int:
        return self.numbers[LENGTH]

    @property
    def num_accepted(self) -> int:
        return self.numbers[NUM_ACCEPTED]

    @property
    def bonus(self) -> int:
        return self.numbers[BONUS]

    @property
    def path(self) -> list[int]:
        """Accepted nodes, the root first."""
        return self.numbers[PATH : PATH + self.num_accepted + 1]

    @property
    def tokens(self) -> list[int]:
        """Tokens of the accepted nodes, the root first."""
        return self.numbers[PATH_TOKENS : PATH_TOKENS + self.num_accepted + 1]


def new_record(device: torch.device | str, length: int = 0) -> Tensor:
    """Make a step record, int32 [36], with `length` committed rows."""
    record = torch.zeros(RECORD_SIZE, dtype=torch.int32, device=device)
    record[LENGTH] = length
    return record


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None, load: LoadKernel = load_kernel
) -> Tensor:
    """x / rms(x) * weight by rows, [rows, width]; width a multiple of 8, at most 16384."""
    rows, width = x.shape
    assert x.is_contiguous() and width % 8 == 0 and width <= 16384, f"rows of {width}"
    out = torch.empty_like(x) if out is None else out
    load(SOURCE, "rms_norm", bf16_define(x.dtype))((rows,), 256, [x, weight, out, width, eps])
    return out


def gather_features(
    hidden: Tensor, middle: Sequence[Tensor], eps: float, *, out: Tensor, load: LoadKernel = load_kernel
) -> None:
    """Put what prefix attention reads side by side: hidden states, and up to 3 middle layers' scaled to unit RMS.

    hidden and each of `middle` [rows, width] -> out [rows, (1 + middle) * width]; width a multiple of 8, at most 16384.
    """
    rows, width = hidden.shape
    assert len(middle) <= MAX_MIDDLE and out.shape == (rows, (1 + len(middle)) * width), f"{len(middle)} middle layers"
    assert all(t.shape == hidden.shape and t.is_contiguous() for t in (hidden, *middle)) and out.is_contiguous()
    assert width % 8 == 0 and width <= 16384, f"rows of {width}"
    absent = [None] * (MAX_MIDDLE - len(middle))
    kernel = load(SOURCE, "gather_features", bf16_define(hidden.dtype))
    kernel((rows, 1 + len(middle)), 256, [hidden, *middle, *absent, out, width, eps])


def rotary_angles(theta: float, head_dim: int, positions: int) -> Tensor:
    """Return (cos, sin), float32 [positions, head_dim / 2, 2]."""
    inverse = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), inverse)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def rotate_into_cache(
    qkv: Tensor,
    angles: Tensor,
    length: Tensor,
    depth: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    load: LoadKernel = load_kernel,
) -> None:
    """Put the rotated keys and the values of a prompt's rows at their positions (length + depth) in the cache.

    qkv [rows, (heads + 2 kv_heads) * head_dim]; keys, values [kv_heads, capacity, head_dim].
    """
    kv_heads, capacity, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    kernel = load(SOURCE, "rotate_into_cache", bf16_define(qkv.dtype))
    arguments = [qkv, angles, length, depth, keys, values, heads, head_dim, capacity]
    kernel((qkv.shape[0], kv_heads), head_dim // 8, arguments)


def argmax_keys(logits: Tensor, *, out: Tensor | None = None, load: LoadKernel = load_kernel) -> Tensor:
    """Return the best of each chunk of each row as sortable numbers for `accept_greedy`: int64 [rows, chunks].

    logits float32 [rows, vocab]. Among equals the smallest token wins.
    """
    rows, vocab = logits.shape
    chunks = math.ceil(vocab / ARGMAX_CHUNK)
    out = torch.empty(rows, chunks, dtype=torch.int64, device=logits.device) if out is None else out
    load(SOURCE, "argmax_chunks", bf16_define(torch.float16))((chunks, rows), 256, [logits, out, vocab])
    return out


def best_tokens(keys: Tensor) -> Tensor:
    """Return each row's best token from `argmax_keys`, int64 [rows]."""
    unsigned = (keys ^ torch.iinfo(torch.int64).min).amax(1)  # the keys order as unsigned numbers
    return 0xFFFFFFFF - (unsigned & 0xFFFFFFFF)


def accept_greedy(
    keys: Tensor,
    tokens: Tensor,
    parents: Tensor,
    record: Tensor,
    *,
    table: Tensor | None = None,
    load: LoadKernel = load_kernel,
) -> None:
    """Accept the longest path whose tokens are the target's argmax, fill the record and advance its length.

    keys [nodes, places] from `argmax_keys` or a linear's `best`; tokens and parents int32 [nodes] of at most 64 nodes.
    With the embeddings `table` [vocab, hidden], the bonus token's row is brought on its way to the GPU's cache.
    """
    nodes, places = keys.shape
    assert nodes <= 64 and keys.is_contiguous(), f"{nodes} nodes; a tree has at most 64 with its root here"
    kernel = load(SOURCE, "accept_greedy", bf16_define(torch.float16))
    row_bytes = 0 if table is None else table.shape[1] * table.element_size()
    kernel((1,), 512, [keys, tokens, parents, record, table, row_bytes, nodes, places])


def commit_path(
    scratch_keys: Tensor,
    scratch_values: Tensor,
    keys: Tensor,
    values: Tensor,
    record: Tensor,
    *,
    hidden: Tensor | None = None,
    state: Tensor | None = None,
    load: LoadKernel = load_kernel,
) -> None:
    """Copy the accepted path's scratch rows behind the committed rows of every layer.

    scratch [layers, nodes, kv_heads, head_dim] -> cache [layers, kv_heads, capacity, head_dim]. With hidden [nodes,
    hidden], the hidden state of the path's end is copied to `state` [1, hidden].
    """
    layers, nodes, kv_heads, head_dim = scratch_keys.shape
    width = 0 if hidden is None else hidden.shape[1] // 8
    kernel = load(SOURCE, "commit_path", bf16_define(torch.float16))
    arguments = [scratch_keys, scratch_values, keys, values, hidden, state]
    arguments += [record, nodes, kv_heads, keys.shape[2], width]
    kernel((layers * kv_heads + 1,), MAX_PATH * head_dim // 8, arguments)


def embed_tokens(
    tokens: Tensor, table: Tensor, record: Tensor | None, out: Tensor, *, load: LoadKernel = load_kernel
) -> None:
    """Look up embeddings [rows, hidden] of tokens int32 [rows] in table [vocab, hidden].

    With a record the first token is its bonus token, the root of the tree, and is written to `tokens`.
    """
    rows, width = out.shape
    assert width % 8 == 0 and len(tokens) == rows and table.is_contiguous()
    load(SOURCE, "embed_tokens", bf16_define(torch.float16))((rows,), 128, [tokens, table, record, out, width // 8])


def bf16_define(dtype: torch.dtype) -> Defines:
    """Say to the compiler which 16-bit type activations have."""
    return (("BF16", int(dtype == torch.bfloat16)),)
