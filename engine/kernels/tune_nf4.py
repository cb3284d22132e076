"""Measure which configuration of the linear is fastest on this GPU, per matrix and number of tokens.

Every candidate gives the same bits, so a choice made on one machine, or made anew, changes no text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from engine.kernels import fused_ops
from engine.kernels.linear_config import (
    MAX_PLACES,
    MAX_RESIDENT,
    Decode,
    LinearConfig,
    default_config,
    token_tiles_for,
)
from engine.kernels.linear_inputs import Norm
from engine.kernels.nvrtc import Defines, load_kernel, multiprocessors, shared_memory_limit
from engine.kernels.small_batch_linear import PackedLinear, Workspace, run_linear

__all__ = ["cache_bytes", "candidates", "kernel_of", "time_graph", "tune", "usable_candidates"]

# (row_tiles, row_warps, slice_warps, depth, min_blocks) by token tiles
CUTS: dict[int, list[tuple[int, int, int, int, int]]] = {
    1: [
        *((1, 1, 8, 4, 2), (1, 1, 8, 4, 3), (1, 1, 8, 4, 4), (1, 1, 8, 8, 2), (2, 1, 8, 2, 2), (2, 1, 8, 4, 1)),
        *((2, 1, 8, 4, 2), (1, 2, 4, 4, 2), (1, 2, 4, 4, 4), (2, 2, 4, 4, 1), (2, 2, 4, 4, 2), (1, 4, 2, 4, 2)),
        *((2, 4, 2, 4, 2), (2, 4, 2, 2, 2), (1, 2, 8, 4, 1), (1, 2, 8, 2, 2)),
    ],
    2: [
        *((1, 1, 8, 2, 2), (1, 1, 8, 4, 1), (2, 1, 8, 2, 1), (2, 1, 8, 2, 2), (1, 2, 4, 4, 2), (2, 2, 4, 4, 1)),
        *((2, 2, 4, 2, 2), (2, 2, 4, 4, 2), (2, 4, 2, 4, 1), (2, 4, 2, 4, 2), (1, 4, 2, 4, 2), (1, 2, 8, 2, 1)),
    ],
    4: [
        *((2, 4, 2, 4, 1), (2, 4, 2, 2, 1), (2, 2, 4, 2, 1), (1, 4, 2, 4, 2), (1, 2, 4, 2, 2), (2, 2, 2, 4, 2)),
        *((2, 4, 1, 4, 2), (1, 8, 1, 4, 2), (1, 8, 2, 2, 1), (1, 4, 4, 2, 1), (1, 1, 8, 1, 2), (2, 2, 4, 1, 1)),
    ],
    8: [
        *((2, 4, 2, 2, 1), (1, 4, 2, 2, 1), (1, 8, 1, 4, 1), (1, 8, 2, 1, 1), (2, 4, 1, 4, 1), (1, 4, 2, 2, 2)),
        *((1, 2, 4, 1, 1), (2, 2, 2, 2, 1), (1, 4, 4, 1, 1)),
    ],
}

# (row_tiles, row_warps, slice_warps, min_blocks) of the resident kernel, by token tiles
RESIDENT_CUTS: dict[int, list[tuple[int, int, int, int]]] = {
    1: [(1, 1, 8, 2), (1, 2, 8, 1), (2, 1, 8, 2), (1, 2, 4, 2), (1, 4, 2, 2), (1, 4, 1, 3), (2, 2, 8, 1)],
    2: [
        *((1, 1, 8, 2), (1, 2, 8, 1), (2, 1, 8, 2), (1, 2, 4, 2), (2, 2, 4, 1), (1, 4, 2, 2), (1, 4, 1, 2)),
        *((2, 2, 8, 1), (4, 1, 8, 1), (1, 3, 8, 1)),
    ],
    4: [(1, 1, 8, 2), (1, 1, 8, 1), (1, 2, 8, 1), (2, 1, 8, 1), (1, 2, 4, 2), (2, 2, 4, 1), (1, 4, 2, 1)],
    8: [(1, 1, 8, 1), (1, 2, 8, 1), (2, 1, 8, 1), (1, 2, 4, 1), (1, 4, 2, 1)],
}
# On Hopper's matrix instruction, by token tiles: (row_warps, slice_warps, buffers, min_blocks, cluster, x_blocks,
# wide_table)
WGMMA_CUTS: dict[int, list[tuple[int, int, int, int, int, int, int]]] = {
    1: [
        *((4, 1, 4, 3, 2, 2, 0), (4, 1, 4, 2, 2, 4, 0), (4, 4, 4, 1, 2, 2, 1), (4, 2, 4, 1, 2, 4, 1)),
        *((12, 1, 4, 1, 2, 4, 1), (12, 1, 4, 1, 1, 4, 1), (12, 1, 4, 1, 4, 4, 1), (8, 2, 4, 1, 2, 2, 1)),
        *((12, 1, 6, 1, 1, 2, 1),),
    ],
    2: [
        *((4, 1, 4, 2, 2, 2, 0), (4, 4, 4, 1, 2, 2, 1), (4, 2, 4, 1, 2, 4, 1), (8, 1, 4, 1, 2, 4, 1)),
        *((12, 1, 4, 1, 1, 2, 1), (12, 1, 6, 1, 2, 2, 1), (12, 1, 4, 1, 4, 2, 1), (12, 1, 3, 1, 2, 4, 1)),
        *((12, 1, 6, 1, 1, 2, 1), (16, 1, 4, 1, 2, 2, 1)),
    ],
    4: [
        *((12, 1, 4, 1, 1, 2, 1), (12, 1, 5, 1, 1, 2, 1), (12, 1, 4, 1, 2, 2, 1), (12, 1, 6, 1, 2, 2, 1)),
        *((12, 1, 6, 1, 4, 2, 1), (12, 1, 3, 1, 2, 4, 1), (4, 4, 3, 1, 2, 2, 1), (4, 2, 6, 1, 2, 2, 1)),
        *((4, 2, 3, 1, 2, 4, 1), (8, 2, 3, 1, 4, 2, 1), (16, 1, 4, 1, 4, 2, 1), (16, 1, 3, 1, 2, 2, 1)),
    ],
    8: [
        *((4, 2, 4, 1, 2, 2, 1), (8, 1, 3, 1, 1, 2, 1), (8, 1, 4, 1, 2, 2, 1), (12, 1, 3, 1, 4, 2, 1)),
        *((8, 1, 4, 1, 2, 2, 0), (8, 1, 4, 1, 4, 2, 1), (12, 1, 3, 1, 2, 2, 0)),
    ],
}
WGMMA_LEAST_K = 1024
FEW_BYTES = 8 << 20  # of copies, where memory is dear
LAUNCHES = 48  # captured for one measurement, each on a matrix of its own where that is small
SMALL = 4 << 20  # values of a matrix that is read in no time: how soon the kernel comes to its end decides
LARGE_N = 8192  # rows from which thread blocks go through several row blocks


def candidates(decode: int, tokens: int, n: int, k: int) -> list[LinearConfig]:
    """List the configurations worth trying for a matrix; NF4 in both ways of decoding."""
    tiles, limit = token_tiles_for(tokens), shared_memory_limit()
    decodes = [Decode.NF4_TABLE, Decode.NF4_PERMUTE] if decode == Decode.NF4_TABLE else [decode]
    built = [config for way in decodes for config in _resident(way, tiles, n, k) if config.fits(k, limit)]
    if not built or n * k > SMALL:
        built += [LinearConfig(way, tiles, *cut) for way in decodes for cut in CUTS[tiles]]
    if k >= WGMMA_LEAST_K and has_wgmma():
        built += wgmma_candidates(decode, tiles)
    usable = [config for config in built if config.fits(k, limit) and config.is_frugal(n)]
    return [config for config in usable if config.block_rows <= max(16, n)]


def wgmma_candidates(decode: int, tiles: int) -> list[LinearConfig]:
    """List the configurations on Hopper's matrix instruction."""
    found = []
    for row_warps, slice_warps, depth, min_blocks, cluster, x_blocks, wide in WGMMA_CUTS[tiles]:
        shape = (1, row_warps, slice_warps, depth, min_blocks)
        wide = wide if decode == Decode.NF4_TABLE else 0
        found.append(LinearConfig(decode, tiles, *shape, wgmma=1, cluster=cluster, x_blocks=x_blocks, wide_table=wide))
    return list(dict.fromkeys(found))


