"""A Drafter on the CUDA kernels: the heads fill a tree's tokens in device memory, depth by depth.

Launches only, over static buffers, so that drafting is part of a captured step. Guesses need no exactness: matrices
are int8, and what a head sees lies side by side, so that its first block is one matrix over all of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.block_weights import DenseWeight, Weight
from engine.cuda_memory import MAX_ROWS, roomy
from engine.cuda_plan import Round, TreePlan
from engine.cuda_runner import CudaRunner
from engine.cuda_weights import pack_matrix, require
from engine.draft import Draft
from engine.heads import MedusaHead, MedusaHeads, PaperBlock
from engine.kernels.draft_guesses import (
    Guessed,
    ListRoom,
    can_list,
    has_integer_products,
    list_guesses,
    settle_guesses,
)
from engine.kernels.draft_ops import MAX_GUESSES, MAX_VOCAB, draft_tokens, gather_seen, silu_rows
from engine.kernels.linear_inputs import Seen
from engine.kernels.small_batch_linear import PackedLinear
from engine.tree import CandidateTree

__all__ = ["CudaDrafter"]


@dataclass(frozen=True)
class _Block:
    """A paper block (no `down`, a bias) or a wide one."""

    up: PackedLinear
    bias: Tensor | None
    down: PackedLinear | None


@dataclass(frozen=True)
class _Head:
    blocks: list[_Block]
    output: PackedLinear
    num_seen: int

    @property
    def matrices(self) -> list[PackedLinear]:
        inner = [matrix for block in self.blocks for matrix in (block.up, block.down) if matrix is not None]
        return [*inner, self.output]


class CudaDrafter:
    """See `engine.draft.Drafter`. `shared_output` is the backbone's `lm_head`, of which truncated heads use rows.

    Where `is_fused`, rounds of few rows and guesses take the launches that were made for them. Raises
    CudaKernelsUnavailableError for heads of odd sizes.
    """

    def __init__(
        self, heads: MedusaHeads, runner: CudaRunner, shared_output: Weight, *, is_fused: bool = True
    ) -> None:
        config = heads.config
        require(config.hidden_size % 64 == 0, "a multiple of 64 as the heads' hidden size", config.hidden_size)
        require((config.width or 64) % 64 == 0, "a multiple of 64 as the heads' width", config.width)
        require(config.output_size % 16 == 0, "a multiple of 16 draft tokens", config.output_size)
        require(config.output_size <= MAX_VOCAB, f"at most {MAX_VOCAB} draft tokens", config.output_size)
        self.max_depth = config.num_heads
        self.sees_path = config.sees == "path"
        self._runner = runner
        memory, device = runner.memory, runner.device
        self._heads = _pack(heads, shared_output, memory.dtype, device)
        self._token_map = None if heads.token_map is None else heads.token_map.int().to(device).contiguous()
        self._gathered = torch.zeros(0, dtype=memory.dtype, device=device)
        self._outgrown: list[Tensor] = []  # captured graphs still use them
        width = config.width or config.hidden_size
        self._x = torch.zeros(MAX_ROWS, config.hidden_size, dtype=memory.dtype, device=device)
        self._inner = torch.zeros(MAX_ROWS, width, dtype=memory.dtype, device=device)
        self._logits = torch.zeros(0, device=device)
        self._is_fused = is_fused and has_integer_products(device)
        self._lists = ListRoom(device)

    def draft(self, hidden: Tensor, root: int, tree: CandidateTree) -> Draft:
        """Guess from the hidden state [hidden] behind `root`, the token that the backbone chose there."""
        if tree.max_depth > self.max_depth:
            raise ValueError(f"A tree of depth {tree.max_depth} needs as many heads; these are {self.max_depth}.")
        plan, memory = self._runner.plan(tree, self), self._runner.memory
        memory.state.copy_(hidden.view(1, -1))
        self._runner.set_root(root)
        self._runner.graphs.run(("draft", tree, self), lambda: self.launch(plan))
        tokens, chances = memory.tokens[: plan.num_nodes].tolist(), memory.chances[: plan.num_nodes].tolist()
        return Draft([root, *tokens[1:]], chances)

    def launch(self, plan: TreePlan) -> None:
        """Fill the tree from the memory's hidden state and the record's bonus token."""
        for turn in plan.rounds:
            self._guess(plan, turn)

    def prepare(self, plan: TreePlan) -> None:
        """Choose how to run every matrix for the rows of this tree."""
        for turn in plan.rounds:
            *inner, output = self._heads[turn.head].matrices
            self._runner.linear.prepare(inner, turn.num_rows)
            if self._can_list(turn):
                self._lists.reserve(output.n, turn.num_rows, turn.guesses)
                continue
            self._runner.linear.prepare([output], turn.num_rows)
            vocab = output.n
            if self._logits.numel() < turn.num_rows * vocab:
                self._outgrown.append(self._logits)
                self._logits = torch.zeros(roomy(turn.num_rows) * vocab, device=self._logits.device)

    def memory_bytes(self) -> int:
        """Bytes held by the heads and their work memory."""
        matrices = {id(matrix): matrix.num_bytes for head in self._heads for matrix in head.matrices}
        buffers = (self._gathered, self._x, self._inner, self._logits, *self._outgrown)
        return sum(matrices.values()) + sum(buffer.nbytes for buffer in buffers) + self._lists.num_bytes

    def _can_list(self, turn: Round) -> bool:
        return self._is_fused and can_list(self._heads[turn.head].output, turn.num_rows, turn.guesses)

    def _guess(self, plan: TreePlan, turn: Round) -> None:
        runner, head, rows = self._runner, self._heads[turn.head], turn.num_rows
        memory, linear = runner.memory, runner.linear
        first, *others = head.blocks
        x = self._first_block(first, plan, turn)
        for block in others:
            x = self._block(block, x, x)
        if self._can_list(turn):
            self._list(plan, turn, x)
            return
        logits = self._logits[: rows * head.output.n].view(rows, -1)
        linear(x, head.output, out=logits)
        draft_tokens(
            logits, self._token_map, plan.row_of, plan.rank, memory.tokens, memory.chances,
            guesses=min(turn.guesses, MAX_GUESSES), nodes=turn.nodes, table=runner.embedding, load=runner.load,
        )  # fmt: skip

    def _list(self, plan: TreePlan, turn: Round, x: Tensor) -> None:
        """Guess from what the blocks have left in x [rows, hidden], without scores in between."""
        runner, output = self._runner, self._heads[turn.head].output
        lists = self._lists.lists(output.n, turn.num_rows, turn.guesses)
        guessed = Guessed(plan.row_of, plan.rank, runner.memory.tokens, runner.memory.chances, turn.nodes)
        list_guesses(x, output, lists, token_map=self._token_map, table=runner.embedding, load=runner.load)
        settle_guesses(lists, guessed, table=runner.embedding, load=runner.load)

    def _first_block(self, block: _Block, plan: TreePlan, turn: Round) -> Tensor:
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

    def _gathers(self, block: _Block, slots: int, rows: int) -> bool:
        """Say whether the block's launches can put together their input and add the hidden state to all rows."""
        if block.down is None:
            return False
        up, down = (self._runner.linear.config(matrix, rows) for matrix in (block.up, block.down))
        return up.can_gather(slots, rows) and bool(down.resident)

    def _block(self, block: _Block, seen: Tensor, x: Tensor) -> Tensor:
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


def _pack(heads: MedusaHeads, shared_output: Weight, dtype: torch.dtype, device: str) -> list[_Head]:
    def pack(*values: Tensor) -> PackedLinear:
        return pack_matrix([DenseWeight(torch.cat([v.detach() for v in values], dim=1))], "int8", dtype, device)

    def blocks(head: MedusaHead) -> list[_Block]:
        packed = []
        for block in head.blocks:
            if isinstance(block, PaperBlock):
                packed.append(_Block(pack(block.linear.weight), block.linear.bias.detach().to(device, dtype), None))
            else:
                seen = [linear.weight for linear in block.seen]
                packed.append(_Block(pack(block.up.weight, *seen), None, pack(block.down.weight)))
        return packed

    if heads.config.output.startswith("own"):
        outputs = [pack(output.weight) for output in heads.outputs if isinstance(output, nn.Linear)]
    else:
        rows = shared_output if heads.token_map is None else shared_output.permute_rows(heads.token_map)
        outputs = [pack_matrix([rows], "int8", dtype, device)] * heads.config.num_heads
    return [_Head(blocks(head), output, head.num_seen) for head, output in zip(heads.heads, outputs, strict=True)]
