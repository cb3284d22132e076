"""The page: layout and event wiring only. What events do is in handlers, what things look like in assets/.

The parts with a drawing of their own (thread, conversations, status line, tree) are `gr.HTML` with a constant template:
a script from assets/ builds each once and follows its `value`.
"""

from pathlib import Path
from typing import Any

import gradio as gr

from app.handlers import Handlers

__all__ = ["ASSETS", "FIRST", "build_ui", "page_options"]

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONOSPACE_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")

FIRST = '<script src="/medusa/loading.js"></script>'  # before any script of Gradio's

HEAD = """
<meta name="color-scheme" content="light dark">
<link rel="icon" type="image/svg+xml" href="/medusa/icons/medusa.svg">
<link rel="stylesheet" href="/medusa/medusa.css">
<script type="module" src="/medusa/main.js"></script>
"""

# The component's script may run before or after main.js; whichever comes second mounts the view.
MOUNT = """
const mount = () => window.MedusaChat.mount("{view}", {{element, props, trigger, watch, server}});
window.MedusaChat ? mount() : window.addEventListener("medusa-chat-ready", mount, {{once: true}});
"""

CONVERSATION_IN_ADDRESS = "() => new URLSearchParams(location.search).get('c') || ''"

WITH_SETTINGS = "(text, id, medusa) => [text, id, medusa, JSON.stringify(window.MedusaChat.settings())]"

# Past Gradio's queue, which has no use here: answers are made in the session's own thread, and what the queue streams
# can be lost (see app/handlers.py).
DIRECT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def build_ui(handlers: Handlers) -> gr.Blocks:
    """Build the page over its handlers."""
    with gr.Blocks(title="Medusa Chat", fill_width=True, fill_height=True, analytics_enabled=False) as page:
        # In the browser rather than in gr.State: it survives a restart of the server, and it is the address's ?c=.
        conversation_id = gr.Textbox(visible="hidden", elem_id="conversation-id", label="Conversation")
        settings = gr.Textbox(visible="hidden", elem_id="settings-json", label="Settings")
        with gr.Row(elem_id="shell"):
            with gr.Column(elem_id="sidebar", min_width=0):
                conversations = _view("conversations")
            with gr.Column(elem_id="main", min_width=0):
                status = _view("status")
                thread = _view("thread")
                with gr.Column(elem_id="composer", min_width=0):
                    notice = _view("notice")
                    composer, send, stop, medusa = _composer()
            with gr.Column(elem_id="panel", min_width=0):
                live = _view("live")

        waiting = gr.Timer(0.4)

        opened = [conversation_id, thread, conversations, live, medusa, notice]
        sent = [composer, conversation_id, thread, conversations, live, notice]
        page.load(handlers.open, conversation_id, opened, js=CONVERSATION_IN_ADDRESS, **DIRECT)
        conversations.select(handlers.open, conversation_id, opened, js="() => window.MedusaChat.wanted()", **DIRECT)
        asked = [composer, conversation_id, medusa, settings]
        gr.on([composer.submit, send.click], handlers.send, asked, sent, js=WITH_SETTINGS, **DIRECT)
        stop.click(handlers.stop, conversation_id, **DIRECT)
        gr.on([page.load, waiting.tick], handlers.status, outputs=[status, waiting], **DIRECT)
    return page


def page_options() -> dict[str, Any]:
    """What the page needs of the server that shows it: theme and head; fonts are the system's, nothing is fetched."""
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.stone,
        font=SYSTEM_FONTS,
        font_mono=MONOSPACE_FONTS,
    ).set(
        body_background_fill="#f7f5f0",
        body_background_fill_dark="#0d1315",
        body_text_color="#1f2a2c",
        body_text_color_dark="#e4ebea",
        block_background_fill="transparent",
        block_border_width="0px",
        block_shadow="none",
    )
    return {"theme": theme, "head": HEAD}


def _view(name: str) -> gr.HTML:
    return gr.HTML(
        value="",
        elem_id=name,
        html_template="<div></div>",
        js_on_load=MOUNT.format(view=name),
        apply_default_css=False,
        container=False,
        padding=False,
    )


def _composer() -> tuple[gr.Textbox, gr.Button, gr.Button, gr.Checkbox]:
    """The text box (Enter sends, Shift+Enter is a new line), Send, Stop, and the switch for the next answer."""
    with gr.Column(elem_id="composer-card", min_width=0):
        composer = gr.Textbox(
            label="Message",
            show_label=False,
            container=False,
            placeholder="Ask something…",
            lines=1,
            max_lines=9,
            autofocus=True,
            elem_id="composer-text",
        )
        with gr.Row(elem_id="composer-actions"):
            _view("tools")
            medusa = gr.Checkbox(value=True, label="Medusa", container=False, elem_id="medusa-switch", min_width=0)
            stop = gr.Button("Stop", elem_id="stop", min_width=0)
            send = gr.Button("Send", variant="primary", elem_id="send", min_width=0)
    return composer, send, stop, medusa
