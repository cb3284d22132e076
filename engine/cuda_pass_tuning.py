"""Measure how a matrix is launched where it runs: in a pass through the model's own layers.

What a launch costs depends on those around it, beside which its weights are read ahead; and the layers are more than
the GPU's cache holds. So nothing is copied, and measuring takes no memory. Every candidate gives the same bits, so a
choice changes no text; one whose bits differ all the same is left out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median

import torch
from torch import Tensor

from engine.cuda_forward import Forward
from engine.cuda_linear import LinearBank, shape_key
from engine.cuda_memory import StepMemory
from engine.cuda_plan import TreePlan
from engine.kernels.fused_ops import LENGTH
from engine.kernels.linear_config import LinearConfig, default_config, rows_measured
from engine.kernels.measured_configs import MeasuredConfigs, choose_config, kept_configs
from engine.kernels.small_batch_linear import PackedLinear, Workspace
from engine.kernels.tune_nf4 import cache_bytes, usable_candidates
from engine.tree import CandidateTree

__all__ = ["Launch", "PassTuner", "time_by_turns"]

_CONTEXT = 256  # committed rows that attention reads in a measured pass
_PASS_CACHES = 1.5  # of the GPU's cache, at least, are read in a pass
_WARM_ROUNDS, _ROUNDS = 3, 15  # of replays; in the first the clocks rise

Launch = Callable[[], object]


class PassTuner:
    """A `Choose` for the matrices of a backbone; others are measured by themselves.

    `tries` and `time` are replaced in tests: the configurations worth trying, and the microseconds of launches.
    """

    def __init__(
        self,
        forward: Forward,
        memory: StepMemory,
        linear: LinearBank,
        matrices: Sequence[PackedLinear],
        *,
        kept: MeasuredConfigs | None = None,
        tries: Callable[[PackedLinear, int], list[LinearConfig]] | None = None,
        time: Callable[[Sequence[Launch]], list[float]] | None = None,
    ) -> None:
        self._forward, self._memory, self._linear = forward, memory, linear
        self._kept = kept or kept_configs()
        self._tries = tries
        self._time = time or time_by_turns
        self._shapes = {shape_key(matrix, 1)[:-1] for matrix in matrices}
        *in_layers, self._lm_head = matrices
        self._in_layers = list({shape_key(matrix, 1): matrix for matrix in in_layers}.values())
        self._layer_bytes = sum(matrix.num_bytes for matrix in in_layers) / forward.num_layers

    def __call__(self, weight: PackedLinear, rows: int, workspace: Workspace) -> LinearConfig:
        """Return the fastest known launch, measuring where nobody has yet."""
        rows = rows_measured(rows)
        if shape_key(weight, rows)[:-1] not in self._shapes:
            return choose_config(weight, rows, workspace, self._forward.read_embedding)
        found = self._kept.get(weight, rows)
        if found is None:
            found = self._measure(weight, rows)
            self._kept.put(weight, rows, found)
        return found

    def _measure(self, weight: PackedLinear, rows: int) -> LinearConfig:
        key = shape_key(weight, rows)
        is_head = key == shape_key(self._lm_head, rows)
        tries = self._tries(weight, rows) if self._tries else usable_candidates(weight, rows, is_head=is_head)
        default = default_config(weight.n, weight.k, rows, weight.decode)
        default = default if default.is_frugal(weight.n) else tries[0]
        others = self._others(rows)
        used = [*others.items(), *((key, config) for config in (default, *tries))]
        room = max(config.workspace_floats(n) for (_, n, *_), config in used)
        with self._untouched(), self._linear.trying(room) as use:
            use(others)
            launch, result = self._pass(rows, is_head)

            def run(config: LinearConfig) -> None:
                use({key: config})
                launch()

            def agrees(config: LinearConfig) -> bool:
                run(config)
                return torch.equal(result(), expected)

            run(default)
            expected = result()
            times = self._time([partial(run, config) for config in tries])
            ordered = [config for _, config in sorted(zip(times, tries, strict=True), key=lambda pair: pair[0])]
            return next((config for config in ordered if agrees(config)), default)

    def _others(self, rows: int) -> dict[tuple[int, ...], LinearConfig]:
        """Return launches for the layers' matrices: those known, or ones that suit."""
        return {
            shape_key(matrix, rows): self._kept.get(matrix, rows)
            or default_config(matrix.n, matrix.k, rows, matrix.decode)
            for matrix in self._in_layers
        }

    def _pass(self, rows: int, is_head: bool) -> tuple[Launch, Callable[[], Tensor]]:
        """Return what launches a pass of so many rows, and what gives its results."""
        forward, memory = self._forward, self._memory
        plan = TreePlan(CandidateTree(tuple((rank,) for rank in range(rows - 1))), memory, sees_path=False)
        layers = forward.num_layers
        if memory.device == "cuda":
            layers = min(layers, math.ceil(_PASS_CACHES * cache_bytes() / self._layer_bytes))
        keys: list[Tensor] = []

        def launch() -> None:
            forward.tree(plan.verified, layers=layers)
            if is_head:
                keys[:] = [forward.best_of_tree(rows)]

        def result() -> Tensor:  # a key holds a score's bits and its token
            return (keys[0] ^ torch.iinfo(torch.int64).min).amax(1) if is_head else memory.x[:rows].clone()

        return launch, result

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Give the memory back what a step reads of it, and no more room for scores than it had."""
        memory = self._memory
        outbox, room = memory.outbox.clone(), memory.logits_room()
        memory.tokens.copy_(torch.arange(len(memory.tokens)) * 97 % memory.config.vocab_size)  # no two rows alike
        memory.record[LENGTH : LENGTH + 1].fill_(min(_CONTEXT, memory.capacity // 2))
        try:
            yield
        finally:
            memory.outbox.copy_(outbox)
            memory.use_logits_room(room)


def time_by_turns(launches: Sequence[Launch]) -> list[float]:
    """Return the microseconds of each of these: captured once, replayed one after the other, medians of the rounds.

    So the GPU has no time to rest between them, and what changes with time changes for all.
    """
    graphs = [_captured(launch) for launch in launches]
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(_WARM_ROUNDS + _ROUNDS):
        events = []
        for graph in graphs:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        for row, (start, end) in zip(times, events, strict=True):
            row.append(1e3 * start.elapsed_time(end))
    return [median(row[_WARM_ROUNDS:]) for row in times]


def _captured(launch: Launch) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch()  # which loads its kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph
