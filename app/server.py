"""The local web server: one instance per data folder, loopback only, up before the model is.

Wires the parts together: store, chat session, page, and the engine it loads in the session's thread. Knows no command
line; `build_app` is the whole application, so that other routes can be mounted beside the page.
"""

import os

# Gradio reads both when it is imported: no analytics, and no proxy between this program and itself.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
for _name in ("NO_PROXY", "no_proxy"):
    os.environ[_name] = ",".join(filter(None, [os.environ.get(_name, ""), "127.0.0.1", "localhost"]))

import logging  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
import urllib.error  # noqa: E402
import urllib.request  # noqa: E402
import webbrowser  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import gradio as gr  # noqa: E402
import uvicorn  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse  # noqa: E402

from app.actions import Actions  # noqa: E402
from app.chat import ChatSession, LoadEngine  # noqa: E402
from app.handlers import Handlers  # noqa: E402
from app.local_only import LocalOnly  # noqa: E402
from app.page_data import page_value  # noqa: E402
from app.page_head import PageHead  # noqa: E402
from app.race import race_events  # noqa: E402
from app.routes import add_routes  # noqa: E402
from app.single_instance import InstanceLock  # noqa: E402
from app.status import engine_view  # noqa: E402
from app.storage import ConversationStore, StorageError  # noqa: E402
from app.trace import trace_json  # noqa: E402
from app.ui import ASSETS, FIRST, build_ui, page_options  # noqa: E402
from engine import Engine  # noqa: E402

__all__ = ["build_app", "run_server", "serve"]

DEFAULT_PORT = 7860
SHUTDOWN_S = 2  # streams of open pages never end by themselves
START_LIMIT_S = 60
EXIT_OK, EXIT_BAD_INPUT, EXIT_FAILED = 0, 2, 1
SERVED_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".png": "image/png"}


def serve(*, port: int | None, data_dir: Path, open_browser: bool, device: str, model: str, quantize: str) -> int:
    """Serve the app until Ctrl-C or SIGTERM; return the exit code.

    `port` None takes 7860 or, where that is busy, any free one. A second start with the same `data_dir` shows the
    running one instead.
    """

    def load(progress: Callable[[str], None]) -> Engine:
        return Engine.load(model, device=device, quantize=quantize, progress=progress)

    return run_server(load, port=port, data_dir=data_dir, open_browser=open_browser)


def run_server(
    load_engine: LoadEngine, *, port: int | None, data_dir: Path, open_browser: bool, titles: bool = True
) -> int:
    """`serve` with any engine: the seam where a test brings its own."""
    lock = InstanceLock(data_dir)
    try:
        if not lock.acquire():
            return _show_running(lock, data_dir, open_browser)
    except OSError as error:
        return _fail(f"The data folder {data_dir} cannot be written ({error}); choose another with --data-dir.")
    try:
        return _serve_locked(load_engine, lock, port, data_dir, open_browser, titles)
    finally:
        lock.release()


