"""Packed matrices ready to run: the configuration of each launch is chosen once, before anything is captured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.kernels.linear_config import LinearConfig, default_config, rows_measured
from engine.kernels.linear_inputs import Norm, Seen
from engine.kernels.small_batch_linear import LoadKernel, PackedLinear, Workspace, run_linear

__all__ = ["Choose", "LinearBank", "choose_default", "shape_key"]

Choose = Callable[[PackedLinear, int, Workspace], LinearConfig]  # (matrix, rows, scratch memory) -> how to launch


def choose_default(weight: PackedLinear, rows: int, workspace: Workspace) -> LinearConfig:
    """Choose without measuring."""
    return default_config(weight.n, weight.k, rows, weight.decode)


def shape_key(weight: PackedLinear, rows: int) -> tuple[int, ...]:
    """Name what matrices launched alike have in common; the number of rows comes last."""
    return weight.decode, weight.n, weight.k, weight.is_normed, rows_measured(rows)


class LinearBank:
    """Runs matrices on one stream. `prepare` must have seen a matrix and its number of rows before a capture does."""

    def __init__(self, device: torch.device | str, load: LoadKernel, choose: Choose) -> None:
        self._device, self._load, self.choose = device, load, choose
        self._workspace = Workspace(device)
        self._configs: dict[tuple[int, ...], LinearConfig] = {}

    def prepare(self, matrices: Sequence[PackedLinear], rows: int) -> None:
        """Choose how to run each of the matrices for so many rows, and make room for it."""
        for matrix in matrices:
            self.config(matrix, rows)

    def __call__(
        self,
        x: Tensor,
        weight: PackedLinear,
        *,
        out: Tensor,
        residual: Tensor | None = None,
        norm: Norm | None = None,
        seen: Seen | None = None,
        silu: bool = False,
        best: bool = False,
    ) -> Tensor:
        """Compute into `out`; see `run_linear`. What a launch can do besides is known by `config`."""
        config = self.config(weight, x.shape[0] if seen is None else len(seen.row_nodes))
        return run_linear(
            x,
            weight,
            config,
            self._workspace,
            residual=residual,
            norm=norm,
            seen=seen,
            silu=silu,
            best=best,
            out=out,
            load=self._load,
        )

    @contextmanager
    def trying(self, room: int) -> Iterator[Callable[[Mapping[tuple[int, ...], LinearConfig]], None]]:
        """Give a way to launch matrices otherwise for a while, by `shape_key`, with room for so many partial sums."""
        before, workspace = dict(self._configs), self._workspace
        self._workspace = Workspace(self._device)
        self._workspace.reserve(max(room, *(config.workspace_floats(key[1]) for key, config in before.items()), 0))
        try:
            yield self._configs.update
        finally:
            self._configs, self._workspace = before, workspace

    @property
    def num_bytes(self) -> int:
        return self._workspace.partial.nbytes + self._workspace.counters.nbytes

    def config(self, weight: PackedLinear, rows: int) -> LinearConfig:
        """Return how a matrix is launched for so many rows."""
        key = shape_key(weight, rows)
        if key not in self._configs:
            config = self.choose(weight, rows, Workspace(self._device))
            assert config.is_frugal(weight.n), f"{config} needs {config.workspace_floats(weight.n)} floats"
            self._workspace.reserve(config.workspace_floats(weight.n))
            self._configs[key] = config
        return self._configs[key]
