"""The C kernels as Python objects: threads, packed matrices, linears, the largest of each row.

Every call is checked here for shape, type and layout before a pointer leaves Python, so that a wrong call raises and
never crashes. What a decoder is, is not known here (see `engine.native_runner`).
"""

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from ctypes import Array, c_char_p, c_int, c_int32, c_int64, c_size_t, c_void_p
from functools import cache, cached_property

import torch
from torch import Tensor, nn

from engine.block_weights import BLOCK, DenseWeight, Q4Affine, Q8Symmetric, Weight
from engine.errors import OutOfMemoryError
from engine.kernels.cpu_build import CpuKernelsUnavailableError, build_library

__all__ = [
    "MAX_ROWS",
    "NativeArena",
    "NativeLinear",
    "NativeMatrix",
    "NativeThreads",
    "Signatures",
    "declare",
    "default_threads",
    "int32s",
    "load_library",
    "pointer",
    "release_with",
    "to_q8",
]

MAX_ROWS = 80  # rows of one decoder step, as in cpu/linear.h
_MAX_THREADS = 16  # decoding is bound by memory; more threads only wait for each other
_KINDS = {Q4Affine: 4, Q8Symmetric: 8}

Signatures = dict[str, tuple[object, list[object]]]
_SIGNATURES: Signatures = {
    "path_name": (c_char_p, []),
    "threads_create": (c_void_p, [c_int]),
    "threads_free": (None, [c_void_p]),
    "arena_create": (c_void_p, [c_size_t]),
    "arena_free": (None, [c_void_p]),
    "matrix_size": (c_size_t, [c_int] * 3),
    "matrix_create": (c_void_p, [c_void_p, c_int, c_int, c_int, c_void_p, c_void_p, c_void_p]),
    "matrix_values": (None, [c_void_p, c_void_p, c_int, c_void_p]),
    "linear_work": (c_size_t, [c_int]),
    "linear_run": (None, [c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_void_p]),
    "linear_argmax": (None, [c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_void_p]),
    "top_k": (None, [c_void_p, c_void_p, c_int, c_int, c_int, c_void_p, c_void_p]),
}


@cache
def load_library() -> ctypes.CDLL:
    """Build the library where needed and load it; raises CpuKernelsUnavailableError."""
    path = build_library()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise CpuKernelsUnavailableError(
            f"{path.name} cannot be loaded ({error}); delete it to build it again."
        ) from error
    declare(library, _SIGNATURES)
    return library


