"""A Runner on the CUDA kernels: prompts, trees and the whole decode step as captured launches over static buffers.

Every row has the same bits whatever stands beside it (see `engine.cuda_forward`), in all weight formats. `step` runs
draft, verify, accept and commit without the host, which reads one small record afterwards; the separate verbs of the
Runner contract use the same launches.
"""

from collections.abc import Hashable, Sequence
from typing import Protocol

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
from engine.cuda_weights import PackedBackbone
from engine.errors import ContextLengthError
from engine.kernels import fused_ops
from engine.kernels.draft_guesses import Unsettled
from engine.kernels.draft_prune import can_prune_unsettled
from engine.kernels.fused_ops import BONUS, NUM_ACCEPTED, OLD_LENGTH, PATH, StepRecord
from engine.kernels.nvrtc import load_kernel
from engine.kernels.small_batch_linear import LoadKernel
from engine.pruned_tree import Tree
from engine.step_output import StepOutput
from engine.tree import CandidateTree

__all__ = ["WARM_ROWS", "CudaRunner"]

WARM_ROWS = (1, *CHUNKS)  # numbers of rows that every answer needs
_RESERVE = 512  # rows kept free beyond what is asked for, so that an answer rarely makes the cache grow


class LaunchesDrafts(Protocol):
    """A drafter that fills the memory's tokens by launches alone; it may leave the last guesses unsettled."""

    sees_path: bool

    def launch(self, plan: TreePlan) -> Unsettled | None: ...

    def settle(self, unsettled: Unsettled) -> None: ...

    def prepare(self, plan: TreePlan) -> None: ...


class ChoosesTokens(Protocol):
    """Chooses the token to follow at every node by launches alone; `kind` says which launches."""

    @property
    def kind(self) -> Hashable: ...

    def launch(self, logits: Tensor, nodes: VerifiedNodes) -> Tensor: ...

    def note_accepted(self) -> None: ...


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
        self._length = 0
        self._mailboxes = [_mailbox(device) for _ in range(2)]
        self._num_steps = 0

    # -- the Runner contract --

    @property
    def num_committed(self) -> int:
        return self._length

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
            self._length += count
        self._forward.finish_chunk(count - 1)
        self.memory.set_length(self._length)
        return self.memory.state[0].clone()

    def verify(self, tokens: Sequence[int], tree: CandidateTree) -> Tensor:
        if len(tokens) != tree.num_nodes:
            raise ValueError(f"{len(tokens)} tokens for a tree of {tree.num_nodes} nodes; pass one for each node.")
        self._check_room(tree.max_depth + 1)
        self._reserve(self._length + tree.max_depth + 1)
        self.linear.prepare(self._packed.matrices, tree.num_nodes)
        nodes = copy_tables(tree, self.memory)
        nodes.tokens.copy_(torch.tensor(tokens))
        self.set_root(tokens[0])
        self.graphs.run(("verify", tree.num_nodes), lambda: self._launch_verify(nodes))
        self._verified = tree
        return self.memory.hidden[: tree.num_nodes].clone()

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
        self._launch_commit(self._verified.num_nodes)
        self._verified = None
        self._length += len(path)
        self.memory.set_length(self._length)

    def truncate(self, length: int) -> None:
        self._length = min(self._length, length)
        self.memory.set_length(self._length)  # also where a step beyond the answer's end has moved it
        self._verified = None

    def committed_rows(self, layer: int) -> tuple[Tensor, Tensor]:
        rows = slice(0, self._length)
        return self.memory.cache_keys[layer, :, rows], self.memory.cache_values[layer, :, rows]

    def memory_bytes(self) -> int:
        return sum(self.memory_table().values())

    def memory_table(self) -> dict[str, int]:
        """Return the bytes of each part that this runner holds on the device."""
        return {
            "weights": self._packed.num_bytes,
            "cache": self.memory.cache_bytes,
            "buffers": self.memory.work_bytes + self.linear.num_bytes,
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
            self.linear.prepare(self._packed.matrices, tree.num_nodes)
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
        """Queue one step from the memory's root and hidden state; nothing waits. Without a `chooser` it is greedy.

        `longest` is the most committed rows that there may be before it, counting steps that are still under way.
        """
        self._reserve(longest + tree.max_depth + 1)
        plan = self.plan(tree, drafter)
        key = ("step", tree, drafter) if chooser is None else ("step", tree, drafter, chooser, chooser.kind)
        self.graphs.run(key, lambda: self._launch_step(plan, drafter, chooser))
        return self._post(tree)

    def forget_steps(self) -> None:
        """Give back the memory of captured steps; those that are run again are captured again."""
        self.graphs.forget(lambda key: isinstance(key, tuple) and key[0] == "step")

    def arrived(self, record: StepRecord) -> None:
        """Take note of a step that has been waited for."""
        self._length = record.length

    def _launch_step(
        self, plan: TreePlan, drafter: LaunchesDrafts | None, chooser: ChoosesTokens | None = None
    ) -> None:
        memory, nodes = self.memory, plan.verified
        rows = nodes.num_nodes
        unsettled = drafter.launch(plan) if drafter is not None and plan.rounds else None
        if drafter is not None and unsettled is not None and plan.kept and not can_prune_unsettled(unsettled):
            drafter.settle(unsettled)
            unsettled = None
        self._forward.tree(nodes, unsettled, pruned=plan if plan.kept else None)
        if chooser is None:
            keys = self._forward.best_of_tree(rows)
        else:
            keys = chooser.launch(self._forward.score_tree(rows), nodes)
        fused_ops.accept_greedy(keys, nodes.tokens, nodes.parents, memory.record, table=self.embedding, load=self.load)
        if chooser is not None:
            chooser.note_accepted()
        self._launch_commit(rows)

    def _launch_verify(self, nodes: VerifiedNodes) -> None:
        self._forward.tree(nodes)
        self._forward.finish_tree(nodes.num_nodes)

    def _launch_commit(self, rows: int) -> None:
        memory = self.memory
        cache = memory.cache_keys, memory.cache_values
        hidden = memory.hidden[:rows]
        fused_ops.commit_path(
            *memory.scratch(rows), *cache, memory.record, hidden=hidden, state=memory.state, load=self.load
        )

    def _post(self, tree: Tree) -> StepOutput:
        """Send the outbox to the host, to one of two places by turns: one step may run while another is read."""
        numbers, arrived = self._mailboxes[self._num_steps % 2]
        self._num_steps += 1
        numbers.copy_(self.memory.outbox, non_blocking=True)
        if arrived is not None:
            arrived.record()
        return StepOutput(numbers, arrived, tree)

    def _reserve(self, rows: int) -> None:
        if self.memory.grow(rows):
            self.graphs.clear()

    def _load_chunk_kernels(self) -> None:
        for rows in CHUNKS:
            self.linear.prepare(self._packed.matrices[:-1], rows)
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
