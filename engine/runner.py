"""What the decode loop needs from a loaded backbone, whatever device and kernels are behind it.

A runner owns the weights and the cache. Committed rows are part of the text; scratch rows belong to the tree being
verified and live until `commit` or the next `verify`. The contract that makes Medusa's toggle leave the text alone:
the hidden state, the logits and the cached rows of a token depend on the token and its ancestors alone, bit for bit,
never on how many rows were computed beside it.

What heads read behind a token is the runner's to know too: its hidden state, or what their prefix attention makes of
it, which needs rows of its own in the cache. These cost time, so plain steps leave them out.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from engine.backbone import BackboneConfig
from engine.prefix_attention import PrefixAttention
from engine.tree import CandidateTree

__all__ = ["Runner"]


class Runner(Protocol):
    """One backbone with one sequence in its cache."""

    config: BackboneConfig
    device: str
    weights: str  # what the linears are, for people: "Q4_1 as packed int4"
    max_tree_nodes: int  # drafted nodes that one step can take

    @property
    def num_committed(self) -> int:
        """Rows in the cache that are part of the text."""
        ...

    @property
    def num_prefixed(self) -> int:
        """Leading committed rows that the prefix attention has seen: all of them where none is attached."""
        ...

    def attach(self, prefix: PrefixAttention) -> None:
        """Run the heads' prefix attention from now on. Only before any text, once. Raises CheckpointMismatchError."""
        ...

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens to the committed text; return the last one's hidden state [hidden]."""
        ...

    def verify(self, tokens: Sequence[int], tree: CandidateTree, *, for_heads: bool = True) -> Tensor:
        """Run the tree's nodes after the committed text; return their hidden states [nodes, hidden].

        Without `for_heads` the prefix attention is left out: nothing can be drafted behind these nodes.
        """
        ...

    def heads_state(self) -> Tensor:
        """Return what heads read behind the last committed token, [hidden], after a `prefill` or a `commit`."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply `lm_head`: [rows, hidden] -> float32 [rows, vocab]."""
        ...

    def greedy(self, hidden: Tensor) -> list[int]:
        """Return each row's best token, argmax of `logits`, for hidden states [rows, hidden]."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Return token embeddings, int64 [...] -> [..., hidden]."""
        ...

    def commit(self, path: Sequence[int]) -> None:
        """Append the nodes of `path` (root first) to the committed text; the other scratch rows are dropped."""
        ...

    def truncate(self, length: int) -> None:
        """Forget committed rows from `length` on."""
        ...

    def committed_rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return one layer's committed keys and values, [kv_heads, rows, head_dim] each."""
        ...

    def memory_bytes(self) -> int:
        """Bytes held by weights and cache."""
        ...
