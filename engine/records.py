"""The typed records that stream out of the engine: one decode step, one chunk of text, one finished answer.

Plain values only (no tensors), so that the app can store, send and draw them without knowing torch.
"""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["DecodeStep", "EngineInfo", "GenerationChunk", "GenerationResult"]


@dataclass(frozen=True)
class DecodeStep:
    """One verify forward and what came of it.

    `tokens` are the accepted drafts in path order and then the bonus token; where the answer ended among them, the
    chunk that carries the step holds fewer. `path` holds the node indices of the accepted path, root first; node 0 is
    the root, a token that an earlier step already emitted. `node_tokens[i]` and `node_probabilities[i]` belong to node
    i of the tree, in `CandidateTree` order; probabilities are the draft head's own, the root's is 1. Without Medusa the
    tree is the root alone.
    """

    tokens: tuple[int, ...]
    num_accepted: int
    path: tuple[int, ...]
    node_tokens: tuple[int, ...]
    node_parents: tuple[int, ...]
    node_probabilities: tuple[float, ...]
    duration_ms: float

    @property
    def tree_nodes(self) -> int:
        """Drafted nodes, without the root."""
        return len(self.node_tokens) - 1


@dataclass(frozen=True)
class GenerationResult:
    """The record of one answer; times in milliseconds, speeds over the decode steps alone."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    finish_reason: str  # "stop", "length" or "cancelled"
    medusa: bool
    steps: int
    tokens_per_step: float
    acceptance_by_depth: tuple[float, ...]
    tree_nodes: int
    tokens_per_second: float
    time_to_first_token_ms: float
    device: str
    weights: str
    seed: int

    @property
    def generated_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class GenerationChunk:
    """What one prefill or decode step adds to the stream.

    `text` is new text only, whole characters only (a token that ends inside a character shows up with the next one).
    Where a stop string may have begun, text and tokens wait for a later chunk.
    `step` is None for the prefill's chunk. `result` is set on the last chunk alone.
    """

    text: str
    tokens: tuple[int, ...] = ()
    token_texts: tuple[str, ...] = ()
    step: DecodeStep | None = None
    result: GenerationResult | None = None


@dataclass(frozen=True)
class EngineInfo:
    """What a status line says about a loaded engine."""

    model: str
    device: str
    weights: str
    max_context: int
    has_heads: bool
    heads_reason: str = ""  # why Medusa is unavailable; empty when it is
    num_heads: int = 0
    memory_bytes: int = 0
    notes: tuple[str, ...] = field(default_factory=tuple)
    tuning: dict[str, Any] | None = None  # the tree's choice, see `engine.tuning.Tuner.report`; None without heads