def has_wgmma() -> bool:
    """Say whether Hopper's matrix instruction is here."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def _resident(decode: int, tiles: int, n: int, k: int) -> list[LinearConfig]:
    if k > MAX_RESIDENT:
        return []
    found = []
    for row_tiles, row_warps, slice_warps, min_blocks in RESIDENT_CUTS[tiles]:
        loops, row_blocks = [1], math.ceil(n / 16 / row_tiles / row_warps)
        if n >= LARGE_N:
            waves = [math.ceil(row_blocks / (count * min_blocks * multiprocessors())) for count in (1, 2)]
            loops = [max(math.ceil(n / 16 / MAX_PLACES), loop) for loop in (*waves, 1)]
        for loop in dict.fromkeys(loops):
            found.append(
                LinearConfig(decode, tiles, row_tiles, row_warps, slice_warps, 0, min_blocks, row_loop=loop, resident=1)
            )
    return found


def time_graph(
    launch: Callable[[int], object], count: int, *, repeats: int = 5, before: Callable[[], object] = lambda: None
) -> float:
    """Return microseconds per launch: `launch(0..count-1)` captured once as a CUDA graph, median of replays.

    `before` runs ahead of each replay and is not timed.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(min(count, 2)):
            launch(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            launch(i)
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / count)
    return median(times)


