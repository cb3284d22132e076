"""What the browser tests share: a Chromium that reaches nothing but this machine, and a server in its own process."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
READY_S = 90


def find_chromium() -> str:
    """The browser to drive; without one the test is skipped, or fails where a CI promised to have one."""
    named = os.environ.get("CHROMIUM")
    found = named or next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)
    if found:
        return found
    reason = "no Chromium: set CHROMIUM to one, or install the package `chromium`"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running_server(data_dir: Path, **options: Any) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start tests/page_server.py and wait until it says where it is: (address, process)."""
    arguments = json.dumps({"port": free_port(), "data_dir": str(data_dir), **options})
    script = Path(__file__).resolve().parent / "page_server.py"
    process = subprocess.Popen([sys.executable, str(script), arguments], stderr=subprocess.PIPE, text=True)
    try:
        yield _address_of(process), process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address_of(process: subprocess.Popen[str]) -> str:
    """Read what the server says until it names its address; go on reading, so that it never blocks on a full pipe."""
    lines: list[str] = []
    known = threading.Event()
    assert process.stderr is not None

    def read() -> None:
        for line in process.stderr:
            lines.append(line)
            if "http://127.0.0.1:" in line:
                known.set()
        known.set()

    threading.Thread(target=read, daemon=True).start()
    known.wait(READY_S)
    address = next((word for line in lines for word in line.split() if word.startswith("http://127.0.0.1:")), None)
    assert address, f"the server did not start: {''.join(lines)}"
    return address


class Page:
    """The page as a person uses it, over a Playwright page; every wait has a limit."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.address = page, address
        self.answers = 1
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.set_default_timeout(30_000)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("websocket", lambda socket: self.requests.append(socket.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))

    def open(self, query: str = "") -> "Page":
        self.page.goto(self.address + query)
        self.page.wait_for_selector("#thread .empty, #thread .messages:not([hidden])")
        return self

    def send(self, text: str) -> None:
        self.answers = self.page.locator(".message.assistant").count() + 1
        self.page.fill("#composer-text textarea", text)
        self.page.keyboard.press("Enter")

    def answer(self, number: int = -1) -> str:
        bodies = self.page.locator(".message.assistant .body").all_inner_texts()
        return bodies[number] if bodies else ""

    def wait_for_answer(self, length: int = 1) -> str:
        """Wait until the last answer has at least `length` characters."""
        self.page.wait_for_function(
            "n => ([...document.querySelectorAll('.message.assistant .body')].at(-1)?.innerText || '').length >= n",
            arg=length,
        )
        return self.answer()

    def wait_for_end(self, limit_s: float = 60) -> None:
        """Wait until the answer to the last `send` is there and has ended."""
        self.page.wait_for_function(
            """n => {
              const answers = document.querySelectorAll(".message.assistant");
              const status = answers[n - 1]?.dataset.status || "running";
              return !["running", "waiting"].includes(status) && document.documentElement.dataset.running === "no";
            }""",
            arg=self.answers,
            timeout=limit_s * 1000,
        )

    def figures(self, number: int = -1) -> str:
        return self.page.locator(".message.assistant .figures").all_inner_texts()[number]

    def assert_local_and_quiet(self) -> None:
        """No request left this machine and no script failed."""
        outside = [url for url in self.requests if not url.startswith((self.address, "data:", "blob:"))]
        assert outside == []
        assert self.errors == []
