"""The desktop's entry: its content for each system, and that a shell really keeps a failure readable."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from app.shortcut import ShortcutError, create_shortcut, desktop_folder

ASSETS = Path(__file__).resolve().parent.parent / "assets"
ODD = "A person's $HOME `100%` \"app\""


class Recorder:
    """Stands for the system's helpers: records what it is asked and answers with `code`."""

    def __init__(self, code: int = 0, makes: Path | None = None) -> None:
        self.commands: list[list[str]] = []
        self._code, self._makes = code, makes

    def __call__(self, command: Sequence[str]) -> int:
        self.commands.append(list(command))
        if self._makes:
            self._makes.write_bytes(b"L")
        return self._code


def exec_words(line: str) -> list[str]:
    """Read an Exec line as the Desktop Entry Specification says: string escapes, then quotes, then field codes."""
    text = re.sub(r"\\(.)", r"\1", line)
    words = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
    return [re.sub(r"\\(.)", r"\1", word).replace("%%", "%") for word in words]


@pytest.mark.skipif(sys.platform == "win32", reason="runs sh")
@pytest.mark.parametrize("code", [0, 3])
def test_desktop_entry_starts_the_app_and_waits_only_after_a_failure(tmp_path: Path, code: int) -> None:
    root = tmp_path / ODD
    root.mkdir()
    (root / "launcher.py").write_text(f"import sys; print('reason'); sys.exit({code})")
    entry = create_shortcut(root, tmp_path / "Desktop", "linux", sys.executable, Recorder())
    values = dict(line.split("=", 1) for line in entry.read_text().splitlines() if "=" in line)
    assert entry.name == "medusa-chat.desktop" and entry.stat().st_mode & 0o111
    assert values["Type"] == "Application" and values["Terminal"] == "true"
    assert values["Icon"] == str(root / "assets/icons/medusa.svg") and (ASSETS / "icons/medusa.svg").is_file()
    done = subprocess.run(exec_words(values["Exec"]), input="\n", capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("reason\n")
    assert ("Press Enter to close this window." in done.stdout) is (code != 0)


@pytest.mark.skipif(sys.platform == "win32", reason="runs sh")
def test_command_file_runs_and_gets_the_icon(tmp_path: Path) -> None:
    root = tmp_path / ODD
    root.mkdir()
    (root / "launcher.py").write_text("print('started')")
    system = Recorder()
    entry = create_shortcut(root, tmp_path, "darwin", sys.executable, system)
    assert entry.suffix == ".command" and entry.stat().st_mode & 0o111
    assert subprocess.run([entry], capture_output=True, text=True, timeout=60).stdout == "started\n"
    [command] = system.commands
    assert command[0] == "osascript" and command[-2:] == [str(root / "assets/icons/medusa.png"), str(entry)]
    assert (ASSETS / "icons/medusa.png").read_bytes().startswith(b"\x89PNG")


def test_windows_gets_a_link_with_the_icon(tmp_path: Path) -> None:
    link = tmp_path / "Desktop" / "Medusa Chat.lnk"
    system = Recorder(makes=link)
    assert create_shortcut(tmp_path, link.parent, "win32", r"C:\Python\python.exe", system) == link
    [command] = system.commands
    assert command[0] == "powershell"
    assert f"$link.IconLocation = '{tmp_path / 'assets/icons/medusa.ico'},0'" in command[-1]
    assert f"$link.TargetPath = '{tmp_path / 'medusa-chat.bat'}'" in command[-1]
    assert (ASSETS / "icons/medusa.ico").read_bytes().startswith(b"\x00\x00\x01\x00")


def test_windows_without_powershell_gets_a_batch_file_that_shows_errors(tmp_path: Path) -> None:
    root = tmp_path / "100% Jürgen"
    root.mkdir()
    entry = create_shortcut(root, tmp_path, "win32", r"C:\Python\python.exe", Recorder(code=-1))
    lines = entry.read_bytes().decode("utf-8").split("\r\n")
    assert entry.name == "Medusa Chat.bat" and lines[0] == "@echo off"
    assert f'cd /d "{str(root).replace("%", "%%")}"' in lines
    assert lines.index('"C:\\Python\\python.exe" launcher.py') + 1 == lines.index("if errorlevel 1 pause")


def test_desktop_is_found_under_its_own_name_or_the_menu_is_used(tmp_path: Path) -> None:
    assert desktop_folder("linux", tmp_path) == tmp_path / ".local/share/applications"
    (tmp_path / "Bureau").mkdir()
    (tmp_path / ".config").mkdir()
    (tmp_path / ".config/user-dirs.dirs").write_text('# by xdg\nXDG_DESKTOP_DIR="$HOME/Bureau"\n')
    assert desktop_folder("linux", tmp_path) == tmp_path / "Bureau"
    assert desktop_folder("darwin", tmp_path) == desktop_folder("win32", tmp_path) == tmp_path / "Desktop"


def test_unwritable_folder_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ShortcutError, match="cannot be written"):
        create_shortcut(tmp_path, tmp_path / "file", "linux", "python3", Recorder())
