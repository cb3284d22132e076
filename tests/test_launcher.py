"""The launcher as a person runs it: as a process, from a folder with spaces, with small stand-ins for the engine,
the server and pytest, so that nothing needs to be installed."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from app import bootstrap

REPOSITORY = Path(__file__).resolve().parent.parent

ENGINE = """
import os, signal
from dataclasses import dataclass
from engine.records import EngineInfo, GenerationChunk, GenerationResult

class EngineError(Exception):
    pass

@dataclass(frozen=True)
class SamplingParams:
    medusa: bool = True
    temperature: float = 0.0
    seed: int | None = None
    max_tokens: int = 512
    tree_nodes: int | None = None
    acceptance: str = "exact"

    @classmethod
    def from_dict(cls, values):
        return cls(**values)

    def __post_init__(self):
        if self.temperature > 5:
            raise EngineError(f"temperature is {self.temperature};\\nallowed is 0 to 5.")

class Engine:
    info = EngineInfo("stand-in", "cpu", "none", 100, has_heads=True)

    @classmethod
    def load(cls, model, *, device, quantize, heads, progress):
        progress("loading")
        print("a library that prints")
        cls.loaded = f"{model} {device} {quantize} {heads}"
        return cls()

    def stream(self, messages, params, stop=None):
        text = f"{messages[-1]['content']} | {self.loaded} | {params.tree_nodes} {params.acceptance}"
        if messages[-1]["content"] == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        reason = "cancelled" if stop.is_set() else "stop"
        yield GenerationChunk(text)
        yield GenerationChunk("", result=GenerationResult(
            text, (1, 2), 3, 0, reason, params.medusa, 1, 2.0, (1.0,), 1, 10.0, 5.0, "cpu", "none", params.seed or 0))
"""
SERVER = """
def serve(**settings):
    print(sorted((key, str(value)) for key, value in settings.items()))
    return 7
"""
PYTEST = """
import os, sys
def main(args):
    print(args, os.path.basename(os.getcwd()), sys.prefix)
    return 5
"""


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks set up: the real launcher, an empty environment with its stamp, stand-ins beside it."""
    root = tmp_path_factory.mktemp("launcher") / "a folder with spaces"
    shutil.copytree(REPOSITORY / "app", root / "app", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("launcher.py", "requirements.txt"):
        shutil.copy(REPOSITORY / name, root / name)
    (root / "engine").mkdir()
    shutil.copy(REPOSITORY / "engine" / "records.py", root / "engine" / "records.py")
    (root / "engine" / "__init__.py").write_text(ENGINE)
    (root / "app" / "server.py").write_text(SERVER)
    (root / "pytest.py").write_text(PYTEST)
    subprocess.run([bootstrap.base_python(), "-m", "venv", "--without-pip", root / ".venv"], check=True)
    bootstrap.write_stamp(root)
    return root


def launch(root: Path, *words: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """Start the launcher with a Python from outside the environment, as a person does."""
    command = [str(bootstrap.base_python()), str(root / "launcher.py"), *words]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False, **settings)  # type: ignore[call-overload]


def test_file_is_readable_for_python_3_6() -> None:
    ast.parse((REPOSITORY / "launcher.py").read_text(encoding="utf-8"), feature_version=(3, 6))


def test_old_python_gets_one_sentence() -> None:
    pretend = "import runpy, sys; sys.version_info = (3, 9, 1); runpy.run_path('launcher.py', run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", pretend], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "needs Python 3.11 or newer" in ended.stderr
    assert "Python 3.9.1" in ended.stderr


