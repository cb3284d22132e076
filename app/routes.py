"""The page's own addresses beside Gradio's: actions, exports, imports, and the bundled typesetting of formulas.

Posts of other sites never get here (`app.local_only`). Refusals are JSON with a sentence, status 400.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response

from app.actions import REFUSALS, Actions, BadRequestError
from app.export import FORMATS, export_file
from app.storage import StorageError

__all__ = ["MAX_IMPORT_BYTES", "add_routes"]

MAX_IMPORT_BYTES = 256 << 20
MAX_REQUEST_BYTES = 4 << 20
FRONTEND = Path(gradio.__file__).parent / "templates" / "frontend" / "assets"


def add_routes(app: FastAPI, actions: Actions) -> None:
    """Put the page's addresses on the application, under /medusa."""

    async def act(name: str, request: Request) -> Response:
        body = await _body(request, MAX_REQUEST_BYTES)
        return await _answer(lambda: actions.act(name, _parsed(body)))

    async def load_file(request: Request) -> Response:
        body = await _body(request, MAX_IMPORT_BYTES)
        return await _answer(lambda: actions.load_file(_within(body, MAX_IMPORT_BYTES)))

    def export(format: str, conversation: str = "") -> Response:
        return _export(actions, format, conversation)

    app.add_api_route("/medusa/do/{name}", act, methods=["POST"], response_model=None)
    app.add_api_route("/medusa/import", load_file, methods=["POST"], response_model=None)
    app.add_api_route("/medusa/export", export, methods=["GET"], response_model=None)
    for extension in ("js", "css"):
        app.add_api_route(
            f"/medusa/katex.{extension}", partial(_katex, extension), methods=["GET"], response_model=None
        )


async def _body(request: Request, limit: int) -> bytes | None:
    """The request's body; None where it is longer than the limit."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            return None
        parts.append(part)
    return b"".join(parts)


def _within(body: bytes | None, limit: int) -> bytes:
    if body is None:
        raise BadRequestError(f"The file is larger than {limit >> 20} MB; import it in parts. Nothing was imported.")
    return body


def _parsed(body: bytes | None) -> Any:
    try:
        return json.loads(_within(body, MAX_REQUEST_BYTES))
    except ValueError as error:
        raise BadRequestError(f"The request is no JSON ({error}); reload the page.") from error


async def _answer(work: Callable[[], Mapping[str, Any]]) -> Response:
    try:
        return JSONResponse(await asyncio.to_thread(work), headers={"cache-control": "no-store"})
    except REFUSALS as error:
        return JSONResponse({"error": str(error)}, status_code=400)


def _export(actions: Actions, file_format: str, conversation: str) -> Response:
    if file_format not in FORMATS:
        return PlainTextResponse(f"There is no format {file_format!r}; use {', '.join(FORMATS)}.", status_code=404)
    try:
        name, media_type, text = export_file(actions.store, file_format, conversation or None)
    except StorageError as error:
        return PlainTextResponse(str(error), status_code=404)
    # The page saves it under this name; "attachment" keeps a file of someone else's texts from being shown as a page.
    disposition = f"attachment; filename*=UTF-8''{quote(name)}"
    headers = {"content-disposition": disposition, "cache-control": "no-store"}
    return Response(text, media_type=f"{media_type}; charset=utf-8", headers=headers)


def _katex(extension: str) -> Response:
    """Where the formulas' typesetting lies: Gradio brings it along under a name that changes with its version."""
    found = sorted(FRONTEND.glob(f"katex-*.{extension}"))
    if not found:
        return PlainTextResponse("This version of Gradio brings no KaTeX; formulas stay as text.", status_code=404)
    return RedirectResponse(f"/assets/{found[0].name}", status_code=307, headers={"cache-control": "no-cache"})
