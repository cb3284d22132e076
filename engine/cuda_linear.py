"""Packed matrices ready to run: the configuration of each launch is chosen once, before anything is captured."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.kernels.small_batch_linear import (
    LinearConfig,
    LoadKernel,
    PackedLinear,
    Workspace,
    default_config,
    rows_measured,
    run_linear,
)

__all__ = ["Choose", "LinearBank", "choose_default"]

Choose = Callable[[PackedLinear, int, Workspace], LinearConfig]  # (matrix, rows, scratch memory) -> how to launch


def choose_default(weight: PackedLinear, rows: int, workspace: Workspace) -> LinearConfig:
    """Choose without measuring."""
    return default_config(weight.n, weight.k, rows, weight.decode)


class LinearBank:
    """Runs matrices on one stream. `prepare` must have seen a matrix and its number of rows before a capture does."""

    def __init__(self, device: torch.device | str, load: LoadKernel, choose: Choose) -> None:
        self._device, self._load, self._choose = device, load, choose
        self._workspace = Workspace(device)
        self._outgrown: list[Tensor] = []  # captured graphs still write there
        self._configs: dict[tuple[int, ...], LinearConfig] = {}

    def prepare(self, matrices: Sequence[PackedLinear], rows: int) -> None:
        """Choose how to run each of the matrices for so many rows, and make room for it."""
        for matrix in matrices:
            self._config(matrix, rows)

    def __call__(
        self,
        x: Tensor,
        weight: PackedLinear,
        *,
        out: Tensor,
        residual: Tensor | None = None,
        norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """Compute into `out`; see `run_linear`. `norm` is for matrices and rows that `normalizes` says yes to."""
        return run_linear(
            x,
            weight,
            self._config(weight, x.shape[0]),
            self._workspace,
            residual=residual,
            norm=norm,
            eps=eps,
            out=out,
            load=self._load,
        )

    def normalizes(self, weight: PackedLinear, rows: int) -> bool:
        """Say whether this matrix's launch for so many rows can normalise them itself."""
        return self._config(weight, rows).can_normalize(weight.k)

    @property
    def num_bytes(self) -> int:
        held = [self._workspace.partial, self._workspace.counters, *self._outgrown]
        return sum(tensor.nbytes for tensor in held)

    def _config(self, weight: PackedLinear, rows: int) -> LinearConfig:
        key = (weight.decode, weight.n, weight.k, rows_measured(rows))
        if key not in self._configs:
            config = self._choose(weight, rows, Workspace(self._device))
            self._reserve(config.workspace_floats(weight.n))
            self._configs[key] = config
        return self._configs[key]

    def _reserve(self, num_floats: int) -> None:
        before = self._workspace.partial
        self._workspace.reserve(num_floats)
        if self._workspace.partial is not before:
            self._outgrown.append(before)
