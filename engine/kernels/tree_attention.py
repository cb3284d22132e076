"""Tree attention on the GPU: the nodes of a candidate tree over the committed cache and their ancestors' scratch rows.

A token's result depends on its keys alone, bit for bit, never on which of them are still scratch or on the other nodes
(see cuda/tree_attention.cuh). The committed length is read from device memory, so one captured launch serves a whole
context bucket.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.nvrtc import Defines, load_kernel
from engine.kernels.small_batch_linear import LoadKernel

__all__ = ["MAX_DEPTH", "AttentionShape", "AttentionWorkspace", "ancestor_table", "tree_attention"]

NEAR = 16  # the last keys of a token, taken one by one; a tree is less deep than that
MAX_DEPTH = NEAR - 1
FAR_BLOCK = 128
HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class AttentionShape:
    """What the kernels are compiled for."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query and {self.num_kv_heads} key heads of {self.head_dim}: the kernel needs head "
                f"sizes of {HEAD_DIMS} and whole groups."
            )

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def defines(self) -> Defines:
        is_bf16 = int(self.dtype == torch.bfloat16)
        return (("HEAD_DIM", self.head_dim), ("GROUP", self.group), ("BF16", is_bf16))


class AttentionWorkspace:
    """Partial sums of the far blocks, shared by all layers: built for the largest tree and context bucket."""

    def __init__(self, shape: AttentionShape, nodes: int, max_context: int, device: torch.device | str) -> None:
        self.blocks = math.ceil(max_context / FAR_BLOCK)
        rows = shape.num_heads * nodes * self.blocks
        self.partial = torch.empty(rows * shape.head_dim, dtype=torch.float32, device=device)
        self.peaks = torch.empty(rows * 2, dtype=torch.float32, device=device)


def ancestor_table(ancestors: Tensor, depth: Tensor) -> Tensor:
    """Return int32 [nodes, 16]: the node at each depth on the way from the root to a node, itself included, then 0.

    ancestors bool [nodes, nodes] and depth int64 [nodes] as in `CandidateTree`. Raises ValueError for a deeper tree.
    """
    if int(depth.max()) > MAX_DEPTH:
        raise ValueError(f"A tree of depth {int(depth.max())}; the attention kernel takes up to {MAX_DEPTH}.")
    table = torch.zeros(len(depth), NEAR, dtype=torch.int32)
    for node, ancestor in ancestors.nonzero().tolist():
        table[node, depth[ancestor]] = ancestor
    return table


def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scratch_keys: Tensor,
    scratch_values: Tensor,
    length: Tensor,
    depth: Tensor,
    ancestor_at: Tensor,
    shape: AttentionShape,
    workspace: AttentionWorkspace,
    *,
    max_context: int,
    out: Tensor | None = None,
    load: LoadKernel = load_kernel,
) -> Tensor:
    """Attend from every node to the committed rows and its ancestors: -> [nodes, heads, head_dim].

    query [nodes, heads, head_dim]; keys, values [kv_heads, capacity, head_dim]; scratch rows [nodes, kv_heads,
    head_dim]; length int32, its first element the committed rows, at most `max_context`; depth int32 [nodes]; all
    contiguous.
    """
    nodes, capacity = query.shape[0], keys.shape[1]
    blocks = math.ceil(max_context / FAR_BLOCK)
    assert blocks <= workspace.blocks and max_context <= capacity, "the workspace was built for a shorter context"
    assert all(t.is_contiguous() for t in (query, keys, values, scratch_keys, scratch_values))
    out = torch.empty_like(query) if out is None else out
    scale = shape.head_dim**-0.5 * math.log2(math.e)
    far = load("tree_attention.cuh", "attend_far", shape.defines)
    near = load("tree_attention.cuh", "attend_near", shape.defines)
    tiles = math.ceil(nodes * shape.group / 16)
    far(
        (blocks, shape.num_kv_heads, tiles_in_grid(tiles, blocks * shape.num_kv_heads)),
        128,
        [query, keys, values, length, depth, workspace.partial, workspace.peaks, nodes, capacity, scale],
    )
    near(
        (math.ceil(nodes * shape.num_heads / 4),),
        128,
        [
            *(query, keys, values, scratch_keys, scratch_values, length, depth, ancestor_at),
            *(workspace.partial, workspace.peaks, out, nodes, shape.num_kv_heads, capacity, blocks, scale),
        ],
    )
    return out


def tiles_in_grid(tiles: int, other_blocks: int) -> int:
    """Spread row tiles over thread blocks until the GPU is full; the rest is a loop that finds K and V in the cache."""
    return max(1, min(tiles, math.ceil(528 / other_blocks)))
