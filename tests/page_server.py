"""A server for browser tests in a process of its own, as a person would run it.

`python tests/page_server.py '{"port": 1, "data_dir": "...", "pace_s": 0.02, ...}'`: with the fake engine, or with the
bundled model for `"engine": "real"`.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from fake_engine import INFO, REPLY, FakeEngine, large_shape  # noqa: E402

from app.chat import LoadEngine  # noqa: E402
from app.server import run_server, serve  # noqa: E402
from engine import EngineError  # noqa: E402


def main(options: dict[str, Any]) -> int:
    port, data_dir = options["port"], Path(options["data_dir"])
    if options.get("engine") == "real":
        return serve(port=port, data_dir=data_dir, open_browser=False, device="cpu", model="bundled", quantize="auto")
    info = (
        replace(INFO, has_heads=False, num_heads=0, heads_reason="the heads do not fit this model")
        if options.get("no_heads")
        else INFO
    )
    shape = large_shape(options["tree"], options.get("depth", 5)) if "tree" in options else None
    info = replace(info, max_context=options.get("max_context", info.max_context))
    reply = options.get("reply", REPLY)
    engine = FakeEngine(
        reply=reply, pace_s=options.get("pace_s", 0.01), info=info, fail_after=options.get("fail_after"), shape=shape
    )
    titles = options.get("titles", False)
    load = _loading(engine, options.get("load_s", 0), options.get("load_error", ""))
    return run_server(load, port=port, data_dir=data_dir, open_browser=False, titles=titles)


def _loading(engine: FakeEngine, load_s: float, error: str) -> LoadEngine:
    """A loader that takes its time, or fails with `error`."""

    def load(progress: Callable[[str], None]) -> FakeEngine:
        progress("Reading Fake-135M")
        threading.Event().wait(load_s)
        if error:
            raise EngineError(error)
        return engine

    return load


if __name__ == "__main__":
    code = main(json.loads(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)  # Gradio leaves threads behind that would hold the process
