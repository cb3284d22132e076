"""A peer in its own process, asked over pipes; it measures itself, so the pipes cost its figures nothing."""

import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.bench.contenders import Ends, Run

__all__ = ["PeerError", "PeerProcess", "ProcessContender", "why_no_llama_cpp"]


class PeerError(Exception):
    """A peer cannot be compared; the message says why."""


class PeerProcess:
    """Runs `engine.bench.peers` with `settings` (see `serve` there); `about` is what it says of its build.

    `command` is replaced in tests.
    """

    def __init__(self, settings: dict[str, Any], command: Sequence[str] = ()) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        command = command or (sys.executable, "-m", "engine.bench.peers")
        self._process = subprocess.Popen(
            [*command, json.dumps(settings)],
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        self.about = self._read()["about"]

    def ask(self, prompt: Sequence[int], max_tokens: int, ends: Ends, lookup: bool) -> Run:
        """Have one answer written. Raises PeerError where the process ended."""
        asked = {"prompt": list(prompt), "max_tokens": max_tokens, "ends": sorted(ends), "lookup": lookup}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended; reading says how
        reply = self._read()
        return Run(**{**reply, "tokens": tuple(reply["tokens"])})

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what was asked last of a process that had ended
                    stream.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._said.seek(0)
        said = [text for text in self._said.read().splitlines() if text.strip()]
        raise PeerError(f"It ended with status {status}" + (f": {said[-1][:200]}" if said else "."))


class ProcessContender:
    """One way to ask a peer's process."""

    def __init__(self, name: str, process: PeerProcess, *, lookup: bool = False) -> None:
        self.name, self._process, self._lookup = name, process, lookup

    def run(self, prompt: Sequence[int], max_tokens: int, ends: Ends) -> Run:
        return self._process.ask(prompt, max_tokens, ends, self._lookup)


def why_no_llama_cpp(path: Path | None) -> str:
    """Return why llama.cpp cannot be compared, empty where it can be tried."""
    if importlib.util.find_spec("llama_cpp") is None:
        return "llama-cpp-python is not installed; `pip install llama-cpp-python` in .venv adds it."
    if path is None or path.suffix != ".gguf":
        return "llama.cpp reads .gguf files, and this model is a folder."
    return ""
