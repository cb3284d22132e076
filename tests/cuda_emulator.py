"""Compile a kernel for the CPU with the emulator header and call it like a `Kernel`; a double for `load_kernel`."""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from engine.kernels import nvrtc

COMPILER = shutil.which("g++")
# longjmp between fibers is what _FORTIFY_SOURCE takes for an attack
FLAGS = ["-std=c++17", "-O1", "-w", "-mf16c", "-U_FORTIFY_SOURCE", "-fPIC"]
HEADER = Path(__file__).parent / "cuda_emulator.h"
FOLDER = Path(tempfile.gettempdir()) / "medusa-cuda-emulator"
# The entry point unpacks arguments by the kernel's own parameter types.
ENTRY = """
template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) { kernel(*(A*)args[I]...); }
template <typename... A> void invoke(void (*kernel)(A...), void** args) {
    call(kernel, args, std::index_sequence_for<A...>());
}
extern "C" void emulate(u32 x, u32 y, u32 z, int threads, size_t shared_bytes, void** args) {
    emulator::launch({x, y, z}, threads, shared_bytes, CLUSTER, [=] { invoke(KERNEL, args); });
}
"""


class EmulatedKernel:
    """One kernel, run block by block on the CPU; tensors must be CPU tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def __call__(
        self, grid: Sequence[int], block: int, args: Sequence[Tensor | int | float | None], shared_bytes: int = 0
    ) -> None:
        assert all(arg.is_contiguous() for arg in args if isinstance(arg, torch.Tensor))
        values = [nvrtc._as_c(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self.library.emulate(*grid, *[1] * (3 - len(grid)), block, ctypes.c_size_t(shared_bytes), pointers)


@cache
def standard_headers() -> Path:
    """Compile the standard headers that the emulator includes, once for all kernels: half of a kernel's build time."""
    text = "".join(f"{line}\n" for line in HEADER.read_text().splitlines() if line.startswith("#include <"))
    path = FOLDER / f"standard-{hashlib.sha256(repr((text, FLAGS)).encode()).hexdigest()[:20]}.h"
    compiled = path.with_suffix(".h.gch")
    if not compiled.exists():
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text)
        built = path.with_suffix(f".{os.getpid()}")
        subprocess.run([COMPILER, *FLAGS, "-x", "c++-header", "-o", str(built), str(path)], check=True)
        built.replace(compiled)
    return path


@cache
def load_emulated(source: str, name: str, defines: nvrtc.Defines = (), shared_bytes: int = 0) -> EmulatedKernel:
    """Build `name` from a kernel source of the package; takes what `load_kernel` takes."""
    text = HEADER.read_text() + nvrtc.expanded(source) + ENTRY
    text = re.sub(r"__shared__", "static", text)
    key = hashlib.sha256(repr((text, name, defines)).encode()).hexdigest()[:20]
    library = FOLDER / f"{Path(source).stem}-{key}.so"
    if not library.exists():
        FOLDER.mkdir(exist_ok=True)
        path = library.with_suffix(f".{os.getpid()}.cpp")
        path.write_text(text)
        options = [f"-D{key}={value}" for key, value in (*defines, ("KERNEL", name))]
        command = [COMPILER, *FLAGS, "-shared", "-D__CUDA_ARCH__=900", *options, "-include", str(standard_headers())]
        built = path.with_suffix(".so")
        subprocess.run([*command, "-o", str(built), str(path)], check=True)
        built.replace(library)  # at once: another process may build or load the same
        path.unlink()
    return EmulatedKernel(ctypes.CDLL(str(library)))
