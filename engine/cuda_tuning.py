"""How matrices are launched on this GPU: measured once for a shape and a number of rows, and remembered on disk."""

from collections.abc import Sequence

from engine.kernels.linear_config import rows_measured
from engine.kernels.nvrtc import compile_ahead
from engine.kernels.small_batch_linear import PackedLinear
from engine.kernels.tune_nf4 import candidates

__all__ = ["compile_candidates"]


def compile_candidates(matrices: Sequence[PackedLinear], rows: Sequence[int]) -> None:
    """Compile on all cores what measuring these matrices would compile one by one."""
    jobs = {}
    for count in {rows_measured(count) for count in rows}:
        for matrix in matrices:
            for config in candidates(matrix.decode, count, matrix.n, matrix.k):
                norm = matrix.is_normed and config.can_normalize(matrix.k)
                source, _, defines, _ = config.kernel(matrix.k, matrix.dtype, norm=norm)
                jobs[source, defines] = None
    compile_ahead(jobs)
