"""The likeliest nodes of a drafted tree, and the tables of what is left of it, by one launch (cuda/draft_prune.cuh)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.draft_guesses import ROOM_BYTES, Guessed, Unsettled
from engine.kernels.fused_ops import bf16_define
from engine.kernels.nvrtc import load_kernel
from engine.kernels.small_batch_linear import LoadKernel
from engine.kernels.tree_attention import NEAR

__all__ = ["KeptTables", "can_prune_unsettled", "embed_likeliest"]

MAX_NODES = 64
MAX_LISTED_ROWS = 16


@dataclass(frozen=True)
class KeptTables:
    """What is left of a tree, for `num_nodes` nodes: int32 nodes (of the filled tree), tokens, depth, parents [nodes],
    ancestor_at [nodes, 16] as `ancestor_table`, and is_above bool [nodes, nodes]."""

    nodes: Tensor
    tokens: Tensor
    depth: Tensor
    parents: Tensor
    ancestor_at: Tensor
    is_above: Tensor

    @classmethod
    def empty(cls, nodes: Tensor) -> "KeptTables":
        """Make room for as many nodes as `nodes` holds."""
        count = len(nodes)
        ints = [torch.zeros(count, dtype=torch.int32, device=nodes.device) for _ in range(3)]
        ancestor_at = torch.zeros(count, NEAR, dtype=torch.int32, device=nodes.device)
        return cls(nodes, *ints, ancestor_at, torch.zeros(count, count, dtype=torch.bool, device=nodes.device))

    def of(self, count: int) -> "KeptTables":
        """Return the part that a tree of `count` nodes uses."""
        firsts = (part[:count] for part in (self.nodes, self.tokens, self.depth, self.parents, self.ancestor_at))
        return KeptTables(*firsts, self.is_above.view(-1)[: count * count].view(count, count))

    @property
    def num_bytes(self) -> int:
        """Bytes besides `nodes`, which belongs to the one who gave it."""
        return sum(part.nbytes for part in vars(self).values()) - self.nodes.nbytes


def can_prune_unsettled(unsettled: Unsettled) -> bool:
    """Say whether the launch takes these guesses as they are; others are to be settled before."""
    lists = unsettled.lists
    return lists.rows <= MAX_LISTED_ROWS and lists.rows * lists.row_bytes <= ROOM_BYTES


def embed_likeliest(
    filled: Guessed,
    depth: Tensor,
    ancestor_at: Tensor,
    kept: KeptTables,
    table: Tensor,
    record: Tensor,
    out: Tensor,
    *,
    unsettled: Unsettled | None = None,
    load: LoadKernel = load_kernel,
) -> None:
    """Keep the likeliest nodes of a tree and look up their embeddings: [kept, hidden] in table [vocab, hidden].

    `filled` is the tree with the heads' tokens and chances, whose root is the record's bonus token; depth int32 [nodes]
    and ancestor_at [nodes, 16] its shape. Guesses of its last depth may be `unsettled`, and are not afterwards.
    """
    rows, width = out.shape
    nodes, lists = len(depth), unsettled.lists if unsettled else None
    assert width % 8 == 0 and table.is_contiguous() and 1 < rows < nodes <= MAX_NODES, f"{rows} of {nodes} nodes"
    assert len(kept.nodes) == rows and kept.is_above.is_contiguous(), f"tables of {len(kept.nodes)} for {rows} nodes"
    assert unsettled is None or (can_prune_unsettled(unsettled) and unsettled.guessed.tokens is filled.tokens)
    places = lists.places if lists else 0
    kernel = load("draft_prune.cuh", "embed_likeliest", (("PLACES", places), *bf16_define(torch.float16)), ROOM_BYTES)
    arguments: list[Tensor | int | None] = [lists.keys, lists.sums] if lists else [None, None]
    arguments += [filled.row_of, filled.rank_of, filled.tokens, filled.chances]
    arguments += [unsettled.sums, unsettled.num_cleared] if unsettled else [None, 0]
    arguments += [lists.rows, lists.guesses] if lists else [0, 0]
    guessed = unsettled.guessed.nodes if unsettled else range(0)
    arguments += [guessed.start, guessed.stop, depth, ancestor_at, nodes]
    arguments += [kept.nodes, kept.tokens, kept.depth, kept.parents, kept.ancestor_at, kept.is_above]
    shared_bytes = lists.rows * lists.row_bytes if lists else 0
    kernel((rows,), 128, [*arguments, table, record, out, width // 8], shared_bytes)
