"""Tree attention on the GPU: the nodes of a candidate tree over the committed cache and their ancestors, from qkv on.

A token's result depends on its keys alone, bit for bit, never on which of them are still scratch or on the other nodes
(see cuda/tree_attention.cuh). The committed length is read from device memory, so one captured launch serves any.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.nvrtc import Defines, load_kernel, shared_memory_limit
from engine.kernels.small_batch_linear import LoadKernel

__all__ = [
    "MAX_DEPTH", "AttentionConfig", "AttentionShape", "AttentionWorkspace", "ancestor_table", "default_config",
    "tree_attention",
]  # fmt: skip

NEAR = 16  # the last keys of a token, which may be scratch; a tree is less deep than that
MAX_DEPTH = NEAR - 1
FAR_WARPS = 8
HEAD_DIMS = (64, 128)
FULL_GRID = {8: 240, 4: 256}  # thread blocks at a time on a large GPU, two a multiprocessor, in clusters of 8 or 4


@dataclass(frozen=True)
class AttentionShape:
    """What attention is asked for."""

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


@dataclass(frozen=True)
class AttentionConfig:
    """How the work is cut.

    `slots` thread blocks share rows and take blocks of `far_block` positions by turns: these two change bits and are
    the same for every number of nodes. A thread block takes `row_tiles` x 16 query rows of a key/value head; `stages`
    blocks of positions lie in its shared memory. In a `cluster` (compute capability 9.0 and up) the partial sums are
    added without global memory.
    """

    shape: AttentionShape
    row_tiles: int
    slots: int
    far_block: int
    stages: int
    cluster: bool

    @property
    def task_heads(self) -> int:
        return min(self.shape.group, 16)

    @property
    def tasks(self) -> int:
        """Nodes (or sixteens of a node's heads) of a thread block."""
        return 16 * self.row_tiles // self.task_heads

    @property
    def near_warps(self) -> int:
        return math.ceil(self.tasks / self.slots)

    @property
    def threads(self) -> int:
        return 32 * (FAR_WARPS + self.near_warps)

    def grid(self, nodes: int) -> tuple[int, int, int]:
        tasks = nodes * math.ceil(self.shape.group / self.task_heads)
        return self.slots, math.ceil(tasks / self.tasks), self.shape.num_kv_heads

    @property
    def shared_bytes(self) -> int:
        """Return LAST_AT of cuda/attention_parts.cuh."""
        head_dim, rows = self.shape.head_dim, 16 * self.row_tiles
        blocks = 4 * self.stages * self.far_block * head_dim
        operands = rows * (head_dim + self.far_block) * 2 + self.near_warps * NEAR * head_dim * 2
        own_rows = rows // self.slots
        sums = NEAR * head_dim * 4 + own_rows * head_dim * 4
        return blocks + operands + sums + rows * self.far_block // 16 * 8 + (self.slots + 1) * own_rows * 8 + 16

    @property
    def workspace_floats(self) -> int:
        """Return the partial sums of the thread blocks that share rows, where they go through global memory."""
        return 0 if self.cluster else (self.slots + 1) * 16 * self.row_tiles * (self.shape.head_dim + 2)

    @property
    def defines(self) -> Defines:
        return (
            *(("HEAD_DIM", self.shape.head_dim), ("GROUP", self.shape.group), ("ROW_TILES", self.row_tiles)),
            *(("SLOTS", self.slots), ("FAR_BLOCK", self.far_block), ("STAGES", self.stages)),
            *(("CLUSTER", self.slots if self.cluster else 1), ("BF16", int(self.shape.dtype == torch.bfloat16))),
        )


def default_config(shape: AttentionShape, nodes: int, *, cluster: bool, shared_limit: int) -> AttentionConfig:
    """Pick the cut for a number of nodes: few rows to a thread block until the GPU is full, and what memory allows."""
    is_large = shared_limit >= 160 * 1024  # room for two thread blocks on a multiprocessor
    slots = 4 if is_large and shape.num_kv_heads > 20 else 8
    far_block = 64 if shape.head_dim == 128 and not is_large else 128
    stages = 2 if is_large and shape.head_dim == 64 else 1
    built = [AttentionConfig(shape, tiles, slots, far_block, stages, cluster) for tiles in (1, 2, 3)]
    limit = (shared_limit - 1024) // 2 if is_large else shared_limit
    fitting = [config for config in built if config.shared_bytes <= limit]
    return next((config for config in fitting if math.prod(config.grid(nodes)) <= FULL_GRID[slots]), fitting[-1])


class AttentionWorkspace:
    """What thread blocks exchange through global memory, shared by all layers: built for trees of up to `nodes`.

    With a `config` that one is used for every number of nodes.
    """

    def __init__(
        self, shape: AttentionShape, nodes: int, device: torch.device | str, *, config: AttentionConfig | None = None
    ) -> None:
        self.shape, self.nodes = shape, nodes
        cluster = torch.device(device).type == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
        limit = shared_memory_limit()
        self._configs = [
            config or default_config(shape, count, cluster=cluster, shared_limit=limit) for count in range(1, nodes + 1)
        ]
        groups = [math.prod(config.grid(count + 1)[1:]) for count, config in enumerate(self._configs)]
        floats = [c.workspace_floats * number for c, number in zip(self._configs, groups, strict=True)]
        self.partial = torch.empty(max(floats), dtype=torch.float32, device=device)
        self.counters = torch.zeros(max(groups), dtype=torch.int32, device=device)

    def config(self, nodes: int) -> AttentionConfig:
        assert nodes <= self.nodes, f"{nodes} nodes; the workspace was built for {self.nodes}"
        return self._configs[nodes - 1]

    @property
    def num_bytes(self) -> int:
        return self.partial.nbytes + self.counters.nbytes


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
    qkv: Tensor,
    angles: Tensor,
    length: Tensor,
    depth: Tensor,
    ancestor_at: Tensor | None,
    keys: Tensor,
    values: Tensor,
    scratch: tuple[Tensor, Tensor] | None,
    workspace: AttentionWorkspace,
    *,
    out: Tensor | None = None,
    load: LoadKernel = load_kernel,
) -> Tensor:
    """Attend from every node to the committed rows and its ancestors: -> [nodes, heads, head_dim].

    qkv [nodes, (heads + 2 kv_heads) * head_dim] before rotation; angles as `rotary_angles`; length int32, its first
    element the committed rows; depth int32 [nodes]; ancestor_at as `ancestor_table`; keys, values [kv_heads, capacity,
    head_dim]. Rotated keys and the values of the nodes go to scratch rows [nodes, kv_heads, head_dim]. Without scratch
    rows the nodes are rows of a prompt that `rotate_into_cache` has put into the cache: depth counts back from length.
    """
    shape, nodes, capacity = workspace.shape, qkv.shape[0], keys.shape[1]
    assert all(t.is_contiguous() for t in (qkv, angles, keys, values, *(scratch or ())))
    assert qkv.shape[1] == (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, f"qkv of {qkv.shape[1]} columns"
    if out is None:
        out = torch.empty(nodes, shape.num_heads, shape.head_dim, dtype=shape.dtype, device=qkv.device)
    config = workspace.config(nodes)
    kernel = load("tree_attention.cuh", "attend_tree", config.defines, config.shared_bytes)
    arguments = [qkv, angles, length, depth, ancestor_at, keys, values, *(scratch or (None, None)), out]
    arguments += [workspace.partial, workspace.counters, nodes, capacity, shape.head_dim**-0.5 * math.log2(math.e)]
    kernel(config.grid(nodes), config.threads, arguments, config.shared_bytes)
    return out
