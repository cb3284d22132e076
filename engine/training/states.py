"""Hidden states of a whole data set, computed once and kept on the device.

A frozen backbone gives the same states every epoch, so heads train on them at many times the speed of a full forward:
30 M tokens of the bundled model are 35 GB in bfloat16. What the heads make of them is not known here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.training.dense import TrainingModel, attend_causal
from engine.training.shards import Document

__all__ = ["StateCache", "compute_states"]

_BUCKET = 32  # rows are padded to a multiple of this, so that lengths repeat and little is wasted


@dataclass(frozen=True)
class StateCache:
    """Documents laid end to end, each token with its hidden state after the final norm.

    tokens int64 [tokens]; hidden bfloat16 [tokens, hidden]; is_answer bool [tokens]; document int32 [tokens].
    """

    tokens: Tensor
    hidden: Tensor
    is_answer: Tensor
    document: Tensor

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()

    def anchors(self) -> Tensor:
        """Positions t whose next token was the model's own: where a step may start, int64 [anchors]."""
        follows = (self.document[1:] == self.document[:-1]) & self.is_answer[1:]
        return follows.nonzero().squeeze(1)


def compute_states(
    model: TrainingModel, documents: Sequence[Document], batch_tokens: int, report: Callable[[str], None] | None = None
) -> StateCache:
    """Run the backbone over all documents, longest first, `batch_tokens` padded tokens at a time."""
    device, width = model.device, model.backbone.config.hidden_size
    lengths = [len(document.tokens) for document in documents]
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1].tolist()
    hidden = torch.empty(sum(lengths), width, dtype=torch.bfloat16, device=device)
    tokens = torch.empty(sum(lengths), dtype=torch.int64)
    is_answer = torch.zeros(sum(lengths), dtype=torch.bool)
    for start, document in zip(starts, documents, strict=True):
        tokens[start : start + len(document.tokens)] = torch.as_tensor(document.tokens)
        for first, last in document.spans:
            is_answer[start + first : start + last] = True
    done = 0
    for rows in _batches(lengths, batch_tokens):
        _fill(model, documents, rows, starts, hidden)
        done += sum(lengths[row] for row in rows)
        if report:
            report(f"{done:,} of {sum(lengths):,} hidden states")
    document_of = torch.repeat_interleave(torch.arange(len(documents), dtype=torch.int32), torch.tensor(lengths))
    return StateCache(tokens.to(device), hidden, is_answer.to(device), document_of.to(device))


@torch.no_grad()
def _fill(
    model: TrainingModel, documents: Sequence[Document], rows: Sequence[int], starts: Sequence[int], hidden: Tensor
) -> None:
    """Compute one padded batch and write its real rows to their places in `hidden`."""
    lengths = torch.tensor([len(documents[row].tokens) for row in rows])
    size = _padded(int(lengths.max()))
    batch = torch.zeros(len(rows), size, dtype=torch.int64)
    for line, row in enumerate(rows):
        batch[line, : len(documents[row].tokens)] = torch.as_tensor(documents[row].tokens)
    columns = torch.arange(size)
    is_real = columns < lengths.unsqueeze(1)
    places = torch.tensor([starts[row] for row in rows]).unsqueeze(1) + columns
    device = hidden.device
    positions = columns.to(device).expand(len(rows), -1)
    states = model.backbone(batch.to(device), positions, attend_causal)
    hidden[places[is_real].to(device)] = states[is_real.to(device)].to(hidden.dtype)


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterable[list[int]]:
    """Group document numbers, longest first, so that each group's padded size stays within `batch_tokens`."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    group: list[int] = []
    for row in order:
        size = _padded(lengths[group[0]] if group else lengths[row])
        if group and size * (len(group) + 1) > batch_tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _padded(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET
