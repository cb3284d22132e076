"""axe-core for the accessibility tests: fetched once through npm into a cache of the tests, never part of the app."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

VERSION = "4.14.1"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medusa-chat-tests"


def axe_script() -> str:
    """The script's text; without it and without npm the test is skipped, or fails where CI is set."""
    kept = CACHE / f"axe-{VERSION}.min.js"
    if not kept.is_file() and (reason := _fetch(kept)):
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return kept.read_text(encoding="utf-8")


def _fetch(kept: Path) -> str:
    """Put the script into the cache; returns why that was not possible."""
    npm = shutil.which("npm")
    if npm is None:
        return f"axe-core is not in {CACHE} and there is no npm to fetch it; install npm"
    CACHE.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", f"axe-core@{VERSION}", "--silent", "--ignore-scripts", "--pack-destination", str(CACHE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=CACHE)
    if done.returncode:
        return f"npm could not fetch axe-core: {done.stderr.strip()[-300:]}"
    packed = CACHE / f"axe-core-{VERSION}.tgz"
    with tarfile.open(packed) as archive:
        script = archive.extractfile("package/axe.min.js")
        assert script is not None, f"{packed} holds no axe.min.js"
        kept.write_bytes(script.read())
    packed.unlink()
    return ""
