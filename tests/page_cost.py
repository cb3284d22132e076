"""What the page costs: frame times while an answer streams, and the engine's speed beside `ask`'s.

`python tests/page_cost.py --out engine/bench/results/page_cost.json`. Frames: a conversation of 40 messages, an
answer at 200 tokens/s with trees of 64 nodes from the tests' stand-in for an engine, in headless Chromium. Engine: the
bundled model answers alternately through `stream` alone, with the app's work around it (trace, stats, saving), and with
a browser that looks; beside the speeds, the processor time that Chromium took for each second of an answer (Linux).
Needs Playwright and Chromium (CHROMIUM names one).
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

MESSAGES, TOKENS_PER_SECOND, TREE_NODES = 40, 200, 64
FRAMES = """() => {
    window.frames_ms = [];
    let last = performance.now();
    const frame = (now) => { window.frames_ms.push(now - last); last = now; requestAnimationFrame(frame); };
    requestAnimationFrame((now) => { last = now; requestAnimationFrame(frame); });
}"""
# Waiting in the page for what changes: Playwright's own waiting asks at every frame, and so causes sixty a second.
ANSWERED = """() => new Promise((done) => {
    const root = document.documentElement;
    let began = root.dataset.running === "yes";
    new MutationObserver((_, observer) => {
        if (root.dataset.running === "yes") began = true;
        else if (began) { observer.disconnect(); done(); }
    }).observe(root, {attributes: true, attributeFilter: ["data-running"]});
})"""
SETTLED_MS = 6000  # Gradio's picture of loading moves on for some seconds behind the page
PROMPT = "Tell a long story about a dragon and a knight."


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the page's frames and what it costs the engine.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("frames", "engine"))
    args = parser.parse_args()
    from browser import CHROMIUM_FLAGS, find_chromium
    from playwright.sync_api import sync_playwright

    report: dict[str, Any] = {"machine": _machine()}
    if args.only != "engine":
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=find_chromium(), args=list(CHROMIUM_FLAGS))
            report["frames"] = measure_frames(browser)
            browser.close()
        print(json.dumps(report["frames"]))
    if args.only != "frames":
        report["engine"] = measure_engine(args.rounds)
        print(json.dumps(report["engine"]))
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure_frames(browser: Any) -> dict[str, Any]:
    """Frame times in milliseconds while an answer streams below a long conversation, in Playwright's `browser`."""
    from browser import Page, running_server
    from fake_engine import PATTERN

    pace_s = (1 + sum(PATTERN) / len(PATTERN)) / TOKENS_PER_SECOND
    with tempfile.TemporaryDirectory() as folder:
        conversation = _long_conversation(Path(folder))
        with running_server(Path(folder), pace_s=pace_s, tree=TREE_NODES) as (url, _):
            page = Page(browser.new_page(viewport={"width": 1280, "height": 800}), url).open(f"?c={conversation}")
            page.page.wait_for_selector(f".message:nth-child({MESSAGES})")
            page.send("Go on")
            page.wait_for_answer(20)
            page.page.evaluate(FRAMES)
            page.page.evaluate(ANSWERED)
            frames = sorted(page.page.evaluate("window.frames_ms"))
            figures = page.figures()
            page.page.close()
    return {
        "messages": MESSAGES,
        "tree_nodes": TREE_NODES,
        "answer": figures,
        "frames": len(frames),
        "p50_ms": round(median(frames), 1),
        "p95_ms": round(frames[int(0.95 * (len(frames) - 1))], 1),
        "max_ms": round(frames[-1], 1),
    }


def _long_conversation(folder: Path) -> str:
    from fake_engine import REPLY

    from app.storage import ConversationStore

    store = ConversationStore(folder / "conversations.db")
    conversation = store.create_conversation()
    parent = None
    for number in range(MESSAGES):
        role, text = ("assistant", REPLY * 4) if number % 2 else ("user", f"Question {number} about dragons")
        parent = store.append(conversation.id, role, text, parent_id=parent).id
    store.close()
    return conversation.id


