"""Shared fixtures (the bundled model, read once), and reasons to leave out what this machine cannot run.

A CI machine has to have a browser: there a missing one is a failure.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import CHROMIUM_FLAGS, Page
from browser import find_chromium as browser_path
from fake_engine import FakeEngine, loader

from app.chat import ChatSession
from app.cli_test import find_chromium
from app.storage import ConversationStore
from engine import Engine
from engine.models.loader import LoadedModel, open_model


@pytest.fixture(scope="session")
def bundled() -> LoadedModel:
    return open_model("bundled")


@pytest.fixture(scope="session")
def engine() -> Engine:
    loaded = Engine.load("bundled", device="cpu")
    loaded.learns = False  # what tests ask is not what people ask
    return loaded


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """One browser for all tests; each opens contexts of its own."""
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=list(CHROMIUM_FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, address: str) -> Iterator[Page]:
    """A page of its own, 1280 pixels wide, on the server that the module's `address` names."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    shown = Page(context.new_page(), address)
    yield shown.open()
    context.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ConversationStore]:
    opened = ConversationStore(tmp_path / "chat.db")
    yield opened
    opened.close()


@pytest.fixture
def start(store: ConversationStore) -> Iterator[Callable[..., ChatSession]]:
    """Sessions over stand-ins for an engine; closed at the end."""
    sessions: list[ChatSession] = []

    def begin(engine: FakeEngine | None = None, load: Any = None, **options: bool) -> ChatSession:
        session = ChatSession(store, load or loader(engine or FakeEngine()), **options)
        session.start()
        sessions.append(session)
        return session

    yield begin
    for session in sessions:
        session.close()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    _skip(items, "gpu", _why_no_gpu)
    _skip(items, "browser", _why_no_browser)


def _skip(items: Sequence[pytest.Item], marker: str, why_not) -> None:
    marked = [item for item in items if item.get_closest_marker(marker)]
    reason = why_not() if marked else ""
    for item in marked if reason else []:
        item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu() -> str:
    import torch  # only where a GPU test was collected: it takes seconds to import

    return "" if torch.cuda.is_available() else "no CUDA device"


def _why_no_browser() -> str:
    chromium = find_chromium()
    if chromium:
        os.environ["CHROMIUM"] = chromium  # where the browser tests look
        return ""
    if os.environ.get("CI") == "true":
        raise pytest.UsageError("No Chromium was found, and CI must run the browser tests: install it in .ci/run.")
    return "no Chromium found; install it or name one in the environment variable CHROMIUM"