def copies(weight: PackedLinear, at_most: int = 256) -> list[PackedLinear]:
    """Repeat a matrix so that a round over the copies finds none of it in the GPU's cache (or `at_most` times)."""
    count = min(at_most, 1 + math.ceil(1.3 * cache_bytes() / weight.num_bytes))
    scales = weight.scales
    return [
        replace(weight, weights=weight.weights.clone(), scales=None if scales is None else scales.clone())
        for _ in range(count)
    ]


def cache_bytes() -> int:
    return torch.cuda.get_device_properties().L2_cache_size


def tune(
    weight: PackedLinear,
    tokens: int,
    workspace: Workspace,
    *,
    tries: Sequence[LinearConfig] | None = None,
    clear_cache: Callable[[], object] | None = None,
) -> list[tuple[float, LinearConfig]]:
    """Time candidate configurations on this matrix: (microseconds, config), fastest first.

    With `clear_cache`, which leaves nothing of the matrix in the GPU's cache, little memory is taken. One whose bits
    are not those of the portable kernel is left out: that Hopper's instruction adds alike is not promised anywhere.
    """
    x = torch.randn(tokens, weight.k, device=weight.weights.device).to(weight.dtype)
    is_frugal = clear_cache is not None
    rounds = copies(weight, max(1, FEW_BYTES // weight.num_bytes) if is_frugal else LAUNCHES)
    tries = usable_candidates(weight, tokens) if tries is None else tries
    out = run_linear(x, weight, tries[0], workspace)
    workspace.reserve(max(config.workspace_floats(weight.n) for config in tries))
    # A few copies of a small matrix would stay in the cache. (Filling it with copies instead chose launches that took
    # 7 % more of a real step at 8 rows, on an H100.)
    if clear_cache is None:
        clear_cache = torch.empty(cache_bytes(), dtype=torch.uint8, device=x.device).zero_
    launches = len(rounds) if is_frugal else max(len(rounds), LAUNCHES // 2)
    timed = [(_time_config(x, rounds, launches, config, workspace, out, clear_cache), config) for config in tries]
    timed.sort(key=lambda pair: pair[0])
    portable = default_config(weight.n, weight.k, tokens, weight.decode)
    expected = run_linear(x, weight, portable, workspace)
    agree = [pair for pair in timed if torch.equal(run_linear(x, weight, pair[1], workspace), expected)]
    return agree or [(math.inf, portable)]


def usable_candidates(weight: PackedLinear, tokens: int, *, is_head: bool = False) -> list[LinearConfig]:
    """List the configurations worth trying whose threads have registers enough, where there are such.

    `is_head` says that the matrix is a backbone's `lm_head`, run for the best token of each row.
    """
    tries = candidates(weight.decode, tokens, weight.n, weight.k)
    return [config for config in tries if not _spills(config, weight, is_head)] or tries


def kernel_of(config: LinearConfig, weight: PackedLinear, *, is_head: bool = False) -> tuple[str, str, Defines, int]:
    """Return what `load_kernel` is asked for when a pass through a backbone runs this matrix."""
    best = is_head and bool(config.resident) and config.num_places(weight.n) <= MAX_PLACES
    norm = (weight.is_normed or is_head) and config.can_normalize(weight.k)
    return config.kernel(weight.k, weight.dtype, norm=norm, best=best)


def _spills(config: LinearConfig, weight: PackedLinear, is_head: bool) -> bool:
    """Say whether threads of the kernel keep values in memory, of which the driver then holds some for all of them."""
    kernel = load_kernel(*kernel_of(config, weight, is_head=is_head))
    return kernel.resources(config.threads, config.shared_bytes(weight.k))["spilled_bytes"] > 0


def _time_config(
    x: Tensor,
    rounds: list[PackedLinear],
    launches: int,
    config: LinearConfig,
    workspace: Workspace,
    out: Tensor,
    clear_cache: Callable[[], object],
) -> float:
    factors = torch.ones_like(x[0])
    norm = Norm(factors, 1e-5) if rounds[0].is_normed and config.can_normalize(x.shape[1]) else None
    normed = torch.empty_like(x)

    def launch(i: int) -> Tensor:
        if rounds[0].is_normed and norm is None:
            fused_ops.rms_norm(x, factors, 1e-5, out=normed)
        return run_linear(x, rounds[i % len(rounds)], config, workspace, norm=norm, out=out)

    return time_graph(launch, launches, repeats=max(3, 3 * LAUNCHES // 4 // launches), before=clear_cache)
