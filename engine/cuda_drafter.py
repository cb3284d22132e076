"""A Drafter on the CUDA kernels: the heads fill a tree's tokens in device memory, depth by depth.

Launches only, over static buffers, so that drafting is part of a captured step. A round of few rows goes through
`engine.cuda_rounds`; here is what covers all others.
"""

import torch
from torch import Tensor

from engine.block_weights import Weight
from engine.cuda_heads import PackedBlock, pack_heads
from engine.cuda_memory import MAX_ROWS, roomy
from engine.cuda_plan import Round, TreePlan
from engine.cuda_rounds import FusedRounds
from engine.cuda_runner import CudaRunner
from engine.cuda_weights import require
from engine.draft import Draft
from engine.heads import MedusaHeads
from engine.kernels.draft_guesses import Unsettled, has_integer_products
from engine.kernels.draft_ops import MAX_GUESSES, MAX_VOCAB, draft_tokens, gather_seen, silu_rows
from engine.kernels.linear_inputs import Seen
from engine.tree import CandidateTree

__all__ = ["CudaDrafter"]


class CudaDrafter:
    """See `engine.draft.Drafter`. `shared_output` is the backbone's `lm_head`, of which truncated heads use rows.

    Where `is_fused`, rounds of few rows and guesses take the launches that were made for them. Raises
    CudaKernelsUnavailableError for heads of odd sizes.
    """

    def __init__(self, heads: MedusaHeads, runner: CudaRunner, shared_output: Weight, *, is_fused: bool = True) -> None:
        config = heads.config
        require(config.hidden_size % 64 == 0, "a multiple of 64 as the heads' hidden size", config.hidden_size)
        require((config.width or 64) % 64 == 0, "a multiple of 64 as the heads' width", config.width)
        require(config.output_size % 16 == 0, "a multiple of 16 draft tokens", config.output_size)
        require(config.output_size <= MAX_VOCAB, f"at most {MAX_VOCAB} draft tokens", config.output_size)
        self.max_depth, self.num_scored = config.num_heads, config.output_size
        self.sees_path = config.sees == "path"
        self._runner = runner
        memory, device = runner.memory, runner.device
        self._heads = pack_heads(heads, shared_output, memory.dtype, device)
        self._token_map = None if heads.token_map is None else heads.token_map.int().to(device).contiguous()
        self._gathered = torch.zeros(0, dtype=memory.dtype, device=device)
        self._outgrown: list[Tensor] = []  # captured graphs still use them
        width = config.width or config.hidden_size
        self._x = torch.zeros(MAX_ROWS, config.hidden_size, dtype=memory.dtype, device=device)
        self._inner = torch.zeros(MAX_ROWS, width, dtype=memory.dtype, device=device)
        self._logits = torch.zeros(0, device=device)
        self._fused: FusedRounds | None = None
        if is_fused and has_integer_products(device):
            self._fused = FusedRounds(self._heads, runner, self._token_map, sees_path=self.sees_path)

    def draft(self, hidden: Tensor, root: int, tree: CandidateTree) -> Draft:
        """Guess from the hidden state [hidden] behind `root`, the token that the backbone chose there."""
        if tree.max_depth > self.max_depth:
            raise ValueError(f"A tree of depth {tree.max_depth} needs as many heads; these are {self.max_depth}.")
        plan, memory = self._runner.plan(tree, self), self._runner.memory
        memory.state.copy_(hidden.view(1, -1))
        self._runner.set_root(root)
        self._runner.graphs.run(("draft", tree, self), lambda: self.settle(self.launch(plan)))
        tokens, chances = memory.tokens[: plan.num_nodes].tolist(), memory.chances[: plan.num_nodes].tolist()
        return Draft([root, *tokens[1:]], chances)

    def launch(self, plan: TreePlan) -> Unsettled | None:
        """Fill the tree from the memory's hidden state and the record's bonus token.

        What is returned are the last guesses, for the launch that needs them (or `settle`) to make tokens of.
        """
        unsettled: Unsettled | None = None
        for turn in plan.rounds:
            unsettled = self._guess(plan, turn, unsettled)
        return unsettled

    def settle(self, unsettled: Unsettled | None) -> None:
        """Give the nodes of unsettled guesses their tokens, if there are such."""
        if unsettled is not None:
            assert self._fused is not None
            self._fused.settle(unsettled)

    def prepare(self, plan: TreePlan) -> None:
        """Choose how to run every matrix for the rows of this tree."""
        linear = self._runner.linear
        for turn in plan.rounds:
            head, rows = self._heads[turn.head], turn.num_rows
            if not (self._fused and self._fused.can_run(turn)):
                linear.prepare(head.block_matrices, rows)
            if self._fused and self._fused.can_list(turn):
                self._fused.prepare(turn)
                continue
            linear.prepare([head.output], rows)
            if self._logits.numel() < rows * head.output.n:
                self._outgrown.append(self._logits)
                self._logits = torch.zeros(roomy(rows) * head.output.n, device=self._logits.device)

    def memory_bytes(self) -> int:
        """Bytes held by the heads and their work memory."""
        every = [matrix for head in self._heads for matrix in (*head.block_matrices, head.output)]
        matrices = {id(matrix): matrix.num_bytes for matrix in every}
        buffers = (self._gathered, self._x, self._inner, self._logits, *self._outgrown)
        fused = self._fused.num_bytes if self._fused else 0
        return sum(matrices.values()) + sum(buffer.nbytes for buffer in buffers) + fused

    def _guess(self, plan: TreePlan, turn: Round, unsettled: Unsettled | None) -> Unsettled | None:
        """Launch a round after one whose guesses may be unsettled; where they are returned, its own are."""
        runner, head, fused = self._runner, self._heads[turn.head], self._fused
        if fused and fused.can_run(turn):
            return fused.run(plan, turn, unsettled)
        self.settle(unsettled)
        first, *others = head.blocks
        x = self._first_block(first, plan, turn)
        for block in others:
            x = self._block(block, x, x)
        if fused and fused.can_list(turn):
            return fused.list_guesses(plan, turn, x)
        logits = self._logits[: turn.num_rows * head.output.n].view(turn.num_rows, -1)
        runner.linear(x, head.output, out=logits)
        draft_tokens(
            logits, self._token_map, plan.row_of, plan.rank, runner.memory.tokens, runner.memory.chances,
            guesses=min(turn.guesses, MAX_GUESSES), nodes=turn.nodes, table=runner.embedding, load=runner.load,
        )  # fmt: skip
        return None

    def _first_block(self, block: PackedBlock, plan: TreePlan, turn: Round) -> Tensor:
        """Apply a head's first block to the hidden state and the tokens on the way to each row's node."""
        runner, rows, num_seen = self._runner, turn.num_rows, self._heads[turn.head].num_seen
        memory, linear = runner.memory, runner.linear
        tables = memory.tokens, memory.record, plan.ancestor_at, turn.row_nodes
        if not num_seen:
            assert rows == 1, f"{rows} rows for a head that sees the hidden state alone"
            return self._block(block, memory.state, memory.state)
        if self._gathers(block, 1 + num_seen, rows):
            seen, inner = Seen(runner.embedding, *tables), self._inner[:rows]
            linear(memory.state, block.up, seen=seen, silu=True, out=inner)
            assert block.down is not None
            return linear(inner, block.down, residual=memory.state, out=self._x[:rows])
        x = self._x[:rows]
        inputs = self._inputs(rows, 1 + num_seen)
        gather_seen(memory.state, runner.embedding, *tables, inputs, x, load=runner.load)
        return self._block(block, inputs.flatten(1), x)

    def _gathers(self, block: PackedBlock, slots: int, rows: int) -> bool:
        """Say whether the block's launches can put together their input and add the hidden state to all rows."""
        if block.down is None:
            return False
        up, down = (self._runner.linear.config(matrix, rows) for matrix in (block.up, block.down))
        return up.can_gather(slots, rows) and bool(down.resident)

    def _block(self, block: PackedBlock, seen: Tensor, x: Tensor) -> Tensor:
        """Return x plus the block's answer to what it sees."""
        rows, linear = len(x), self._runner.linear
        inner, out = self._inner[:rows], self._x[:rows]
        if block.down is not None:
            return linear(linear(seen, block.up, silu=True, out=inner), block.down, residual=x, out=out)
        silu_rows(linear(seen, block.up, out=inner), out, bias=block.bias, residual=x, load=self._runner.load)
        return out

    def _inputs(self, rows: int, slots: int) -> Tensor:
        """Return room for heads' inputs [rows, slots, hidden], made where a launch cannot do without."""
        hidden = self._x.shape[1]
        if self._gathered.numel() < MAX_ROWS * slots * hidden:
            self._outgrown.append(self._gathered)
            self._gathered = torch.zeros(MAX_ROWS * slots * hidden, dtype=self._x.dtype, device=self._x.device)
        return self._gathered[: rows * slots * hidden].view(rows, slots, hidden)
