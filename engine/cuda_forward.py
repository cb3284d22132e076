"""The launches of one pass through a backbone's layers, over static buffers: a tree's nodes, or a chunk of a prompt.

Both use the same kernels, whose rows do not depend on their neighbours, so a token has the same bits as a prompt's
token, as a plainly decoded one and as a node of any tree. Nothing here allocates or waits: it can be captured.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.cuda_linear import LinearBank
from engine.cuda_memory import StepMemory
from engine.cuda_plan import TreePlan, VerifiedNodes
from engine.cuda_prefix import PrefixLayer
from engine.cuda_weights import PackedBackbone
from engine.kernels import fused_ops
from engine.kernels.draft_guesses import Unsettled, embed_guessed
from engine.kernels.draft_prune import embed_likeliest
from engine.kernels.linear_config import MAX_PLACES
from engine.kernels.linear_inputs import Norm
from engine.kernels.small_batch_linear import LoadKernel, PackedLinear
from engine.kernels.tree_attention import tree_attention

__all__ = ["CHUNKS", "Forward"]

CHUNKS = (16, 64)  # rows of a prompt at a time: the last piece is filled up to one of these
Attend = Callable[[int, Tensor], None]  # (layer, qkv of the rows): the answer goes to the memory's `attended`


class Forward:
    """One backbone's passes, and those of the heads' `prefix` attention; results lie in the memory."""

    def __init__(
        self, weights: PackedBackbone, memory: StepMemory, linear: LinearBank, eps: float, load: LoadKernel
    ) -> None:
        self._weights, self._memory, self._linear = weights, memory, linear
        self._eps, self._load = eps, load
        self.prefix: PrefixLayer | None = None
        self._chunk_depths = {
            rows: torch.arange(-rows, 0, dtype=torch.int32).to(memory.device) for rows in CHUNKS
        }  # counted back from the chunk's end: all its keys are in the cache by then

    @property
    def num_layers(self) -> int:
        return len(self._weights.layers)

    def tree(
        self,
        nodes: VerifiedNodes,
        unsettled: Unsettled | None = None,
        *,
        pruned: TreePlan | None = None,
        layers: int | None = None,
        for_heads: bool = False,
    ) -> None:
        """Run a tree's nodes after the committed text, up to the last norm; the root is the record's bonus token.

        The tree's last guesses may be `unsettled`; they are not afterwards. Of a `pruned` tree the nodes are found
        first. `layers` stops behind so many of them, for measurements. With `for_heads` what `prefix_of_tree` reads of
        the middle layers is kept.
        """
        memory, rows = self._memory, nodes.num_nodes
        table, x = self._weights.embedding, memory.x[:rows]
        if pruned is not None and pruned.kept is not None:
            filled, kept, shape = pruned.filled, pruned.kept, (pruned.depth, pruned.ancestor_at)
            embed_likeliest(filled, *shape, kept, table, memory.record, x, unsettled=unsettled, load=self._load)
        elif unsettled is None:
            fused_ops.embed_tokens(nodes.tokens, table, memory.record, x, load=self._load)
        else:
            embed_guessed(unsettled, table, memory.record, x, load=self._load)
        self._layers(rows, self._attend_in_tree(nodes), layers, for_heads=for_heads)

    def prefix_of_tree(self, nodes: VerifiedNodes) -> None:
        """Run the prefix attention, if there is one, over a finished tree that was run `for_heads`."""
        if self.prefix is not None:
            self.prefix.launch(nodes.num_nodes, self._attend_in_tree(nodes))

    def states(self, rows: int, *, for_heads: bool) -> Tensor:
        """Return where the hidden states of a pass lie [rows, hidden], or what heads read behind its rows."""
        source = self._memory.hidden if self.prefix is None or not for_heads else self.prefix.states
        return source[:rows]

    def read_embedding(self) -> None:
        """Have the GPU's cache hold the embeddings instead of anything else, as far as they are large enough."""
        self._weights.embedding.sum()

    def finish_tree(self, rows: int) -> None:
        """Put the hidden states of a tree's nodes, or a chunk's rows, where all else reads them."""
        self._norm(self._memory.x[:rows], self._weights.norm, self._memory.hidden[:rows])

    def score_tree(self, rows: int) -> Tensor:
        """Finish the tree and return its nodes' logits, the memory's own."""
        out = self._memory.logits(rows)
        return self._finish_with(rows, self._weights.lm_head, out, best=False)

    def best_of_tree(self, rows: int) -> Tensor:
        """Finish the tree and return its nodes' keys for `accept_greedy`; logits are made where a launch needs them."""
        lm_head = self._weights.lm_head
        config = self._linear.config(lm_head, rows)
        if config.resident and config.num_places(lm_head.n) <= MAX_PLACES:
            keys = self._memory.keys_of_best(rows, config.num_places(lm_head.n))
            return self._finish_with(rows, lm_head, keys, best=True)
        return self.best(self.score_tree(rows))

    def best(self, logits: Tensor) -> Tensor:
        """Return the keys of logits [rows, vocab]."""
        keys = self._memory.keys_of_best(len(logits), -(-logits.shape[1] // fused_ops.ARGMAX_CHUNK))
        return fused_ops.argmax_keys(logits, out=keys, load=self._load)

    def chunk(self, rows: int) -> None:
        """Run `rows` tokens of a prompt, which end before row `span` of the text; `x` gets what leaves the layers.

        The prefix attention, if there is one, needs them all finished, as their keys are for those that follow.
        """
        memory, attend = self._memory, self._attend_in_chunk(rows)
        fused_ops.embed_tokens(
            memory.chunk_tokens[:rows], self._weights.embedding, None, memory.x[:rows], load=self._load
        )
        self._layers(rows, attend, for_heads=True)
        if self.prefix is not None:
            self.finish_tree(rows)
            self.prefix.launch(rows, attend)

    def finish_chunk(self, row: int) -> Tensor:
        """Return the hidden state of a chunk's row, [hidden]; what heads read behind it goes to the memory's state."""
        memory = self._memory
        if self.prefix is None:
            self._norm(memory.x[row : row + 1], self._weights.norm, memory.state)
            return memory.state[0].clone()
        memory.state.copy_(self.prefix.states[row : row + 1])
        return memory.hidden[row].clone()

    def score(self, hidden: Tensor) -> Tensor:
        """Apply `lm_head` to [rows, hidden] of at most 64 rows; returns the memory's logits of them."""
        return self._linear(hidden, self._weights.lm_head, out=self._memory.logits(len(hidden)))

    def _finish_with(self, rows: int, lm_head: PackedLinear, out: Tensor, *, best: bool) -> Tensor:
        memory = self._memory
        if self._linear.config(lm_head, rows).can_normalize(lm_head.k):
            norm = Norm(self._weights.norm, self._eps, memory.hidden[:rows])
            return self._linear(memory.x[:rows], lm_head, norm=norm, best=best, out=out)
        self.finish_tree(rows)
        return self._linear(memory.hidden[:rows], lm_head, best=best, out=out)

    def _layers(self, rows: int, attend: Attend, count: int | None = None, *, for_heads: bool) -> None:
        memory, linear = self._memory, self._linear
        x, attended = memory.x[:rows], memory.attended[:rows].flatten(1)
        kept = self.prefix.middle if self.prefix is not None and for_heads else {}
        left = x
        for index, layer in enumerate(self._weights.layers[:count]):
            attend(index, self._normed(left, layer.attention_norm, layer.qkv, memory.qkv[:rows]))
            linear(attended, layer.attention_output, residual=left, out=x)
            inner = self._normed(x, layer.mlp_norm, layer.gate_up, memory.inner[:rows])
            left = kept.get(index, memory.x)[:rows]  # where what leaves the layer stays takes no launch of its own
            linear(inner, layer.down, residual=x, out=left)

    def _normed(self, x: Tensor, norm: Tensor, matrix: PackedLinear, out: Tensor) -> Tensor:
        """Norm and matrix, in one launch where the matrix's own can do both: the bits are the same."""
        if self._linear.config(matrix, len(x)).can_normalize(matrix.k):
            return self._linear(x, matrix, norm=Norm(norm, self._eps), out=out)
        normed = self._memory.normed[: len(x)]
        self._norm(x, norm, normed)
        return self._linear(normed, matrix, out=out)

    def _attend_in_tree(self, nodes: VerifiedNodes) -> Attend:
        memory = self._memory
        keys, values = memory.scratch(nodes.num_nodes)

        def attend(layer: int, qkv: Tensor) -> None:
            cache = memory.cache_keys[layer], memory.cache_values[layer]
            self._attend(qkv, memory.record, nodes.depth, nodes.ancestor_at, cache, (keys[layer], values[layer]))

        return attend

    def _attend_in_chunk(self, rows: int) -> Attend:
        memory, depth = self._memory, self._chunk_depths[rows]

        def attend(layer: int, qkv: Tensor) -> None:
            cache = memory.cache_keys[layer], memory.cache_values[layer]
            fused_ops.rotate_into_cache(qkv, memory.angles, memory.span, depth, *cache, load=self._load)
            self._attend(qkv, memory.span, depth, None, cache, None)

        return attend

    def _attend(
        self,
        qkv: Tensor,
        length: Tensor,
        depth: Tensor,
        ancestor_at: Tensor | None,
        cache: tuple[Tensor, Tensor],
        scratch: tuple[Tensor, Tensor] | None,
    ) -> None:
        memory = self._memory
        tree_attention(
            *(qkv, memory.angles, length, depth, ancestor_at, *cache, scratch, memory.attention),
            out=memory.attended[: len(qkv)],
            load=self._load,
        )

    def _norm(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        fused_ops.rms_norm(x, weight, self._eps, out=out, load=self._load)
