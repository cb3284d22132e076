"""Compile the CUDA sources of this package at run time and launch them.

torch's CUDA wheels carry the run-time compiler (NVRTC), on Linux and Windows, so no toolkit, no host compiler and no
Triton is needed. Compiled code is kept on disk, per source, options and architecture. What the kernels compute is not
known here.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import EngineError

__all__ = [
    "Kernel",
    "KernelCompileError",
    "compile_ahead",
    "compile_source",
    "is_available",
    "load_kernel",
    "multiprocessors",
    "shared_memory_limit",
]

SOURCES = Path(__file__).parent / "cuda"
CLUSTER_DIMENSION, PROGRAMMATIC_SERIALIZATION = 4, 6  # CUlaunchAttributeID
STATIC_SHARED, LOCAL_BYTES, REGISTERS, MAX_DYNAMIC_SHARED, CARVEOUT = 1, 3, 4, 8, 9  # CUfunction_attribute
Defines = tuple[tuple[str, int], ...]


class KernelCompileError(EngineError):
    """A kernel could not be compiled or launched on this machine."""


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_uint * 16)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel, loaded on the current device."""

    function: ctypes.c_void_p
    name: str
    overlaps: bool  # may start while the kernel before it ends; it then waits by itself for that one's results

    def __call__(
        self, grid: Sequence[int], block: int, args: Sequence[Tensor | int | float | None], shared_bytes: int = 0
    ) -> None:
        """Launch on torch's current stream. Tensors go as pointers, None as the null pointer, int and float 32 bit."""
        values = [_as_c(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        attribute = _Attribute(PROGRAMMATIC_SERIALIZATION, 0, (ctypes.c_uint * 16)(1))
        config = _LaunchConfig(
            (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid))),
            (ctypes.c_uint * 3)(block, 1, 1),
            shared_bytes,
            torch.cuda.current_stream().cuda_stream,
            ctypes.pointer(attribute),
            int(self.overlaps),
        )
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self.function, pointers, None), f"launch {self.name}")

    def resources(self, block: int, shared_bytes: int = 0) -> dict[str, int]:
        """Return what a launch takes: registers and spilled bytes a thread, thread blocks per multiprocessor."""
        value, found = ctypes.c_int(), {}
        asked = {"registers": REGISTERS, "spilled_bytes": LOCAL_BYTES, "static_shared": STATIC_SHARED}
        for name, number in asked.items():
            _check(_driver().cuFuncGetAttribute(ctypes.byref(value), number, self.function), f"ask about {self.name}")
            found[name] = value.value
        result = _driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(
            ctypes.byref(value), self.function, block, ctypes.c_size_t(shared_bytes)
        )
        _check(result, f"ask for the occupancy of {self.name}")
        return found | {"blocks_per_multiprocessor": value.value}

    def clusters(self, grid: Sequence[int], block: int, shared_bytes: int, size: int) -> int:
        """Return how many clusters of `size` thread blocks can be on the device at a time."""
        attribute, count = _Attribute(CLUSTER_DIMENSION, 0, (ctypes.c_uint * 16)(size, 1, 1)), ctypes.c_int()
        sizes = (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(block, 1, 1)
        config = _LaunchConfig(*sizes, shared_bytes, None, ctypes.pointer(attribute), 1)
        result = _driver().cuOccupancyMaxActiveClusters(ctypes.byref(count), self.function, ctypes.byref(config))
        _check(result, f"ask for the clusters of {self.name}")
        return count.value


def _as_c(arg: Tensor | int | float | None) -> ctypes._SimpleCData:
    if arg is None:
        return ctypes.c_void_p(None)
    if isinstance(arg, Tensor):
        return ctypes.c_void_p(arg.data_ptr())
    return ctypes.c_float(arg) if isinstance(arg, float) else ctypes.c_int(arg)


@lru_cache(maxsize=4096)
def load_kernel(source: str, name: str, defines: Defines = (), shared_bytes: int = 0) -> Kernel:
    """Compile `name` from the named source file with `defines`, and load it on the current device.

    `shared_bytes` is the most dynamic shared memory that it will be launched with. Raises KernelCompileError.
    """
    capability = torch.cuda.get_device_capability()
    torch.cuda.current_stream()  # the driver's context must exist before a module is loaded
    code = _cached_code(source, defines, 10 * capability[0] + capability[1])
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), code), f"load {source}")
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"find {name}")
    if shared_bytes:  # the default allows 48 KB together with what the kernel declares itself
        result = _driver().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, shared_bytes)
        _check(result, f"give {name} {shared_bytes} bytes of shared memory")
    overlaps = capability >= (9, 0)
    if overlaps:  # only kernels that divide a multiprocessor's memory alike meet on it: all ask for all as shared
        _check(_driver().cuFuncSetAttribute(function, CARVEOUT, 100), f"divide the memory for {name}")
    return Kernel(function, name, overlaps)