def build_app(session: ChatSession) -> FastAPI:
    """The whole application as ASGI: the page at /, its files under /medusa, guarded against other sites."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(PageHead, html=FIRST)
    app.add_middleware(LocalOnly)  # the outermost
    handlers = Handlers(session)

    async def follow(conversation: str) -> StreamingResponse:
        events = (f"data: {value}\n\n" async for value in handlers.follow(conversation))
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})

    def trace(message: str, first: int = 0) -> Response:
        steps = trace_json(session, message, max(0, first))
        if steps is None:
            return PlainTextResponse("No steps were kept for this answer.", status_code=404)
        return Response(steps, media_type="application/json", headers={"cache-control": "no-store"})

    def engine() -> Response:
        view = page_value(engine_view(session))
        return Response(view, media_type="application/json", headers={"cache-control": "no-store"})

    async def race(message: str) -> StreamingResponse:
        events = (f"data: {value}\n\n" async for value in race_events(session, message))
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})

    app.add_api_route("/medusa/race", race, methods=["GET"], response_model=None)
    app.add_api_route("/medusa/engine", engine, methods=["GET"], response_model=None)
    app.add_api_route("/medusa/trace", trace, methods=["GET"], response_model=None)
    app.add_api_route("/medusa/follow", follow, methods=["GET"], response_model=None)
    add_routes(app, Actions(session))
    app.add_api_route("/medusa/{name:path}", _asset, methods=["GET"], response_model=None)
    return gr.mount_gradio_app(
        app,
        build_ui(handlers),
        path="",
        server_name="127.0.0.1",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        show_error=True,
        max_file_size="50mb",
        **page_options(),
    )


def _asset(name: str) -> Response:
    """A file of the page; nothing else that lies in assets/ is served."""
    path = (ASSETS / name).resolve()
    if path.suffix not in SERVED_TYPES or not path.is_relative_to(ASSETS) or not path.is_file():
        return PlainTextResponse("There is no such file.", status_code=404)
    return FileResponse(path, media_type=SERVED_TYPES[path.suffix], headers={"cache-control": "no-cache"})


def _serve_locked(
    load_engine: LoadEngine, lock: InstanceLock, port: int | None, data_dir: Path, open_browser: bool, titles: bool
) -> int:
    try:
        listener = _listen(port)
        store = ConversationStore(data_dir / "conversations.db")
    except OSError as error:
        return _fail(
            f"Port {port} on 127.0.0.1 cannot be used ({error.strerror or error}); choose another with --port."
        )
    except StorageError as error:
        return _fail(str(error))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    session = ChatSession(store, load_engine, titles=titles)
    session.start()
    server = uvicorn.Server(
        uvicorn.Config(build_app(session), log_level="warning", timeout_graceful_shutdown=SHUTDOWN_S, access_log=False)
    )
    threading.Thread(target=_announce, args=(url, lock, open_browser), name="announce", daemon=True).start()
    try:
        _run(server, listener)
    finally:
        session.close()
        store.close()
    print("Medusa Chat has ended; everything is saved.", file=sys.stderr)
    return EXIT_OK if server.started else EXIT_FAILED


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    """Serve until a signal. uvicorn raises the signal again when it is done; that must not end the program early."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *received: None)
    logging.getLogger("uvicorn.error").addFilter(_is_no_shutdown_noise)
    with listener:
        server.run(sockets=[listener])


def _is_no_shutdown_noise(record: logging.LogRecord) -> bool:
    """Pages that are still open when the app ends are no error worth a traceback."""
    text = record.getMessage()
    return not (
        "timeout graceful shutdown exceeded" in text
        or "CancelledError" in text
        or "CancelledError" in str(record.exc_info and record.exc_info[0])
    )


def _listen(port: int | None) -> socket.socket:
    """A listening socket on loopback; raises OSError where a given port is busy."""
    if port is not None:
        return _bind(port)
    try:
        return _bind(DEFAULT_PORT)
    except OSError:
        return _bind(0)


def _bind(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if sys.platform == "win32":  # there SO_REUSEADDR would let two programs share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def _announce(url: str, lock: InstanceLock, open_browser: bool) -> None:
    """Once the page answers, say where it is, and open it."""
    if not _answers(url, START_LIMIT_S):
        return
    lock.publish(url)
    print(f"Medusa Chat is running at {url}  (Ctrl-C ends it)", file=sys.stderr, flush=True)
    if open_browser:
        webbrowser.open(url)


def _answers(url: str, limit_s: float) -> bool:
    """Whether the page answers with HTTP 200 within the limit."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    pause = threading.Event()
    for _ in range(max(1, int(limit_s / 0.1))):
        try:
            with opener.open(url, timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            pause.wait(0.1)
    return False


def _show_running(lock: InstanceLock, data_dir: Path, open_browser: bool) -> int:
    url = lock.holder_url()
    if url is None or not _answers(url, 5):
        return _fail(f"Another Medusa Chat is using {data_dir} but does not answer; wait a moment or end it.")
    print(f"Medusa Chat is already running at {url}", file=sys.stderr, flush=True)
    if open_browser:
        webbrowser.open(url)
    return EXIT_OK


def _fail(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return EXIT_BAD_INPUT