def declare(library: ctypes.CDLL, signatures: Signatures) -> None:
    """Tell ctypes the result and argument types of functions."""
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def pointer(tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Return the address of a contiguous CPU tensor, once it is what C was promised."""
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"Expected {dtype} of shape {tuple(shape)}, got {tensor.dtype} of {tuple(tensor.shape)}.")
    if not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(f"Expected a contiguous CPU tensor, got strides {tensor.stride()} on {tensor.device}.")
    return tensor.data_ptr()


def int32s(values: Sequence[int]) -> Array[c_int32]:
    """Return a few integers as C reads them. A decode step finds its caches swept by the weights, and each torch call
    costs it microseconds there; this costs less than one."""
    return (c_int32 * len(values))(*values)


def release_with(owner: object, release: Callable[[int], None], handle: int) -> None:
    """Free a handle when its owner goes; not at exit, where a thread may still be inside the kernels."""
    weakref.finalize(owner, release, handle).atexit = False


def default_threads() -> int:
    """Cores this process may run on, at most 16; two threads of one core count once where the system tells."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    return max(1, min(len({_core_of(cpu) for cpu in allowed}), _MAX_THREADS))


def _core_of(cpu: int) -> object:
    try:
        with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
            return file.read().strip()
    except OSError:
        return cpu


class NativeThreads:
    """The threads that run the kernels; they sleep between calls. Shared by everything on one CPU."""

    def __init__(self, count: int | None = None) -> None:
        self.library = load_library()
        self.count = default_threads() if count is None else count
        self.handle = self.library.threads_create(self.count)
        if not self.handle:
            raise CpuKernelsUnavailableError(f"{self.count} threads cannot be started; 1 to 64 are possible.")
        release_with(self, self.library.threads_free, self.handle)
        self.lock = threading.Lock()  # one call at a time: they share the work memory
        self._work, self._work_for = torch.empty(0, dtype=torch.uint8), {}  # type: Tensor, dict[int, int]

    @cached_property
    def path_name(self) -> str:
        """Which instructions the kernels were built for: "AVX512 VNNI"."""
        return self.library.path_name().decode()

    def work(self, inputs: int) -> int:
        """Return the address of work memory for a linear over `inputs`, to use while holding the lock."""
        if inputs not in self._work_for:
            needed = self.library.linear_work(inputs) + 64
            if self._work.numel() < needed:
                self._work = torch.empty(needed, dtype=torch.uint8)
                self._work_for.clear()
            self._work_for[inputs] = (self._work.data_ptr() + 63) // 64 * 64
        return self._work_for[inputs]

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest of each row of float32 [rows, n] and their indices, the lower first among equals."""
        rows, n = x.shape
        if not 1 <= k <= n:
            raise ValueError(f"k is {k}; allowed is 1 to {n}.")
        values, indices = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
        address = pointer(x, torch.float32, (rows, n))
        with self.lock:
            self.library.top_k(self.handle, address, rows, n, k, values.data_ptr(), indices.data_ptr())
        return values, indices


class NativeArena:
    """One region of memory that packed matrices are laid into, in order."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.library = load_library()
        self.num_bytes = sum(self.library.matrix_size(_kind(weight), *weight.shape) for weight in weights)
        self.handle = self.library.arena_create(self.num_bytes)
        if not self.handle:
            raise OutOfMemoryError(f"{self.num_bytes / 1e6:.0f} MB for weights cannot be had; close other programs.")
        release_with(self, self.library.arena_free, self.handle)


class NativeMatrix:
    """A block-quantised matrix packed for the kernels: the same codes and scales in another order."""

    def __init__(self, arena: NativeArena, weight: Q4Affine | Q8Symmetric) -> None:
        self.arena = arena  # keeps the memory
        self.shape = n, k = weight.shape
        codes = torch.uint8 if isinstance(weight, Q4Affine) else torch.int8
        scale, minimum = weight.scale.contiguous(), None
        addresses = [pointer(weight.codes.contiguous(), codes, (n, k)), pointer(scale, torch.float16, (n, k // BLOCK))]
        if isinstance(weight, Q4Affine):
            minimum = weight.minimum.contiguous()
            addresses.append(pointer(minimum, torch.float16, (n, k // BLOCK)))
        self.handle = arena.library.matrix_create(
            arena.handle, _kind(weight), n, k, *addresses, *[None] * (minimum is None)
        )
        if not self.handle:
            raise ValueError(f"A matrix of {n} x {k} does not fit what is left of an arena of {arena.num_bytes} bytes.")

    def rows(self, indices: Tensor) -> Tensor:
        """Return dequantised rows, int64 [count] -> float32 [count, k]."""
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.shape[0]:
            raise IndexError(f"Rows {indices.tolist()} are not all in 0..{self.shape[0] - 1}.")
        out = torch.empty(len(indices), self.shape[1])
        address = pointer(indices.contiguous(), torch.int64, (len(indices),))
        self.arena.library.matrix_values(self.handle, address, len(indices), out.data_ptr())
        return out


class NativeLinear(nn.Module):
    """A linear over a packed matrix: float32 [..., k] -> [..., n]; a row's result depends on that row alone."""

    def __init__(self, threads: NativeThreads, matrix: NativeMatrix) -> None:
        super().__init__()
        self.threads = threads
        self.matrix = matrix

    @classmethod
    def from_weight(cls, threads: NativeThreads, weight: Weight) -> "NativeLinear":
        """Pack one matrix into memory of its own; dense values are rounded to int8 (`to_q8`)."""
        packed = to_q8(weight) if isinstance(weight, DenseWeight) else weight
        return cls(threads, NativeMatrix(NativeArena([packed]), packed))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float().contiguous()
        out = torch.empty(len(rows), self.matrix.shape[0])
        self._call(self.threads.library.linear_run, rows, out.data_ptr())
        return out.view(*x.shape[:-1], -1)

    def argmax(self, x: Tensor) -> list[int]:
        """Return each row's largest output, the lowest index among equals, for contiguous float32 [rows, k]."""
        best = (c_int64 * len(x))()
        self._call(self.threads.library.linear_argmax, x, best)
        return best[:]

    def _call(self, function: Callable[..., None], rows: Tensor, out: object) -> None:
        threads, count, inputs = self.threads, len(rows), self.matrix.shape[1]
        address = pointer(rows, torch.float32, (count, inputs))
        with threads.lock:
            function(threads.handle, self.matrix.handle, address, count, out, threads.work(inputs))


def to_q8(weight: DenseWeight) -> Q8Symmetric:
    """Round values to int8 with one scale for each 32 inputs of a row."""
    n, k = weight.shape
    if k % BLOCK:
        raise ValueError(f"{k} inputs are not a multiple of {BLOCK}.")
    blocks = weight.values.float().reshape(n, -1, BLOCK)
    scale = (blocks.abs().amax(dim=-1) / 127).half()
    divisor = scale.float().clamp(min=torch.finfo(torch.float16).smallest_normal).unsqueeze(-1)
    codes = (blocks / divisor).round().clamp(-127, 127).to(torch.int8)
    return Q8Symmetric(codes.flatten(1), scale)


def _kind(weight: Weight) -> int:
    if type(weight) not in _KINDS:
        raise ValueError(f"A {type(weight).__name__} has no packed form; round it with to_q8 first.")
    return _KINDS[type(weight)]
