"""`--shortcut`: an entry with an icon on the desktop that starts the app, in each system's own form.

Linux gets a .desktop file, macOS a .command file, Windows a .lnk (or a .bat where none can be made). The window stays
open after a failure, so that its reason can be read. Standard library only.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["ShortcutError", "create_shortcut", "desktop_folder", "main"]

NAME = "Medusa Chat"
ABOUT = "Chat with a local language model, made faster by draft heads"

Run = Callable[[Sequence[str]], int]


class ShortcutError(Exception):
    """The entry could not be written; the sentence says where and what to do."""


def create_shortcut(root: Path, folder: Path, platform: str, python: str, run: Run | None = None) -> Path:
    """Write the entry for `platform` (as `sys.platform` names it) into `folder`; return its path.

    `root` is the app's folder, `python` the interpreter that starts launcher.py. Raises ShortcutError.
    """
    run = run or _run
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if platform == "win32":
            return _windows(root, folder, python, run)
        if platform == "darwin":
            return _macos(root, folder, python, run)
        return _linux(root, folder, python, run)
    except OSError as error:
        raise ShortcutError(f"The shortcut in {folder} cannot be written ({error}); check the folder.") from error


def desktop_folder(platform: str, home: Path) -> Path:
    """Where a double-click is expected: the desktop, or on Linux without one the applications' menu."""
    named = _xdg_desktop(home) if platform.startswith("linux") else None
    desktop = named or home / "Desktop"
    if desktop.is_dir() or not platform.startswith("linux"):
        return desktop
    return home / ".local/share/applications"


def _linux(root: Path, folder: Path, python: str, run: Run) -> Path:
    entry = folder / "medusa-chat.desktop"
    lines = [
        "[Desktop Entry]",
        "Type=Application",
        f"Name={NAME}",
        f"Comment={ABOUT}",
        f"Exec={_desktop_exec(['sh', '-c', _shell_line(root, python)])}",
        f"Path={root}",
        f"Icon={root / 'assets/icons/medusa.svg'}",
        "Terminal=true",
        "Categories=Utility;Chat;",
    ]
    entry.write_text("\n".join(lines) + "\n", encoding="utf-8")
    entry.chmod(0o755)
    run(["gio", "set", str(entry), "metadata::trusted", "true"])  # GNOME asks otherwise; elsewhere it changes nothing
    return entry


def _macos(root: Path, folder: Path, python: str, run: Run) -> Path:
    entry = folder / f"{NAME}.command"
    entry.write_text(f"#!/bin/sh\n{_shell_line(root, python)}\n", encoding="utf-8")
    entry.chmod(0o755)
    icon = root / "assets/icons/medusa.png"
    script = (
        "function run(names) { ObjC.import('AppKit'); "
        "const image = $.NSImage.alloc.initWithContentsOfFile(names[0]); "
        "$.NSWorkspace.sharedWorkspace.setIconForFileOptions(image, names[1], 0); }"
    )
    run(["osascript", "-l", "JavaScript", "-e", script, str(icon), str(entry)])
    return entry


def _windows(root: Path, folder: Path, python: str, run: Run) -> Path:
    batch = root / "medusa-chat.bat"
    batch.write_bytes(_batch(root, python))
    entry = folder / f"{NAME}.lnk"
    made = run(["powershell", "-NoProfile", "-NonInteractive", "-Command", _link_script(root, batch, entry)])
    if made == 0 and entry.exists():
        return entry
    fallback = folder / f"{NAME}.bat"
    fallback.write_bytes(_batch(root, python))
    return fallback


def _shell_line(root: Path, python: str) -> str:
    """Start the app; after a failure wait until its message was read."""
    start = f"cd {shlex.quote(str(root))} && {shlex.quote(python)} launcher.py"
    return f"{{ {start}; }} || {{ printf '\\nPress Enter to close this window. '; read -r _; }}"


def _desktop_exec(words: Sequence[str]) -> str:
    """Quote an Exec line: a double-quoted word, its own escapes once more for the string type of the file."""
    quoted = []
    for word in words:
        for character in '\\"`$':
            word = word.replace(character, "\\" + character)
        quoted.append('"' + word.replace("\\", "\\\\").replace("%", "%%") + '"')
    return " ".join(quoted)


def _batch(root: Path, python: str) -> bytes:
    lines = [
        "@echo off",
        "chcp 65001 >nul",  # the lines below are UTF-8: a user's name may not be ASCII
        f"title {NAME}",
        f'cd /d "{_percent(str(root))}"',
        f'"{_percent(python)}" launcher.py',
        "if errorlevel 1 pause",
        "",
    ]
    return "\r\n".join(lines).encode("utf-8")


def _percent(path: str) -> str:
    return path.replace("%", "%%")


def _link_script(root: Path, batch: Path, entry: Path) -> str:
    values = {
        "TargetPath": batch,
        "WorkingDirectory": root,
        "IconLocation": f"{root / 'assets/icons/medusa.ico'},0",
        "Description": ABOUT,
    }
    settings = "; ".join(f"$link.{name} = {_powershell(str(value))}" for name, value in values.items())
    shell = "$link = (New-Object -ComObject WScript.Shell).CreateShortcut"
    return f"$ErrorActionPreference = 'Stop'; {shell}({_powershell(str(entry))}); {settings}; $link.Save()"


def _powershell(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _xdg_desktop(home: Path) -> Path | None:
    """The desktop's folder under the name that the person's language gives it."""
    try:
        lines = (home / ".config/user-dirs.dirs").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for line in lines:
        name, _, value = line.partition("=")
        if name.strip() == "XDG_DESKTOP_DIR":
            return Path(value.strip().strip('"').replace("$HOME", str(home)))
    return None


def _run(command: Sequence[str]) -> int:
    """Run a helper of the system; where it is missing, -1."""
    try:
        return subprocess.run(command, capture_output=True, timeout=30, env=os.environ.copy()).returncode
    except (OSError, subprocess.TimeoutExpired):
        return -1


def main(root: Path) -> int:
    """Make the shortcut for the person who runs this; return the exit code."""
    try:
        entry = create_shortcut(root, desktop_folder(sys.platform, Path.home()), sys.platform, _base_python())
    except ShortcutError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{entry} starts the app from now on.")
    return 0


def _base_python() -> str:
    """The Python that .venv was made with: it can rebuild .venv, which .venv's own cannot."""
    return getattr(sys, "_base_executable", None) or sys.executable