def measure_engine(rounds: int) -> dict[str, Any]:
    """Tokens a second, alternating: the engine alone, the app without a page, the app with a browser that looks."""
    from browser import CHROMIUM_FLAGS, find_chromium
    from playwright.sync_api import sync_playwright

    from app.chat import ChatSession
    from app.storage import ConversationStore
    from engine import SamplingParams
    from engine.bench.loading import load_engine

    engine = load_engine(device="cpu")
    params = SamplingParams()  # the page's own: a longer answer is a slower one
    speeds: dict[str, list[float]] = {"alone": [], "app": [], "browser": []}
    shares: list[float] = []
    with tempfile.TemporaryDirectory() as folder, _server_for(engine, Path(folder)) as (session, url):
        assert isinstance(session, ChatSession) and isinstance(session.store, ConversationStore)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=find_chromium(), args=list(CHROMIUM_FLAGS))
            for _ in range(rounds):
                *_, last = engine.stream([{"role": "user", "content": PROMPT}], params)
                speeds["alone"].append(last.result.tokens_per_second)
                speeds["app"].append(_answer(session, params))
                page = browser.new_page(viewport={"width": 1280, "height": 800})
                page.set_default_timeout(120_000)
                page.goto(url)
                page.wait_for_selector(".empty")
                page.fill("#composer-text textarea", PROMPT)
                page.wait_for_timeout(SETTLED_MS)
                began, used = time.perf_counter(), _chromium_s()
                page.keyboard.press("Enter")
                page.evaluate(ANSWERED)
                shares.append(round((_chromium_s() - used) / (time.perf_counter() - began), 3))
                speeds["browser"].append(_latest_speed(session))
                page.close()
            browser.close()
    medians = {name: round(median(values), 1) for name, values in speeds.items()}
    costs = {name: round(1 - medians[name] / medians["alone"], 3) for name in ("app", "browser")}
    return {
        "tokens_per_second": medians,
        "cost": costs,
        "chromium_cores": round(median(shares), 3),
        "rounds": rounds,
        "all": {**speeds, "chromium_cores": shares},
    }


def _chromium_s() -> float:
    """Processor seconds of all Chromium processes below this one so far; NaN where there is no /proc to read them."""
    if not Path("/proc/self/stat").exists():
        return float("nan")
    parents, seconds = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name, fields = (entry / "stat").read_text().rsplit(")", 1)
        except OSError:  # ended meanwhile
            continue
        values = fields.split()
        parents[int(entry.name)] = int(values[1])
        if "chrom" in name:
            seconds[int(entry.name)] = (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")
    return sum(spent for process, spent in seconds.items() if _is_below(process, parents))


def _is_below(process: int, parents: dict[int, int]) -> bool:
    while process in parents and process != os.getpid():
        process = parents[process]
    return process == os.getpid()


def _answer(session: Any, params: Any) -> float:
    turn = session.send(None, PROMPT, params.to_dict())
    answer = session.running(turn.conversation_id)
    if answer is not None:
        answer.finished.wait(120)
    return session.store.message(turn.answer_id).stats["tokens_per_second"]


def _latest_speed(session: Any) -> float:
    latest = max(session.store.conversations(), key=lambda each: each.created_ms)
    return session.store.thread(latest.id)[-1].stats["tokens_per_second"]


class _server_for:
    """The app over an engine that is loaded already, in threads of this process."""

    def __init__(self, engine: Any, folder: Path) -> None:
        import uvicorn
        from browser import free_port

        from app.chat import ChatSession
        from app.server import build_app
        from app.storage import ConversationStore

        self._store = ConversationStore(folder / "conversations.db")
        self._session = ChatSession(self._store, lambda progress: engine)
        self._url = f"http://127.0.0.1:{(port := free_port())}/"
        config = uvicorn.Config(build_app(self._session), port=port, log_level="error", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> tuple[Any, str]:
        self._session.start()
        self._thread.start()
        waiting = threading.Event()
        while not self._server.started and self._thread.is_alive():
            waiting.wait(0.05)
        return self._session, self._url

    def __exit__(self, *exc_info: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._session.close()
        self._store.close()


def _machine() -> dict[str, Any]:
    from engine.bench.hardware import usable_cores
    from engine.tuning import device_name

    # Others' work on the machine is part of what was measured: it is told.
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": device_name("cpu"),
        "usable_cores": usable_cores(),
        "python": platform.python_version(),
        "load_before": load,
    }


if __name__ == "__main__":
    sys.exit(main())
