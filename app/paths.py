"""Where the app keeps what a person would miss: conversations, settings, tuned trees.

Standard library only, because the launcher names the default in its help before anything is installed.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["default_data_dir"]

FOLDER_NAME = "medusa-chat"


def default_data_dir(
    platform: str = sys.platform, environ: Mapping[str, str] = os.environ, home: Path | None = None
) -> Path:
    """Return the per-user data folder of this platform; it need not exist yet."""
    home = home or Path.home()
    if platform == "win32":
        return Path(environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / FOLDER_NAME
    if platform == "darwin":
        return home / "Library" / "Application Support" / FOLDER_NAME
    # The XDG rules say that a relative path in the variable is to be ignored.
    chosen = Path(environ.get("XDG_DATA_HOME", ""))
    return (chosen if chosen.is_absolute() else home / ".local" / "share") / FOLDER_NAME
