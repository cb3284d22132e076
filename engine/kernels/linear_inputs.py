"""What the CUDA linear may make of its input on the way to its matrix, so that it takes no launch of its own."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Norm", "Seen"]


@dataclass(frozen=True)
class Norm:
    """An RMSNorm before the matrix: its weight [K], and where the normalised values go, if anywhere ([tokens, K])."""

    weight: Tensor
    eps: float
    out: Tensor | None = None


@dataclass(frozen=True)
class Seen:
    """A draft head's inputs, put together on their way; what `draft_ops.gather_seen` takes."""

    table: Tensor
    tokens: Tensor
    record: Tensor
    ancestor_at: Tensor
    row_nodes: Tensor