@pytest.mark.parametrize("words", [("--help",), ("ask", "--help"), ("test", "--help")])
def test_help_needs_no_environment(tmp_path: Path, words: tuple[str, ...]) -> None:
    shutil.copytree(REPOSITORY / "app", tmp_path / "app", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "launcher.py", tmp_path)
    ended = launch(tmp_path, *words)
    assert ended.returncode == 0
    assert ended.stdout.startswith("usage: python launcher.py")
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("frob", "There is no command 'frob'"),
        ("--port 99999", "99999 is not a whole number from 1 to 65535"),
        ("--port x", "'x' is not a whole number"),
        ("--device gpu", "invalid choice: 'gpu'"),
        ("--quantize int3", "invalid choice: 'int3'"),
        ("--data-dir launcher.py", "is a file, not a folder"),
        ("--pot 5", "There is no argument --pot"),
        ("--repair ask", "The command ask comes before its options"),
        ("ask", "PROMPT --prompts --from-message is required"),
        ("ask hi there", "There is no argument there"),
        ("ask hi --prompts x.jsonl", "not allowed with"),
        ("ask --prompts missing.jsonl", "missing.jsonl cannot be read"),
        ("ask hi --temperature warm", "'warm' is not a number"),
        ("ask hi --temperature nan", "'nan' is not a number"),
        ("ask hi --temperature 9", "temperature is 9.0; allowed is 0 to 5."),
        ("ask hi --seed -1", "-1 is not a whole number"),
        ("ask hi --max-tokens 0", "0 is not a whole number"),
        ("ask hi --tree-nodes many", "'many' is not a whole number"),
        ("ask hi --medusa maybe", "invalid choice: 'maybe'"),
        ("ask hi --acceptance lax", "invalid choice: 'lax'"),
        ("ask hi --preset bold", "invalid choice: 'bold'"),
        ("ask hi --top-k -1", "-1 is not a whole number"),
        ("ask hi --logit-bias 5", "'5' is not a token id and a bias such as 42=-1.5"),
        ("ask hi --from-message x", "not allowed with"),
        ("ask --from-message x --top-p 0.5", "takes the kept answer's own settings; leave out --top-p"),
        ("ask --from-message x --system S", "leave out --system"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_sentence(ready: Path, line: str, words: str) -> None:
    ended = launch(ready, *line.split(), cwd=ready)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
    assert words in ended.stderr


def test_empty_prompt_is_refused(ready: Path) -> None:
    ended = launch(ready, "ask", " ")
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert "empty prompt" in ended.stderr


def test_ask_writes_text_alone_to_standard_output(ready: Path) -> None:
    ended = launch(ready, "ask", "héllo wörld", "--model", "m", "--device", "cpu", "--heads", "none")
    assert ended.returncode == 0
    assert ended.stdout == "héllo wörld | m cpu auto None | None exact\n"
    assert "a library that prints" in ended.stderr


def test_ask_json_and_prompts_file(ready: Path, tmp_path: Path) -> None:
    (tmp_path / "some prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    words = ("--prompts", "some prompts.jsonl", "--medusa", "off", "--tree-nodes", "8", "--seed", "3")
    ended = launch(ready, "ask", *words, cwd=tmp_path)
    records = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0
    assert [record["text"].split(" | ")[0] for record in records] == ["one", "two"]
    assert [(record["medusa"], record["seed"]) for record in records] == [(False, 3)] * 2
    assert records[0]["text"].endswith("| 8 exact")


@pytest.mark.skipif(os.name == "nt", reason="a process cannot send itself Ctrl+C on Windows")
def test_ctrl_c_keeps_the_partial_answer(ready: Path) -> None:
    ended = launch(ready, "ask", "interrupt", "--json")
    assert ended.returncode == 130
    assert json.loads(ended.stdout)["finish_reason"] == "cancelled"
    assert "Traceback" not in ended.stderr


@pytest.mark.skipif(os.name == "nt", reason="pipes close differently on Windows")
def test_reader_that_has_enough_is_no_crash(ready: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [str(bootstrap.base_python()), str(ready / "launcher.py"), "ask", "hi"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "Exception" not in ended.stderr


def test_app_gets_its_settings_and_gives_its_exit_code(ready: Path, tmp_path: Path) -> None:
    ended = launch(ready, "--port", "8123", "--no-browser", "--data-dir", "my data", cwd=tmp_path)
    assert ended.returncode == 7
    assert dict(ast.literal_eval(ended.stdout)) == {
        "port": "8123",
        "open_browser": "False",
        "data_dir": str(tmp_path / "my data"),
        "device": "auto",
        "model": "bundled",
        "quantize": "auto",
    }


def test_test_command_gives_pytest_its_arguments_inside_the_environment(ready: Path, tmp_path: Path) -> None:
    ended = launch(ready, "test", "-k", "tree or heads", "-x", "tests/test_tree.py", cwd=tmp_path)
    assert ended.returncode == 5
    assert ended.stdout.startswith("['-k', 'tree or heads', '-x', 'tests/test_tree.py'] a folder with spaces")
    assert ended.stdout.strip().endswith(str(Path("a folder with spaces", ".venv")))


def test_command_outside_app_is_imported_inside_the_environment_alone(ready: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(ready, root, symlinks=True)
    text = (root / "launcher.py").read_text(encoding="utf-8")
    added = text.replace('    "ask": ', '    "heavy": Command("engine.cli_heavy", "do heavy work"),\n    "ask": ')
    (root / "launcher.py").write_text(added, encoding="utf-8")
    (root / "engine" / "cli_heavy.py").write_text(
        "import sys\n"
        "assert sys.prefix != sys.base_prefix\n"
        "def add_arguments(parser): parser.add_argument('--steps', type=int)\n"
        "def run(args): return args.steps\n"
    )
    assert launch(root, "heavy", "--steps", "9").returncode == 9
    assert launch(root, "heavy", "--steps", "x").returncode == 2
    assert "do heavy work" in launch(root, "--help").stdout


def test_environment_s_own_python_goes_straight_on(ready: Path) -> None:
    command = [str(bootstrap.venv_python(ready)), str(ready / "launcher.py"), "--no-browser"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 7


def test_set_up_that_cannot_go_on_is_one_sentence(ready: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(ready, root, ignore=shutil.ignore_patterns(".venv", "__pycache__"))
    (root / ".venv").mkdir()
    (root / ".venv" / "own.txt").write_text("not made by the launcher")
    ended = launch(root, "--no-browser")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.count("\n") == 1
    assert "--repair" in ended.stderr
