"""The launcher's default command: start the local server and open the page in a browser.

Standard library only until `run`; the page and its server know nothing of the command line.
"""

import argparse
from pathlib import Path

from app import shortcut
from app.options import whole_number

__all__ = ["add_arguments", "run"]

ROOT = Path(__file__).resolve().parent.parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--port", type=whole_number(1, 65535), metavar="N", help="port on 127.0.0.1 (default: a free one is found)"
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open the page in the browser")
    parser.add_argument(
        "--shortcut", action="store_true", help="put an entry that starts the app on the desktop, and end"
    )


def run(args: argparse.Namespace) -> int:
    """Serve the app until it is stopped; return the exit code."""
    if args.shortcut:
        return shortcut.main(ROOT)
    from app.server import serve  # here, not above: it needs gradio, which --help must not

    return serve(
        port=args.port,
        data_dir=args.data_dir,
        open_browser=not args.no_browser,
        device=args.device,
        model=args.model,
        quantize=args.quantize,
    )
