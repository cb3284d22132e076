"""The local server: who may talk to it, which port and folder it takes, and how it starts twice and ends once."""

import http.server
import os
import signal
import socket
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import running_server
from fake_engine import FakeEngine, loader
from starlette.testclient import TestClient

from app import server
from app.chat import ChatSession
from app.single_instance import InstanceLock
from app.storage import ConversationStore

ADDRESS = "http://127.0.0.1:7860"
FOREIGN_HOSTS = [
    "",
    "evil.example",
    "evil.example:7860",
    "127.0.0.1.evil.example",
    "localhost.evil.example:7860",
    "192.168.0.7:7860",
    "0.0.0.0:7860",
    "2130706433:7860",
    "user@evil.example",
    "127.0.0.1@evil.example:7860",
    "evil.example@127.0.0.1",
    "127.0.0.1:7860:7860",
    "127.0.0.1/x",
    "[::1",
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    store = ConversationStore(tmp_path_factory.mktemp("server") / "chat.db")
    session = ChatSession(store, loader(FakeEngine()))
    session.start()
    with TestClient(server.build_app(session), base_url=ADDRESS) as client:
        yield client
    session.close()
    store.close()


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "LOCALHOST:7860", "[::1]:7860", "127.0.0.1"])
def test_local_names_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    FOREIGN_HOSTS,
)
def test_foreign_names_are_refused(client: TestClient, host: str) -> None:
    answer = client.get("/", headers={"host": host})
    assert answer.status_code == 403 and "127.0.0.1" in answer.text


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "http://127.0.0.1:3000", "http://localhost:7860", "null", "http://127.0.0.1:7860.x"],
)
@pytest.mark.parametrize("path", ["/gradio_api/run/predict", "/gradio_api/queue/join", "/gradio_api/upload", "/x"])
def test_posts_of_other_sites_are_refused(client: TestClient, origin: str, path: str) -> None:
    assert client.post(path, json={}, headers={"origin": origin}).status_code == 403


def test_own_page_and_programs_are_not_refused(client: TestClient) -> None:
    assert client.get("/config", headers={"origin": ADDRESS, "sec-fetch-site": "same-origin"}).status_code == 200
    assert client.get("/config").status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_pages_may_link_here_but_not_load_from_here(client: TestClient, site: str) -> None:
    link = {"sec-fetch-site": site, "sec-fetch-mode": "navigate"}
    load = {"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}
    assert client.get("/", headers=link).status_code == 200
    assert client.get("/medusa/follow?conversation=x", headers=load).status_code == 403


def test_answers_forbid_everything_from_outside(client: TestClient) -> None:
    headers = client.get("/").headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["object-src"] == "'none'"
    assert "http" not in headers["content-security-policy"].replace("http-equiv", "")
    assert headers["x-frame-options"] == "DENY" and headers["x-content-type-options"] == "nosniff"


def test_only_the_pages_own_files_are_served(client: TestClient, tmp_path: Path) -> None:
    assert client.get("/medusa/medusa.css").headers["content-type"].startswith("text/css")
    assert client.get("/medusa/main.js").headers["content-type"].startswith("text/javascript")
    assert client.get("/medusa/icons/medusa.svg").status_code == 200
    for name in ("../app/chat.py", "%2e%2e/app/chat.py", "..%2fapp%2fchat.py", "//etc/passwd", "icons", "none.css", ""):
        assert client.get(f"/medusa/{name}").status_code == 404, name
    weights = [path.name for path in server.ASSETS.iterdir() if path.suffix == ".safetensors"]
    for name in weights:
        assert client.get(f"/medusa/{name}").status_code == 404


def test_gradio_serves_no_files_of_the_machine(client: TestClient, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for path in (secret, Path(server.__file__), server.ASSETS / "medusa.css"):
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_follow_of_an_unknown_conversation_ends_at_once(client: TestClient) -> None:
    answer = client.get("/medusa/follow?conversation=nope")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text == 'data: {"ended":true}\n\n' * 2


def test_events_are_private_and_pass_the_queue_by(client: TestClient) -> None:
    config = client.get("/config").json()
    assert len(config["dependencies"]) >= 5
    assert {event["queue"] for event in config["dependencies"]} == {False}
    assert {event["api_visibility"] for event in config["dependencies"]} == {"private"}
    assert config["connect_heartbeat"] is False  # a lasting connection a tab would leave none for the seventh


def test_default_port_gives_way_and_a_named_one_does_not(monkeypatch: pytest.MonkeyPatch, busy_port: int) -> None:
    monkeypatch.setattr(server, "DEFAULT_PORT", busy_port)
    with server._listen(None) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1" and port not in (0, busy_port)
    with pytest.raises(OSError):
        server._listen(busy_port)


def test_named_busy_port_is_one_sentence_and_exit_code_2(
    tmp_path: Path, busy_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    code = server.run_server(loader(FakeEngine()), port=busy_port, data_dir=tmp_path, open_browser=False)
    said = capsys.readouterr().err.strip()
    assert code == 2
    assert said.startswith(f"Port {busy_port} on 127.0.0.1 cannot be used") and said.endswith("--port.")
    assert "\n" not in said
    assert InstanceLock(tmp_path).acquire()


def test_unusable_data_folder_is_one_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    not_a_folder = tmp_path / "file"
    not_a_folder.write_text("mine")
    code = server.run_server(loader(FakeEngine()), port=None, data_dir=not_a_folder, open_browser=False)
    assert code == 2 and "--data-dir" in capsys.readouterr().err
    assert not_a_folder.read_text() == "mine"


def test_foreign_database_is_one_sentence_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "conversations.db").write_bytes(b"not a database" * 100)
    code = server.run_server(loader(FakeEngine()), port=None, data_dir=tmp_path, open_browser=False)
    assert code == 2 and "conversations.db cannot be opened" in capsys.readouterr().err


def test_second_start_shows_the_running_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    holder = InstanceLock(tmp_path)
    assert holder.acquire()
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/"
        holder.publish(url)
        code = server.run_server(loader(FakeEngine()), port=None, data_dir=tmp_path, open_browser=True)
        running.shutdown()
    assert code == 0 and opened == [url]
    assert url in capsys.readouterr().err
    holder.release()


def test_lock_of_a_crashed_app_is_free(tmp_path: Path) -> None:
    first, second = InstanceLock(tmp_path), InstanceLock(tmp_path)
    assert first.acquire() and not second.acquire()
    first.publish("http://127.0.0.1:1/")
    assert second.holder_url() == "http://127.0.0.1:1/"
    assert first._file is not None
    first._file.close()  # what the end of a process does, without a clean release
    assert second.acquire() and second.holder_url() is None
    second.release()


@pytest.mark.skipif(os.name == "nt", reason="signals to a child work differently on Windows")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_it_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    with running_server(tmp_path) as (_, process):
        process.send_signal(number)
        assert process.wait(20) == 0
    assert sqlite3.connect(tmp_path / "conversations.db").execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert InstanceLock(tmp_path).acquire()


def test_page_begins_with_what_must_run_before_gradio(client: TestClient) -> None:
    answer = client.get("/")
    page = answer.text
    assert page.index("/medusa/loading.js") < page.index("<meta") < page.index("</head>")
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert "/medusa/loading.js" not in client.get("/config").text
