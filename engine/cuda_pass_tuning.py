"""Measure how a matrix is launched where it runs: in a pass through the model's own layers.

What a launch costs depends on those around it, beside which its weights are read ahead; and the layers are more than
the GPU's cache holds. So nothing is copied, and measuring takes no memory. Every candidate gives the same bits, so a
choice changes no text; one whose bits differ all the same is left out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.cuda_forward import Forward
from engine.cuda_linear import LinearBank, shape_key
from engine.cuda_memory import StepMemory
from engine.cuda_plan import TreePlan
from engine.kernels import fused_ops
from engine.kernels.fused_ops import LENGTH
from engine.kernels.linear_config import LinearConfig, default_config, rows_measured
from engine.kernels.small_batch_linear import PackedLinear, Workspace
from engine.kernels.tune_nf4 import (
    MeasuredConfigs,
    cache_bytes,
    choose_config,
    kept_configs,
    time_graph,
    usable_candidates,
)
from engine.tree import CandidateTree

__all__ = ["PassTuner"]

_CONTEXT = 256  # committed rows that attention reads in a measured pass
_PASS_CACHES = 1.5  # of the GPU's cache, at least, are read in a pass
_FINALISTS = 3  # of the candidates that are timed twice
_WARM_PASSES = 40  # for the clocks to rise

Launch = Callable[[], object]


class PassTuner:
    """A `Choose` for the matrices of a backbone; others are measured by themselves.

    `tries` and `time` are replaced in tests: the configurations worth trying, and the microseconds of a launch.
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
        time: Callable[[Launch], float] | None = None,
    ) -> None:
        self._forward, self._memory, self._linear = forward, memory, linear
        self._kept = kept or kept_configs()
        self._tries = tries
        self._time = time or (lambda launch: time_graph(lambda _: launch(), 1, repeats=5))
        self._matrices = {shape_key(matrix, 1)[:-1]: matrix for matrix in matrices}
        *in_layers, self._lm_head = matrices
        self._in_layers = list({shape_key(matrix, 1): matrix for matrix in in_layers}.values())
        self._is_warm = False
        self._layer_bytes = sum(matrix.num_bytes for matrix in in_layers) / forward.num_layers

    def __call__(self, weight: PackedLinear, rows: int, workspace: Workspace) -> LinearConfig:
        """Return the fastest known launch, measuring where nobody has yet."""
        rows = rows_measured(rows)
        if shape_key(weight, rows)[:-1] not in self._matrices:
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
        with self._untouched(), self._linear.trying(self._others(rows)):
            launch, result = self._pass(rows, is_head)
            with self._linear.trying({key: default}):
                launch()
                expected = result()
                if self._memory.device == "cuda" and not self._is_warm:
                    self._is_warm = True
                    for _ in range(_WARM_PASSES):
                        launch()

            def microseconds(config: LinearConfig) -> float:
                with self._linear.trying({key: config}):
                    return self._time(launch)

            def agrees(config: LinearConfig) -> bool:
                with self._linear.trying({key: config}):
                    launch()
                    return torch.equal(result(), expected)

            timed = sorted(((microseconds(config), config) for config in tries), key=_first)
            again = [(min(took, microseconds(config)), config) for took, config in timed[:_FINALISTS]]
            ordered = [config for _, config in [*sorted(again, key=_first), *timed[_FINALISTS:]]]
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
            forward.tree(plan, layers=layers)
            if is_head:
                keys[:] = [forward.best_of_tree(rows)]

        return launch, lambda: fused_ops.best_tokens(keys[0]) if is_head else memory.x[:rows].clone()

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Give the memory back what a step reads of it, and no more room for scores than it had."""
        memory = self._memory
        outbox, room = memory.outbox.clone(), memory.logits_room()
        memory.tokens.zero_()
        memory.record[LENGTH : LENGTH + 1].fill_(min(_CONTEXT, memory.capacity // 2))
        try:
            yield
        finally:
            memory.outbox.copy_(outbox)
            memory.use_logits_room(room)


def _first(pair: tuple[float, LinearConfig]) -> float:
    return pair[0]
