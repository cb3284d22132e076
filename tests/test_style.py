"""The tools' verdict on the source: ruff's on all of it, mypy's on what runs. Their settings are in pyproject.toml."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def verdict(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed; it is one of requirements.txt")
    return subprocess.run([sys.executable, "-m", tool, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_ruff_finds_nothing() -> None:
    done = verdict("ruff", "check", "--output-format", "concise", ".")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_mypy_finds_nothing() -> None:
    # The stubs of installed packages may be written for the Python that runs, and not for the oldest one.
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    done = verdict("mypy", "--python-version", version, "engine", "app", "launcher.py")
    assert done.returncode == 0, done.stdout + done.stderr
