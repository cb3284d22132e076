"""Run one installer command of the set-up: its whole output into a log, one moving line for the person who waits.

Standard library only. It knows how pip and uv talk, and turns the way they fail into one sentence with a remedy.
"""

import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

__all__ = ["Progress", "SetupError", "condense", "duration", "explain", "run_command"]

SECONDS_BETWEEN_LINES = 20  # where the moving line cannot be overwritten, such as in a CI log
TAIL_LINES = 60


class SetupError(Exception):
    """The set-up cannot go on; the message is one sentence with the remedy."""


class Progress:
    """Show phases with their elapsed time on a text stream; a terminal gets a line that is overwritten in place."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._overwrites = stream.isatty()
        self._began = self._last_shown = time.monotonic()
        self._detail = ""

    def say(self, text: str) -> None:
        self._wipe()
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def begin(self, phase: str) -> None:
        """Start the clock of a phase and name it."""
        self._began = self._last_shown = time.monotonic()
        self._detail = ""
        self.say(phase)

    def done(self) -> None:
        self.say(f"      done in {duration(time.monotonic() - self._began)}")

    def tick(self, detail: str | None = None) -> None:
        """Show how long the phase has run, with the last known detail; cheap enough to call for every line."""
        changed = detail is not None and detail != self._detail
        self._detail = detail or self._detail
        now = time.monotonic()
        if now - self._last_shown < (0.5 if changed else 1.0) * (1 if self._overwrites else SECONDS_BETWEEN_LINES):
            return
        self._last_shown = now
        line = f"      {duration(now - self._began)}  {self._detail}"
        if self._overwrites:
            self._wipe()
            self._stream.write(line[:78])
            self._stream.flush()
        else:
            self.say(line)

    def _wipe(self) -> None:
        if self._overwrites:
            self._stream.write("\r" + " " * 78 + "\r")


def run_command(
    command: Sequence[str | Path],
    progress: Progress,
    log_path: Path,
    environ: Mapping[str, str],
    keep_open: Sequence[int] = (),
) -> None:
    """Run `command` to its end; raise SetupError with an explanation when it fails.

    `keep_open` are file descriptors that the command inherits (not on Windows): the lock stays held by an installer
    that outlives a killed launcher.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with (
        open(log_path, "a", encoding="utf-8") as log,
        subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environ),
            text=True,
            encoding="utf-8",
            errors="replace",
            pass_fds=tuple(keep_open) if os.name == "posix" else (),
        ) as process,
    ):
        try:
            for line in _lines(process):
                if line is not None and not line.startswith("Progress "):
                    log.write(line)
                    tail.append(line)
                progress.tick(condense(line) if line is not None else None)
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        raise SetupError(explain("".join(tail), log_path))


def _lines(process: subprocess.Popen[str]) -> Iterator[str | None]:
    """Yield the lines of a process as they come, and None once a second while none comes."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=1.0)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


_CONDENSED = (
    (re.compile(r"^Collecting ([\w.\-]+)"), "looking up {0}"),
    (re.compile(r"^\s*Downloading ([\w.]+?)-\d\S* \((.+)\)"), "downloading {0}, {1}"),
    (re.compile(r"^\s*Using cached ([\w.]+?)-\d"), "using the kept download of {0}"),
    (re.compile(r"^(?:Requirement already satisfied|Processing)\b"), "looking up packages"),
    (re.compile(r"^Installing collected packages: (.*)"), "unpacking {count} packages"),
    (re.compile(r"Retrying \(Retry"), "the package index does not answer, trying again"),
    (re.compile(r"^(Resolved|Prepared|Installed) (\d+) packages?"), "{0} {1} packages"),
    (re.compile(r"^\s*Downloading (\S+) \((\S+)\)"), "downloading {0}, {1}"),
)


def condense(line: str) -> str | None:
    """Say in a few words what a line of pip or uv means for the person who waits; None when nothing."""
    parts = line.split()
    if len(parts) == 4 and parts[0] == "Progress" and parts[3].isdigit() and int(parts[3]):
        return f"downloading, {int(parts[1]) / 1e6:.0f} of {int(parts[3]) / 1e6:.0f} MB"
    for pattern, words in _CONDENSED:
        if match := pattern.search(line):
            return words.format(*match.groups(), count=line.count(",") + 1)
    return None


_CAUSES = (
    (
        r"No space left on device|Errno 28|WinError 112",
        "The disk is full: free some space (about 3 GB, 8 GB with an NVIDIA card) and start again.",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLError|invalid peer certificate",
        "The package index's certificate was not accepted, which a company proxy or a virus scanner causes: name its "
        "certificate file in the environment variable PIP_CERT (uv: SSL_CERT_FILE) and start again.",
    ),
    (
        r"ProxyError|Tunnel connection failed",
        "The proxy refused the connection to the package index: correct HTTPS_PROXY and start again.",
    ),
    (
        r"NewConnectionError|Failed to establish a new connection|ConnectTimeoutError|ReadTimeoutError|"
        r"name resolution|getaddrinfo failed|Network is unreachable|Connection refused|Connection reset|"
        r"RemoteDisconnected|IncompleteRead|Connection broken|dns error|error sending request|tcp connect error",
        "The package index cannot be reached: the first start needs the internet, so check the connection and start "
        "again (what was downloaded is kept).",
    ),
    (
        r"Read-only file system|Errno 30|Permission denied|Errno 13|WinError 5\b",
        "A file could not be written: start from a folder that belongs to you, and close other windows of the app.",
    ),
    (
        r"WinError 206|Long ?[Pp]ath",
        "The folder's path is too long for Windows: move the app to a short one such as C:\\medusa and start again.",
    ),
    (
        r"No matching distribution found for (\S+)",
        f"There is no build of {{0}} for Python {sys.version_info[0]}.{sys.version_info[1]} on this kind of machine: "
        "install Python 3.12 and start launcher.py with it.",
    ),
)


def explain(output: str, log_path: Path) -> str:
    """Return one sentence on why an installer failed, from the end of its output, with the remedy."""
    for pattern, sentence in _CAUSES:
        if match := re.search(pattern, output):
            return sentence.format(*match.groups()) + f" The full log is {log_path}."
    errors = [line.strip() for line in output.splitlines() if "error" in line.lower()]
    reason = errors[-1] if errors else "the installer gave no reason"
    return f"The set-up failed ({reason}): see {log_path}, then try `python launcher.py --repair`."


def duration(seconds: float) -> str:
    """Return whole seconds as a person says them: "43 s", "2 min 05 s"."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
