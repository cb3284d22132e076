"""Compile the C sources of the CPU engine for the machine at hand, once, and keep the library in the user's cache.

Any gcc or clang will do, also the one in the `ziglang` package. The library is named by everything that decides its
code: sources, compiler and CPU; another machine that shares the cache folder builds its own. What it computes is not
known here.
"""

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from engine.errors import EngineError
from engine.kernels.nvrtc import cache_folder

__all__ = ["CpuKernelsUnavailableError", "build_library", "compile_to", "find_compiler"]

SOURCES = Path(__file__).parent / "cpu"
# Contraction is off so that a product and a sum round the same way in every copy of a kernel; the kernels ask for
# fused multiply-add where they want it.
FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden", "-pthread")
NATIVE = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler takes
TIMEOUT_S = 120


class CpuKernelsUnavailableError(EngineError):
    """The C kernels cannot be built or loaded here; the message says why. Slower torch operations remain."""


@cache
def build_library() -> Path:
    """Return the path of the library for this machine, compiling it at the first call on it.

    Raises CpuKernelsUnavailableError.
    """
    compiler = find_compiler()
    library = cache_folder() / f"cpu-{_fingerprint(compiler)}{_suffix()}"
    if not library.is_file():
        _build_into(compiler, library)
    return library


def find_compiler() -> list[str]:
    """Return the command of a C compiler: $CC, then cc, gcc, clang, then the ziglang package.

    Raises CpuKernelsUnavailableError.
    """
    named = os.environ.get("CC")
    if named:
        return shlex.split(named)
    for name in ("gcc", "clang") if sys.platform == "win32" else ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return [found]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise CpuKernelsUnavailableError(
        "No C compiler was found; install gcc or clang, or `pip install ziglang`, for the faster CPU kernels."
    )


def compile_to(output: Path, compiler: Sequence[str], extra: Sequence[str] = (), sources: Sequence[Path] = ()) -> None:
    """Compile all kernels and `sources` with the first native flag that works.

    `extra` says what is built: ("-shared", "-fPIC"), or sanitizers. Raises CpuKernelsUnavailableError.
    """
    inputs = [str(path) for path in (*sorted(SOURCES.glob("*.c")), *sources)]
    for native in NATIVE:
        command = [*compiler, *FLAGS, *native, *extra, "-I", str(SOURCES), *inputs, "-o", str(output), "-lm"]
        error = _run(command)
        if not error:
            return
    raise CpuKernelsUnavailableError(f"{compiler[0]} could not build the CPU kernels: {error}")


def _build_into(compiler: Sequence[str], library: Path) -> None:
    """Build beside the final name and rename, so that a half-written library is never loaded."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            compile_to(built, compiler, ("-shared",) if sys.platform == "win32" else ("-shared", "-fPIC"))
            built.replace(library)
    except OSError as error:
        raise CpuKernelsUnavailableError(
            f"The CPU kernels cannot be kept in {library.parent} ({error}); set MEDUSA_CACHE to a folder you can write."
        ) from error


def _run(command: Sequence[str]) -> str:
    """Run a compiler; return what it said when it failed, else nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = done.stderr.strip() or f"it ended with status {done.returncode}"
    return said[:600] if done.returncode else ""


def _fingerprint(compiler: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.read_bytes())
    parts = (*compiler, *FLAGS, _compiler_version(tuple(compiler)), _cpu())
    digest.update("\0".join(parts).encode())
    return digest.hexdigest()[:16]


def _compiler_version(compiler: tuple[str, ...]) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CpuKernelsUnavailableError(
            f"The C compiler {' '.join(compiler)} cannot be run ({error}); set CC to one that can."
        ) from error
    return done.stdout


def _cpu() -> str:
    """Return what tells this CPU's instruction set from another's."""
    description = [platform.system(), platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "|".join(description)
    wanted = ("flags", "Features", "model name")
    return "|".join([*description, *sorted({line for line in lines if line.startswith(wanted)})])


def _suffix() -> str:
    return {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
