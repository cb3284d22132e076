"""One running app per data folder: an operating-system lock that dies with its holder, and a note of where it serves.

Standard library only. The note is a file of its own because a locked file cannot be read on Windows.
"""

import json
import os
import sys
from pathlib import Path
from typing import IO

__all__ = ["InstanceLock"]


class InstanceLock:
    """Held while the app runs; a crash releases it."""

    def __init__(self, data_dir: Path) -> None:
        self._lock_path = data_dir / "app.lock"
        self._note_path = data_dir / "app.url"
        self._file: IO[bytes] | None = None

    def acquire(self) -> bool:
        """Take the lock; False where another process holds it. Raises OSError for a folder that cannot be written."""
        self._lock_path.parent.mkdir(parents=True, exist_ok=True)
        file = self._lock_path.open("a+b")
        try:
            _lock(file)
        except OSError:
            file.close()
            return False
        self._file = file
        self._note_path.unlink(missing_ok=True)
        return True

    def publish(self, url: str) -> None:
        """Say where the holder serves, for the second start."""
        partial = self._note_path.with_suffix(".partial")
        partial.write_text(json.dumps({"url": url, "pid": os.getpid()}), encoding="utf-8")
        partial.replace(self._note_path)

    def holder_url(self) -> str | None:
        """Where the holder said it serves; None before it has said so."""
        try:
            return str(json.loads(self._note_path.read_text(encoding="utf-8"))["url"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def release(self) -> None:
        if self._file is not None:
            self._note_path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[bytes]) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(file: IO[bytes]) -> None:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
