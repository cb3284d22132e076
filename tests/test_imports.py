"""The table of ARCHITECTURE.md, "who may import whom", read from the source and held to."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
APP = sorted(path.stem for path in (ROOT / "app").glob("*.py") if path.stem != "__init__")

# Third parties with one home each, and the engine, which the app knows by its public names only.
ALLOWED = {
    "gradio": {"ui", "handlers", "server", "routes"},
    "sqlite_utils": {"database", "migrations"},
    "engine": {
        "ask",
        "cli_ask",
        "cli_bench",
        "cli_distill",
        "running_answer",
        "race",
        "saved_answers",
        "server",
        "settings",
        "title_queue",
        "titles",
        "chat",
        "chat_parts",
    },
    "torch": set(),
    "transformers": set(),
    "tkinter": set(),
}
# Commands that hand over to a tool of the engine's, by the one module that is its entrance.
ENTRANCES = {"cli_bench": "engine.bench.command", "cli_distill": "engine.training.distill_command"}
# Within the app, from the page down; a module may import those that stand below it.
LAYERS = [
    {"server"},
    {"ui", "routes"},
    {"handlers"},
    {"actions"},
    {"page_data", "trace", "status", "race"},
    {"chat"},
    {"kept_answer"},
    {"running_answer", "title_queue", "importing"},
    {"import_formats", "settings", "titles", "context", "chat_parts"},
    {"export", "search", "presets", "measured"},
    {"storage", "tree_view"},
    {"database"},
    {"records"},
    {"migrations", "local_only", "page_head", "single_instance"},
]


def imports_of(path: Path) -> set[tuple[str, str]]:
    """(module, name) of every import in a file, wherever it stands; names of `import x` are empty."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found |= {(node.module or "", alias.name) for alias in node.names}
    return found


def roots_of(path: Path) -> set[str]:
    return {module.split(".")[0] for module, _ in imports_of(path)}


def app_modules_in(path: Path) -> set[str]:
    found = imports_of(path)
    direct = {module.split(".")[1] for module, _ in found if module.startswith("app.")}
    return direct | {name for module, name in found if module == "app"}


@pytest.mark.parametrize("name", APP)
def test_app_module_imports_only_what_is_its_own(name: str) -> None:
    roots = roots_of(ROOT / "app" / f"{name}.py")
    for package, homes in ALLOWED.items():
        assert package not in roots or name in homes, f"app/{name}.py imports {package}"


@pytest.mark.parametrize("name", APP)
def test_app_knows_the_engine_by_its_public_names(name: str) -> None:
    public = set(importlib.import_module("engine").__all__)
    for module, imported in imports_of(ROOT / "app" / f"{name}.py"):
        if module.split(".")[0] == "engine" and module != ENTRANCES.get(name):
            assert module == "engine" and imported in public, f"app/{name}.py: from {module} import {imported}"


def test_page_modules_import_only_downwards() -> None:
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    for name, own in level.items():
        for other in app_modules_in(ROOT / "app" / f"{name}.py"):
            assert level.get(other, -1) > own, f"app/{name}.py imports app/{other}.py"


@pytest.mark.parametrize("path", sorted((ROOT / "engine").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_engine_knows_no_page_and_no_database(path: Path) -> None:
    assert not roots_of(path) & {"app", "gradio", "sqlite_utils", "sqlite3", "launcher"}


def test_inference_never_imports_training() -> None:
    for path in (ROOT / "engine").rglob("*.py"):
        if path.parent.name in ("training", "bench"):
            continue
        modules = {module for module, _ in imports_of(path)}
        assert not any(module.startswith(("engine.training", "engine.bench")) for module in modules), path


def test_launcher_is_standard_library_until_it_is_inside_its_environment() -> None:
    for name in ("launcher.py", "app/bootstrap.py", "app/__init__.py", "app/paths.py"):
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        top = {
            alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names
        } | {(node.module or "").split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert top <= {*sys.stdlib_module_names, "app"}, name
