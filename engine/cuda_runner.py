"""A Runner on the CUDA kernels: prompts, trees and the whole decode step as captured launches over static buffers.

Every row has the same bits whatever stands beside it (see `engine.cuda_forward`), in all weight formats. `step` runs
draft, verify, accept and commit without the host, which reads one small record afterwards; the separate verbs of the
Runner contract use the same launches. Where heads have a prefix attention, prompts and the steps that draft run it too,
between the backbone and the acceptance, which moves the committed length.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.backbone import BackboneConfig
from engine.cuda_forward import CHUNKS, Forward
from engine.cuda_graphs import GraphCache
from engine.cuda_linear import Choose, LinearBank, choose_default
from engine.cuda_memory import MAX_ROWS, OUTBOX_SIZE, StepMemory
from engine.cuda_pass_tuning import PassTuner
from engine.cuda_plan import TreePlan, VerifiedNodes, copy_tables
from engine.cuda_prefix import PrefixLayer
from engine.cuda_step_parts import ChoosesTokens, LaunchesDrafts
from engine.cuda_tuning import compile_candidates
from engine.cuda_weights import PackedBackbone
from engine.errors import ContextLengthError
from engine.kernels import fused_ops
from engine.kernels.draft_prune import can_prune_unsettled
from engine.kernels.fused_ops import BONUS, NUM_ACCEPTED, OLD_LENGTH, PATH, StepRecord
from engine.kernels.nvrtc import load_kernel
from engine.kernels.small_batch_linear import LoadKernel
from engine.prefix_attention import PrefixAttention
from engine.pruned_tree import Tree
from engine.step_output import StepOutput
from engine.tree import CandidateTree

__all__ = ["WARM_ROWS", "CudaRunner"]

WARM_ROWS = (1, *CHUNKS)  # numbers of rows that every answer needs
_RESERVE = 512  # rows kept free beyond what is asked for, so that an answer rarely makes the cache grow


class CudaRunner:
    """See `engine.runner.Runner`. `load` and `choose` are replaced in tests, where a CPU plays the GPU."""

    max_tree_nodes = MAX_ROWS - 1

    def __init__(
        self,
        config: BackboneConfig,
        weights: PackedBackbone,
        *,
        device: str = "cuda",
        label: str,
        load: LoadKernel = load_kernel,
        choose: Choose = choose_default,
    ) -> None:
        self.config, self.device, self.weights = config, device, label
        self.load = load
        self.embedding = weights.embedding
        self.memory = StepMemory(config, weights.embedding.dtype, device)
        self.linear = LinearBank(device, load, choose)
        self.graphs = GraphCache(device)
        self._packed = weights
        self._forward = Forward(weights, self.memory, self.linear, config.rms_norm_eps, load)
        self._plans: dict[tuple[Tree, LaunchesDrafts | None], TreePlan] = {}
        self._verified: CandidateTree | None = None
        self._verified_for_heads = False
        self._length = self._prefixed = 0
        self._mailboxes = [_mailbox(device) for _ in range(2)]
        self._num_steps = 0

    # -- the Runner contract --

    @property
    def num_committed(self) -> int:
        return self._length

    @property
    def num_prefixed(self) -> int:
        return self._length if self._forward.prefix is None else self._prefixed

    @property
    def has_prefix(self) -> bool:
        """Whether a prefix attention is attached."""
        return self._forward.prefix is not None

    def attach(self, prefix: PrefixAttention) -> None:
        assert self._forward.prefix is None and self._length == 0, "attach once, before any text"
        layer = PrefixLayer(prefix, self.memory, self.linear, self.load)
        if isinstance(self.linear.choose, PassTuner):  # measuring would compile its candidates one by one
            compile_candidates([*layer.matrices, self._packed.lm_head], range(1, MAX_ROWS + 1))
        self._forward.prefix = layer
        self._plans.clear()  # so that what they need besides is prepared
        self.graphs.clear()
        self._verified, self._prefixed = None, 0

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        if not tokens:
            raise ValueError("A prompt of no tokens has no last hidden state; pass one token or more.")
        self._check_room(len(tokens))
        self._reserve(self._length + len(tokens) + MAX_ROWS + _RESERVE)
        self._load_chunk_kernels()
        ids = torch.tensor([*tokens, *[0] * MAX_ROWS], dtype=torch.int32).to(self.device)
        for start in range(0, len(tokens), MAX_ROWS):
            count = min(MAX_ROWS, len(tokens) - start)
            rows = next(size for size in CHUNKS if size >= count)
            self.memory.chunk_tokens[:rows].copy_(ids[start : start + rows])
            self.memory.span.fill_(self._length + rows)
            self.graphs.run(("chunk", rows), lambda rows=rows: self._forward.chunk(rows))
            self._advance(self._length + count, for_heads=True)
        hidden = self._forward.finish_chunk(count - 1)
        self.memory.set_length(self._length)
        return hidden

    def verify(self, tokens: Sequence[int], tree: CandidateTree, *, for_heads: bool = True) -> Tensor:
        if len(tokens) != tree.num_nodes:
            raise ValueError(f"{len(tokens)} tokens for a tree of {tree.num_nodes} nodes; pass one for each node.")
        self._check_room(tree.max_depth + 1)
        self._reserve(self._length + tree.max_depth + 1)
        self._prepare(tree.num_nodes, for_heads=for_heads)
        nodes = copy_tables(tree, self.memory)
        nodes.tokens.copy_(torch.tensor(tokens))
        self.set_root(tokens[0])
        key = "verify", tree.num_nodes, for_heads and self.has_prefix
        self.graphs.run(key, lambda: self._launch_verify(nodes, for_heads))
        self._verified, self._verified_for_heads = tree, for_heads
        return self.memory.hidden[: tree.num_nodes].clone()

    def heads_state(self) -> Tensor:
        return self.memory.state[0].clone()

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.cat([self._forward.score(rows.contiguous()).clone() for rows in hidden.split(MAX_ROWS)])

    def greedy(self, hidden: Tensor) -> list[int]:
        """Return each row's best token, the lowest id among equals, for hidden states [rows, hidden]."""
        found = []
        for rows in hidden.split(MAX_ROWS):
            keys = self._forward.best(self._forward.score(rows.contiguous()))
            found.append(fused_ops.best_tokens(keys))
        return torch.cat(found).tolist()

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens.to(self.device), self.embedding)

    def commit(self, path: Sequence[int]) -> None:
        if self._verified is None or list(path) != self._verified.path_to(path[-1]):
            raise ValueError(f"{list(path)} is not a path from the root of the last verified tree.")
        start = [self._length, self._length, len(path) - 1]
        assert (OLD_LENGTH, NUM_ACCEPTED) == (1, 2)
        self.memory.record[:3].copy_(torch.tensor(start, dtype=torch.int32))
        self.memory.record[PATH : PATH + len(path)].copy_(torch.tensor(path, dtype=torch.int32))
        self._launch_commit(self._verified.num_nodes, for_heads=self._verified_for_heads)
        self._verified = None
        self._advance(self._length + len(path), for_heads=self._verified_for_heads)
        self.memory.set_length(self._length)

    def truncate(self, length: int) -> None:
        self._length = min(self._length, length)
        self._prefixed = min(self._prefixed, length)
        self.memory.set_length(self._length)  # also where a step beyond the answer's end has moved it
        self._verified = None

    def committed_rows(self, layer: int) -> tuple[Tensor, Tensor]:
        rows = slice(0, self._length)
        return self.memory.cache_keys[layer, :, rows], self.memory.cache_values[layer, :, rows]

    def memory_bytes(self) -> int:
        return sum(self.memory_table().values())

    def memory_table(self) -> dict[str, int]:
        """Return the bytes of each part that this runner holds on the device."""
        prefix = self._forward.prefix
        return {
            "weights": self._packed.num_bytes + (prefix.weight_bytes if prefix else 0),
            "cache": self.memory.cache_bytes,
            "buffers": self.memory.work_bytes + self.linear.num_bytes + (prefix.work_bytes if prefix else 0),
            "graphs": self.graphs.num_bytes,
        }

    def measure_in_passes(self) -> None:
        """Choose the launches of matrices, from now on, by what a pass through the layers takes with them."""
        self.linear.choose = PassTuner(self._forward, self.memory, self.linear, self._packed.matrices)

    def warm_up(self) -> None:
        """Choose and load what every answer needs. Raises KernelCompileError where this machine cannot run it."""
        self.prefill([0])
        self.truncate(0)
        self.plan(CandidateTree(()), None)

    # -- the captured step --

    def set_root(self, token: int) -> None:
        """Make a token the next tree's root."""
        self.memory.record[BONUS : BONUS + 1].fill_(token)

    def plan(self, tree: Tree, drafter: LaunchesDrafts | None) -> TreePlan:
        """Return the tables of a tree, with every launch that they need prepared."""
        key = (tree, drafter)
        if key not in self._plans:
            if tree.filled.num_nodes > MAX_ROWS:
                raise ValueError(
                    f"A tree of {tree.filled.num_nodes} nodes; a step on this device has up to {MAX_ROWS}."
                )
            self._plans[key] = TreePlan(tree, self.memory, sees_path=drafter is not None and drafter.sees_path)
            self._prepare(tree.num_nodes, for_heads=drafter is not None)
            if drafter is not None:
                drafter.prepare(self._plans[key])
        return self._plans[key]

    def step(
        self,
        tree: Tree,
        drafter: LaunchesDrafts | None,
        *,
        longest: int,
        chooser: ChoosesTokens | None = None,
    ) -> StepOutput:
        """Queue one step from the memory's root and what heads read behind it; nothing waits.

        Without a `chooser` it is greedy; without a drafter no heads can read behind it (see `num_prefixed`).
        `longest` is the most committed rows that there may be before it, counting steps that are still under way.
        """
        self._reserve(longest + tree.max_depth + 1)
        plan = self.plan(tree, drafter)
        key = ("step", tree, drafter) if chooser is None else ("step", tree, drafter, chooser, chooser.kind)
        self.graphs.run(key, lambda: self._launch_step(plan, drafter, chooser))
        return self._post(tree, for_heads=drafter is not None)

    def forget_steps(self) -> None:
        """Give back the memory of captured steps; those that are run again are captured again."""
        self.graphs.forget(lambda key: isinstance(key, tuple) and key[0] == "step")

    def arrived(self, record: StepRecord, *, for_heads: bool) -> None:
        """Take note of a step that has been waited for, and whether it was one `for_heads`, with a drafter."""
        self._advance(record.length, for_heads=for_heads)

    def _launch_step(
        self, plan: TreePlan, drafter: LaunchesDrafts | None, chooser: ChoosesTokens | None = None
    ) -> None:
        memory, nodes = self.memory, plan.verified
        rows = nodes.num_nodes
        unsettled = drafter.launch(plan) if drafter is not None and plan.rounds else None
        if drafter is not None and unsettled is not None and plan.kept and not can_prune_unsettled(unsettled):
            drafter.settle(unsettled)
            unsettled = None
        for_heads = drafter is not None
        self._forward.tree(nodes, unsettled, pruned=plan if plan.kept else None, for_heads=for_heads)
        scores = self._forward.best_of_tree(rows) if chooser is None else self._forward.score_tree(rows)
        if for_heads:
            self._forward.prefix_of_tree(nodes)  # before the length moves
        keys = scores if chooser is None else chooser.launch(scores, nodes)
        fused_ops.accept_greedy(keys, nodes.tokens, nodes.parents, memory.record, table=self.embedding, load=self.load)
        if chooser is not None:
            chooser.note_accepted()
        self._launch_commit(rows, for_heads=for_heads)

    def _launch_verify(self, nodes: VerifiedNodes, for_heads: bool) -> None:
        self._forward.tree(nodes, for_heads=for_heads)
        self._forward.finish_tree(nodes.num_nodes)
        if for_heads:
            self._forward.prefix_of_tree(nodes)

    def _launch_commit(self, rows: int, *, for_heads: bool) -> None:
        memory = self.memory
        layers = memory.num_layers if for_heads else self.config.num_layers
        keys, values = (part[:layers] for part in memory.scratch(rows))
        cache, hidden = (memory.cache_keys, memory.cache_values), self._forward.states(rows, for_heads=for_heads)
        fused_ops.commit_path(keys, values, *cache, memory.record, hidden=hidden, state=memory.state, load=self.load)

    def _advance(self, length: int, *, for_heads: bool) -> None:
        """Note the committed length; the prefix attention has seen the new rows only behind no others that it lacks."""
        if for_heads and self._prefixed == self._length:
            self._prefixed = length
        self._length = length

    def _post(self, tree: Tree, *, for_heads: bool) -> StepOutput:
        """Send the outbox to the host, to one of two places by turns: one step may run while another is read."""
        numbers, arrived = self._mailboxes[self._num_steps % 2]
        self._num_steps += 1
        numbers.copy_(self.memory.outbox, non_blocking=True)
        if arrived is not None:
            arrived.record()
        return StepOutput(numbers, arrived, tree, for_heads=for_heads)

    def _reserve(self, rows: int) -> None:
        if self.memory.grow(rows):
            self.graphs.clear()

    def _prepare(self, rows: int, *, for_heads: bool) -> None:
        self.linear.prepare(self._packed.matrices, rows)
        if for_heads and self._forward.prefix is not None:
            self._forward.prefix.prepare(rows)

    def _load_chunk_kernels(self) -> None:
        for rows in CHUNKS:
            self.linear.prepare(self._packed.matrices[:-1], rows)
            if self._forward.prefix is not None:
                self._forward.prefix.prepare(rows)
        self.linear.prepare(self._packed.matrices[-1:], 1)

    def _check_room(self, count: int) -> None:
        limit = self.config.max_positions
        if self._length + count > limit:
            raise ContextLengthError(
                f"{self._length} tokens and {count} more do not fit the model's {limit} positions."
            )


def _mailbox(device: str) -> tuple[Tensor, torch.cuda.Event | None]:
    if device != "cuda":
        return torch.zeros(OUTBOX_SIZE, dtype=torch.int32), None
    return torch.zeros(OUTBOX_SIZE, dtype=torch.int32, pin_memory=True), torch.cuda.Event()
