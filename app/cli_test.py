"""The command `test`: run pytest on this folder, inside `.venv`.

Standard library only until `run`. It knows where a Chromium for the browser tests may be; which tests a machine
without one, or without a GPU, leaves out is for conftest.py to say.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["EPILOG", "TAKES_EXTRA", "add_arguments", "find_chromium", "run"]

TAKES_EXTRA = True  # unknown arguments are pytest's
EPILOG = """\
Without arguments all tests run. Tests for a GPU, and browser tests where no Chromium is found (name one in the
environment variable CHROMIUM), are skipped with the reason.

examples:
  python launcher.py test
  python launcher.py test -k tree -x"""

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [pytest arguments ...]"


def find_chromium(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the path of a Chromium: the one that CHROMIUM names, else the first on PATH; None when there is none."""
    named = environ.get("CHROMIUM")
    if named:
        return named if Path(named).is_file() else None
    found = (shutil.which(name, path=environ.get("PATH")) for name in CHROMIUM_NAMES)
    return next((path for path in found if path), None)


def run(args: argparse.Namespace) -> int:
    """Run pytest with the arguments in `args.extra`; return its exit code."""
    import pytest  # here, not above: it is there only inside .venv

    os.chdir(Path(__file__).resolve().parent.parent)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a report must not fail to print
    return int(pytest.main(args.extra))
