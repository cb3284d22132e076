"""Capture and replay of launch sequences as CUDA graphs: one launch from the host instead of hundreds.

A sequence works on static buffers only, so its graph stays true until those move (`clear`). The first call of a
sequence runs eagerly, which loads its kernels; the second captures it. Without a GPU everything runs eagerly.
"""

import gc
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

from engine.kernels.nvrtc import KernelCompileError

__all__ = ["GraphCache"]

_MAX_GRAPHS = 64


class GraphCache:
    """Captured sequences by key. `failure` says why capturing was given up, empty while it works."""

    def __init__(self, device: str) -> None:
        self.failure = ""
        self.capture_seconds: dict[Hashable, float] = {}
        self.num_bytes = 0
        self._enabled = device == "cuda"
        self._warm: set[Hashable] = set()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, key: Hashable, launch: Callable[[], object]) -> None:
        """Run a sequence of launches: `launch` eagerly, or the graph that was captured from it under `key`."""
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        if not self._enabled or key not in self._warm:
            self._warm.add(key)
            launch()
            return
        captured = self._capture(key, launch)
        if captured is None:
            launch()
        else:
            captured.replay()

    def clear(self) -> None:
        """Forget all graphs; their buffers have moved."""
        self._graphs.clear()
        self.num_bytes = 0

    def _capture(self, key: Hashable, launch: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
        while len(self._graphs) >= _MAX_GRAPHS:
            self._graphs.pop(next(iter(self._graphs)))
        started, free = time.perf_counter(), torch.cuda.mem_get_info()[0]
        graph = torch.cuda.CUDAGraph()
        try:
            with _capturing(graph):
                launch()
        except (RuntimeError, KernelCompileError) as error:
            self._enabled, self.failure = False, str(error)
            return None
        self._graphs[key] = graph
        self.capture_seconds[key] = time.perf_counter() - started
        self.num_bytes += max(0, free - torch.cuda.mem_get_info()[0])
        return graph


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Record what is launched in this thread; `torch.cuda.graph` would also empty torch's memory cache each time."""
    torch.cuda.synchronize()
    stream, collects = torch.cuda.Stream(), gc.isenabled()
    gc.disable()  # a collected graph or event would be destroyed amid the capture
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()
    finally:
        if collects:
            gc.enable()
    torch.cuda.current_stream().wait_stream(stream)