def is_available() -> bool:
    """Say whether kernels can be compiled and run here: an NVIDIA GPU of capability 7.5 or more, and NVRTC."""
    if not torch.cuda.is_available() or torch.version.cuda is None or torch.cuda.get_device_capability() < (7, 5):
        return False
    try:
        _driver(), _compiler()
    except (OSError, KernelCompileError):
        return False
    return True


def shared_memory_limit() -> int:
    """Shared memory that a thread block may have on the current device, in bytes; an H100's without a device."""
    if not torch.cuda.is_available():
        return 227 * 1024
    return torch.cuda.get_device_properties().shared_memory_per_block_optin


@cache
def multiprocessors() -> int:
    """How many multiprocessors the GPU has; without one, an H100's."""
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 132


def compile_source(source: str, defines: Defines, architecture: int) -> bytes:
    """Compile a source file of this package to machine code for sm_`architecture`.

    Raises KernelCompileError with the compiler's log.
    """
    compiler, program = _compiler(), ctypes.c_void_p()
    text = _text(source).encode()
    result = compiler.nvrtcCreateProgram(ctypes.byref(program), text, source.encode(), 0, None, None)
    _require(result == 0, f"The run-time compiler refused {source} with code {result}.")
    target = "90a" if architecture == 90 else str(architecture)  # the "a" admits Hopper's own matrix instructions
    options = ["--std=c++17", f"--gpu-architecture=sm_{target}"] + [f"-D{key}={value}" for key, value in defines]
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    result = compiler.nvrtcCompileProgram(program, len(options), encoded)
    log = _fetch(compiler.nvrtcGetProgramLogSize, compiler.nvrtcGetProgramLog, program)
    _require(result == 0, f"Kernel {source} with {dict(defines)} did not compile: {log.decode(errors='replace')}")
    code = _fetch(compiler.nvrtcGetCUBINSize, compiler.nvrtcGetCUBIN, program)
    compiler.nvrtcDestroyProgram(ctypes.byref(program))
    return code


def _fetch(size_of: ctypes._CFuncPtr, read: ctypes._CFuncPtr, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    read(program, buffer)
    return buffer.raw


def compile_ahead(jobs: Iterable[tuple[str, Defines]]) -> None:
    """Compile many sources at a time on all cores, so that loading their kernels finds them on disk."""
    capability = torch.cuda.get_device_capability()
    architecture = 10 * capability[0] + capability[1]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda job: _cached_code(*job, architecture), dict.fromkeys(jobs)):
            pass


def _cached_code(source: str, defines: Defines, architecture: int) -> bytes:
    key = hashlib.sha256(repr((_text(source), defines, architecture, torch.version.cuda)).encode()).hexdigest()
    path = cache_folder() / f"{Path(source).stem}-{key[:24]}.cubin"
    if path.is_file():
        return path.read_bytes()
    code = compile_source(source, defines, architecture)
    try:  # a second process may do the same; the rename is atomic, and a cache that cannot be written is no error
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        Path(file.name).replace(path)
    except OSError:
        pass
    return code


def cache_folder() -> Path:
    """Where compiled kernels and tuning results are kept between runs; MEDUSA_CACHE overrides it."""
    if "MEDUSA_CACHE" in os.environ:
        return Path(os.environ["MEDUSA_CACHE"])
    base = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "medusa-chat" / "kernels"


@cache
def _text(source: str) -> str:
    return (SOURCES / "primitives.cuh").read_text() + expanded(source)


def expanded(source: str) -> str:
    """Return a source file of this package with the files that it includes by name put in their places."""
    text = (SOURCES / source).read_text()
    return re.sub(r'^#include "(.+)"$', lambda match: expanded(match[1]), text, flags=re.MULTILINE)


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@cache
def _compiler() -> ctypes.CDLL:
    major = (torch.version.cuda or "13").split(".")[0]
    names = [f"nvrtc64_{major}0_0.dll"] if sys.platform == "win32" else [f"libnvrtc.so.{major}", "libnvrtc.so"]
    for name in [*_wheel_libraries(f"libnvrtc.so.{major}"), *names]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise KernelCompileError(f"None of {', '.join(names)} could be loaded; reinstall torch with CUDA.")


def _wheel_libraries(name: str) -> list[str]:
    """Find the compiler in NVIDIA's wheels, which torch depends on; its own data library must be loaded before it."""
    found = []
    for folder in map(Path, getattr(importlib.util.find_spec("nvidia"), "submodule_search_locations", None) or []):
        for path in folder.glob(f"*/lib/{name}"):
            found.append(str(path))
            for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
                with contextlib.suppress(OSError):
                    ctypes.CDLL(str(builtins))
    return found


def _check(result: int, action: str) -> None:
    if result == 0:
        return
    message = ctypes.c_char_p()
    _driver().cuGetErrorString(result, ctypes.byref(message))
    raise KernelCompileError(f"Could not {action}: {(message.value or b'unknown').decode()} (CUDA error {result}).")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise KernelCompileError(message)
