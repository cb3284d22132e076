"""Start the app or one of its commands: the only entry point, and the only reader of argv.

Standard library only until it runs inside its own `.venv`, which the first start makes. The syntax in this file stays
readable for Python 3.6, so that an old Python gets a sentence and not a syntax error.
"""
# ruff: noqa: E402 - most imports have to wait for the check of the Python version

import os
import sys

ROOT = os.path.dirname(os.path.abspath(__file__))


def hold_window() -> None:
    """Keep a double-clicked window on Windows open until its last message is read."""
    # cmd.exe gives its children PROMPT and the file explorer does not; without cmd.exe the window closes with us.
    if sys.platform == "win32" and sys.stdin and sys.stdin.isatty() and "PROMPT" not in os.environ:
        input("Press Enter to close this window.")


if sys.version_info < (3, 11):  # noqa: UP036 - the check is the point: every import below needs 3.11
    found = ".".join(str(part) for part in sys.version_info[:3])
    sys.stderr.write(
        f"This app needs Python 3.11 or newer, and {sys.executable} is Python {found}: "
        "install a newer Python and start launcher.py with it.\n"
    )
    hold_window()
    sys.exit(1)

import argparse
import importlib
import traceback
from pathlib import Path
from typing import NamedTuple

from app import bootstrap, options


class Command(NamedTuple):
    """A subcommand: a module with `add_arguments(parser)` and `run(args) -> int`, and its line in --help.

    A module under `app.` is standard library only until `run`, so its arguments are checked before anything is
    installed; other modules are imported inside `.venv` alone. A module with `TAKES_EXTRA = True` gets the arguments
    that it does not define as `args.extra`.
    """

    module: str
    help: str
    uses_model: bool = False  # adds --model, --device, --quantize and --data-dir


START = Command("app.cli_app", "start the app and open it in the browser", uses_model=True)
COMMANDS = {
    "ask": Command("app.cli_ask", "answer prompts in the terminal, as text or as JSON", uses_model=True),
    "bench": Command("app.cli_bench", "measure this machine: Medusa on and off, and other programs", uses_model=True),
    "distill": Command("app.cli_distill", "let a model write its own training data"),
    "train": Command("engine.training.cli_train", "train draft heads on that data"),
    "calibrate": Command("engine.training.cli_calibrate", "measure draft heads and choose their candidate trees"),
    "export": Command("engine.models.cli_export", "write draft heads for another program"),
    "test": Command("app.cli_test", "run the tests (what follows goes to pytest)"),
}


def main(argv: list[str]) -> int:
    """Run the command that `argv` (without the program's name) asks for; return the exit code."""
    name = argv[0] if argv and not argv[0].startswith("-") else ""
    rest = argv[1:] if name else argv
    if name and name not in COMMANDS:
        return refuse(name)
    command = COMMANDS.get(name, START)
    root = Path(ROOT)
    inside = bootstrap.is_inside(root)
    # Bad input is told before a set-up of minutes; a command outside app/ cannot be imported before it.
    args = parse(name, command, rest) if inside or command.module.startswith("app.") else None
    own_options = rest[: rest.index("--")] if "--" in rest else rest
    repair = "--repair" in own_options
    if inside and not repair and bootstrap.inspect(root) is bootstrap.State.READY:
        return importlib.import_module(command.module).run(args)
    if inside:  # an environment cannot rebuild the Python that it runs in: the one that made it does
        return bootstrap.hand_over(bootstrap.base_python(), root, argv)
    bootstrap.ensure(root, repair=repair)
    return bootstrap.hand_over(bootstrap.venv_python(root), root, [word for word in argv if word != "--repair"])


def parse(name: str, command: Command, rest: list[str]) -> argparse.Namespace:
    """Parse a command's arguments; SystemExit with 0 after --help, with 2 and one sentence on bad input."""
    module = importlib.import_module(command.module)
    parser = options.Parser(
        prog=("python launcher.py " + name).strip(),
        description=command.help[:1].upper() + command.help[1:] + ".",
        epilog=getattr(module, "EPILOG", None) if name else overview(),
    )
    module.add_arguments(parser)
    if command.uses_model:
        options.add_model_options(parser)
    options.add_repair_option(parser)
    args, extra = parser.parse_known_args(rest)
    if extra and extra[0] in COMMANDS and not name:
        parser.error(f"the command {extra[0]} comes before its options")
    if extra and not getattr(module, "TAKES_EXTRA", False):
        parser.error(f"there is no argument {extra[0]}")
    args.extra = extra
    return args


def overview() -> str:
    """Return the part of --help that lists the commands."""
    lines = [f"  {name:<12}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(["commands (python launcher.py COMMAND --help says more):", *lines])


def refuse(name: str) -> int:
    sys.stderr.write(
        f"There is no command {name!r}; the commands are {', '.join(COMMANDS)}, and no command starts the app.\n"
    )
    return 2


def guarded(argv: list[str]) -> int:
    """Run `main`; turn what a person can act on into one sentence and an exit code."""
    try:
        return main(argv)
    except bootstrap.SetupError as error:
        sys.stderr.write(f"{error}\n")
    except KeyboardInterrupt:
        sys.stderr.write("Stopped.\n")
        return 130
    except Exception:  # the last frame of the program: a window that closes must not take the reason with it
        traceback.print_exc()
    hold_window()
    return 1


if __name__ == "__main__":
    sys.exit(guarded(sys.argv[1:]))
