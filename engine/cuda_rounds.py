"""Rounds of drafting in few launches: one a wide block, one for the output, none for the guesses themselves.

A round's guesses stay in lists until the launch that needs them settles them: the next round's first, or the
backbone's. Blocks add to sums, which are zero again once that round's guesses are settled. Which heads and rounds this
covers is known in the kernels' modules; the drafter has another way for the rest.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.cuda_heads import PackedHead
from engine.cuda_plan import Round, TreePlan
from engine.cuda_runner import CudaRunner
from engine.kernels.draft_blocks import MAX_BLOCK_ROWS, add_block, can_add_block, can_merge
from engine.kernels.draft_guesses import (
    Guessed,
    ListRoom,
    Unsettled,
    can_list,
    list_guesses,
    settle_guesses,
    token_tiles,
)
from engine.kernels.linear_inputs import Seen

__all__ = ["FusedRounds"]

# Of sums, among which the thread blocks of a launch take turns: more to add up, fewer that meet. On an H100 drafting 8
# nodes with heads of the bundled model's shape took 52, 48, 54 us with 1, 2, 4 of them.
COPIES = 2
FEW_ROWS = 8  # one tile of tokens; from there on the other launches are faster (63 nodes: 88 us, by these 104)


class FusedRounds:
    """Launches over the runner's memory. `copies` changes no guess, only how long launches take."""

    def __init__(
        self,
        heads: Sequence[PackedHead],
        runner: CudaRunner,
        token_map: Tensor | None,
        *,
        sees_path: bool,
        copies: int = COPIES,
    ) -> None:
        self._heads, self._runner, self._token_map = heads, runner, token_map
        self._sees_path, self._copies = sees_path, copies
        self._lists = ListRoom(runner.device)
        self._most_blocks = max(len(head.blocks) for head in heads)
        hidden, dtype = heads[0].output.k, runner.memory.dtype
        # By turns: a launch clears what one round has left while it begins to add for the next one.
        size = 2, self._most_blocks * copies * MAX_BLOCK_ROWS * hidden
        self._sums = torch.zeros(size, dtype=torch.int32, device=runner.device)
        self._x = torch.zeros(2, MAX_BLOCK_ROWS, hidden, dtype=dtype, device=runner.device)

    @property
    def num_bytes(self) -> int:
        return self._sums.nbytes + self._x.nbytes + self._lists.num_bytes

    def can_list(self, turn: Round) -> bool:
        """Say whether a round's guesses can go by lists."""
        return turn.num_rows <= FEW_ROWS and can_list(self._heads[turn.head].output, turn.num_rows, turn.guesses)

    def can_run(self, turn: Round) -> bool:
        """Say whether a round's blocks can go by sums; its guesses then go by lists."""
        blocks = self._heads[turn.head].blocks
        fits = all(b.down is not None and can_add_block(b.up, b.down, turn.num_rows) for b in blocks)
        return fits and self.can_list(turn)

    def prepare(self, turn: Round) -> None:
        """Make room for a round that `can_list`."""
        self._lists.reserve(self._heads[turn.head].output.n, turn.num_rows, turn.guesses)

    def run(self, plan: TreePlan, turn: Round, unsettled: Unsettled | None) -> Unsettled:
        """Launch a round that `can_run`, after one whose guesses may be unsettled; its own are, then."""
        head, rows, state = self._heads[turn.head], turn.num_rows, self._runner.memory.state
        sums, added, x = self._sums_of(turn, len(head.blocks)), None, state
        for number, block in enumerate(head.blocks):
            assert block.down is not None
            out = None if added is None else self._x[number % 2, :rows]
            options = self._first_options(plan, turn, unsettled) if number == 0 else {"added": added, "x_out": out}
            add_block(x, block.up, block.down, sums[number], rows=rows, **options, load=self._runner.load)
            x, added = state if out is None else out, sums[number]
        return self.list_guesses(plan, turn, x, added, sums)

    def list_guesses(
        self, plan: TreePlan, turn: Round, x: Tensor, added: Tensor | None = None, sums: Tensor | None = None
    ) -> Unsettled:
        """Launch the output of a round on x [rows or 1, hidden] with what was `added`; `sums` are then not needed."""
        runner, output = self._runner, self._heads[turn.head].output
        lists = self._lists.lists(output.n, turn.num_rows, turn.guesses)
        table = runner.embedding if self._sees_path else None
        list_guesses(x, output, lists, token_map=self._token_map, added=added, table=table, load=runner.load)
        memory = runner.memory
        return Unsettled(lists, Guessed(plan.row_of, plan.rank, memory.tokens, memory.chances, turn.nodes), sums)

    def settle(self, unsettled: Unsettled) -> None:
        """Give the nodes their guesses by a launch."""
        settle_guesses(unsettled, table=self._runner.embedding, load=self._runner.load)

    def _sums_of(self, turn: Round, num_blocks: int) -> Tensor:
        """Return a round's sums [blocks, copies, 8 tiles, hidden], from the half that the round before does not use."""
        size = num_blocks, self._copies, 8 * token_tiles(turn.num_rows), self._x.shape[-1]
        return self._sums[turn.head % 2, : torch.Size(size).numel()].view(size)

    def _first_options(self, plan: TreePlan, turn: Round, unsettled: Unsettled | None) -> dict[str, Any]:
        """Return what a first block does besides; guesses that it needs and cannot merge are settled before."""
        runner, head = self._runner, self._heads[turn.head]
        memory, block = runner.memory, head.blocks[0]
        tables = memory.tokens, memory.record, plan.ancestor_at, turn.row_nodes
        seen = Seen(runner.embedding, *tables) if head.num_seen else None
        assert block.down is not None
        merges = False
        if unsettled is not None and self._sees_path:
            merges = can_merge(unsettled.lists, block.up, block.down, turn.num_rows)
            if not merges:
                self.settle(unsettled)
                unsettled = None
        return {"seen": seen, "unsettled": unsettled, "merges": merges}
