"""What the page asks of the engine after each answer: the measured choice of the tree, and what Medusa gained here."""

from typing import Any

from app.chat import ChatSession
from app.measured import measured_gain

__all__ = ["engine_view"]


def engine_view(session: ChatSession) -> dict[str, Any]:
    """The engine's own report on the tree's size, and this machine's medians; empty before the model is ready."""
    info = session.engine_state.info
    if info is None:
        return {}
    stats = session.store.answer_stats(info.model)
    return {
        "tuning": getattr(info, "tuning", None),
        "measured": measured_gain(stats, info.device, info.weights),
        "medusa": info.has_heads,
    }
