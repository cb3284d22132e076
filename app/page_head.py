"""What has to stand in the page's HTML itself, before any script of Gradio's: its `head` comes after those have begun.

ASGI middleware that puts a piece of HTML behind `<head>` of the page at /. Knows neither Gradio nor the app.
"""

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["PageHead"]

OPENING = b"<head>"


class PageHead:
    """Middleware: the page at / begins its head with `html`; everything else passes untouched."""

    def __init__(self, app: ASGIApp, html: str) -> None:
        self._app, self._html = app, html.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/" or scope["method"] != "GET":
            await self._app(scope, receive, send)
            return
        held: list[Message] = []  # the start waits for the body, whose length it tells

        async def collect(message: Message) -> None:
            if message["type"] not in ("http.response.start", "http.response.body"):
                await send(message)
                return
            held.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                for ready in self._with_html(held):
                    await send(ready)

        await self._app(scope, receive, collect)

    def _with_html(self, messages: list[Message]) -> list[Message]:
        start, *parts = messages
        headers = Headers(raw=start["headers"])
        if start["status"] != 200 or not headers.get("content-type", "").startswith("text/html"):
            return messages
        page = b"".join(part.get("body", b"") for part in parts)
        if page.count(OPENING) != 1:
            raise RuntimeError(f"The page has {page.count(OPENING)} times {OPENING.decode()}; one was expected.")
        page = page.replace(OPENING, OPENING + self._html)
        MutableHeaders(raw=start["headers"])["content-length"] = str(len(page))
        return [start, {"type": "http.response.body", "body": page}]
