"""How work on a GPU is timed: replays of one captured graph, and kernel by kernel as the driver's profiler sees it."""

from collections.abc import Callable
from statistics import median

import torch

__all__ = ["kernel_times", "replay_ms"]

_REPLAYS, _WARM = 12, 2


def replay_ms(graph: torch.cuda.CUDAGraph, before: Callable[[], object]) -> float:
    """Return the median milliseconds of a replay; `before` puts back what the one before it has changed."""
    times = []
    for _ in range(_REPLAYS):
        before()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times[_WARM:])


def kernel_times(run: Callable[[], object]) -> dict[str, tuple[float, int]]:
    """Run once warm and once under the profiler; return microseconds and launches by kernel, the longest first."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    totals: dict[str, tuple[float, int]] = {}
    for event in profile.events():
        us, count = totals.get(event.name, (0.0, 0))
        totals[event.name] = us + event.device_time_total, count + 1
    longest = sorted(totals.items(), key=lambda item: -item[1][0])
    return {name: (round(us, 1), count) for name, (us, count) in longest}
