"""A Drafter on the CUDA kernels: the heads fill a tree's tokens in device memory, depth by depth.

Launches only, over static buffers, so that drafting is part of a captured step. Guesses need no exactness: matrices
are int8, and what a head sees lies side by side, so that its first block is one matrix over all of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.block_weights import DenseWeight, Weight
from engine.cuda_memory import MAX_ROWS
from engine.cuda_plan import Round, TreePlan
from engine.cuda_runner import CudaRunner
from engine.cuda_weights import pack_matrix, require
from engine.draft import Draft
from engine.heads import MedusaHead, MedusaHeads, PaperBlock
from engine.kernels.draft_ops import MAX_GUESSES, MAX_VOCAB, draft_tokens, gather_seen, silu_rows
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

    Raises CudaKernelsUnavailableError for heads of odd sizes.
    """

    def __init__(self, heads: MedusaHeads, runner: CudaRunner, shared_output: Weight) -> None:
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
        self._inputs = torch.zeros(
            MAX_ROWS * (1 + max(head.num_seen for head in self._heads)) * config.hidden_size,
            dtype=memory.dtype,
            device=device,
        )
        width = config.width or config.hidden_size
        self._x = torch.zeros(MAX_ROWS, config.hidden_size, dtype=memory.dtype, device=device)
        self._inner = torch.zeros(MAX_ROWS, width, dtype=memory.dtype, device=device)
        self._logits = torch.zeros(MAX_ROWS * config.output_size, device=device)

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
            self._runner.linear.prepare(self._heads[turn.head].matrices, turn.num_rows)

    def memory_bytes(self) -> int:
        """Bytes held by the heads and their work memory."""
        matrices = {id(matrix): matrix.num_bytes for head in self._heads for matrix in head.matrices}
        buffers = (self._inputs, self._x, self._inner, self._logits)
        return sum(matrices.values()) + sum(buffer.nbytes for buffer in buffers)

    def _guess(self, plan: TreePlan, turn: Round) -> None:
        runner, head, rows = self._runner, self._heads[turn.head], turn.num_rows
        memory, linear, load = runner.memory, runner.linear, runner.load
        x, inner = self._x[:rows], self._inner[:rows]
        inputs = self._inputs[: rows * (1 + head.num_seen) * x.shape[1]].view(rows, 1 + head.num_seen, -1)
        gather_seen(
            memory.state, runner.embedding, memory.tokens, memory.record, plan.ancestor_at, turn.row_nodes, inputs, x,
            load=load,
        )  # fmt: skip
        seen = inputs.flatten(1)
        for block in head.blocks:
            linear(seen, block.up, out=inner)
            if block.down is None:
                silu_rows(inner, x, bias=block.bias, residual=x, load=load)
            else:
                silu_rows(inner, inner, load=load)
                linear(inner, block.down, residual=x, out=x)
            seen = x
        logits = self._logits[: rows * head.output.n].view(rows, -1)
        linear(x, head.output, out=logits)
        draft_tokens(
            logits, self._token_map, plan.row_of, plan.rank, memory.tokens, memory.chances,
            guesses=min(turn.guesses, MAX_GUESSES), nodes=turn.nodes, load=load,
        )  # fmt: skip


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
