"""What a captured step tells the host: sent while the next step is under way, read when it is needed."""

import torch
from torch import Tensor

from engine.cuda_memory import MAX_ROWS
from engine.draft import Draft
from engine.kernels.fused_ops import RECORD_SIZE, StepRecord
from engine.pruned_tree import PrunedTree, Tree
from engine.tree import CandidateTree

__all__ = ["StepOutput"]


class StepOutput:
    """A step's outbox on its way to the host. `for_heads`: the step left what heads read behind it."""

    def __init__(self, numbers: Tensor, arrived: torch.cuda.Event | None, tree: Tree, *, for_heads: bool) -> None:
        self._numbers, self._arrived, self._tree = numbers, arrived, tree
        self.for_heads = for_heads

    def wait(self) -> tuple[StepRecord, CandidateTree, Draft]:
        """Return the record, the verified tree and its nodes' guesses, once the step is done."""
        if self._arrived is not None:
            self._arrived.synchronize()
        tree, filled = self._tree, self._tree.filled
        record, tokens, chances, nodes = self._numbers.split([RECORD_SIZE, *[MAX_ROWS] * 3])
        draft = Draft(tokens[: filled.num_nodes].tolist(), chances[: filled.num_nodes].view(torch.float32).tolist())
        if isinstance(tree, PrunedTree):
            kept = tuple(nodes[: tree.num_nodes].tolist())
            return StepRecord(record.tolist()), tree.tree_of(kept), draft.of(kept)
        return StepRecord(record.tolist()), filled, draft
