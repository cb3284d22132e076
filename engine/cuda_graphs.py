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
        self.num_bytes = 0  # of the device, by what it lacked afterwards
        self._enabled = self._on_gpu = device == "cuda"
        # Graphs share a pool and a stream: they run one after another, and nothing that one allocates is read after it.
        self._pool: tuple[int, int] | None = None
        self._stream: torch.cuda.Stream | None = None
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
        if not self._capture(key, launch):
            launch()

    def clear(self) -> None:
        """Forget all graphs; their buffers have moved."""
        self.forget(lambda key: True)

    def forget(self, is_unwanted: Callable[[Hashable], bool]) -> None:
        """Give back the memory of graphs whose keys are unwanted; those that are run again are captured again."""
        self._return_unused()
        with self._counting():
            for key in list(filter(is_unwanted, self._graphs)):
                del self._graphs[key]
            if not self._graphs:
                self._pool = None
            self._return_unused()

    def _return_unused(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _capture(self, key: Hashable, launch: Callable[[], object]) -> bool:
        """Capture a sequence and run it once; False, with the `failure` noted, where that cannot be done."""
        while len(self._graphs) >= _MAX_GRAPHS:
            self.forget({next(iter(self._graphs))}.__contains__)
        started = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream = self._stream or torch.cuda.Stream()
        with self._counting():
            try:
                with _capturing(graph, self._pool, self._stream):
                    launch()
            except (RuntimeError, KernelCompileError) as error:
                self._enabled, self.failure = False, str(error)
                return False
            self.capture_seconds[key] = time.perf_counter() - started
            graph.replay()  # the first time takes memory too
        self._graphs[key] = graph
        return True

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Count what the device has less afterwards, or more."""
        before = torch.cuda.mem_get_info()[0] if self._on_gpu else 0
        yield
        after = torch.cuda.mem_get_info()[0] if self._on_gpu else 0
        self.num_bytes = max(0, self.num_bytes + before - after)


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], stream: torch.cuda.Stream) -> Iterator[None]:
    """Record what is launched in this thread; `torch.cuda.graph` would also empty torch's memory cache each time."""
    torch.cuda.synchronize()
    collects = gc.isenabled()
    gc.disable()  # a collected graph or event would be destroyed amid the capture
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()
    finally:
        if collects:
            gc.enable()
    torch.cuda.current_stream().wait_stream(stream)
