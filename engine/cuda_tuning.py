"""How matrices are launched on this GPU: measured once for a shape and a number of rows, and remembered on disk."""

from collections.abc import Sequence

from engine.kernels.linear_config import default_config, rows_measured
from engine.kernels.nvrtc import compile_ahead
from engine.kernels.small_batch_linear import PackedLinear
from engine.kernels.tune_nf4 import candidates, kernel_of

__all__ = ["compile_candidates"]


def compile_candidates(matrices: Sequence[PackedLinear], rows: Sequence[int]) -> None:
    """Compile on all cores what measuring a backbone's matrices, `lm_head` last, would compile one by one."""
    jobs = {}
    for count in {rows_measured(count) for count in rows}:
        for matrix in matrices:
            default = default_config(matrix.n, matrix.k, count, matrix.decode)
            for config in (default, *candidates(matrix.decode, count, matrix.n, matrix.k)):
                source, _, defines, _ = kernel_of(config, matrix, is_head=matrix is matrices[-1])
                jobs[source, defines] = None
    compile_ahead(jobs)
