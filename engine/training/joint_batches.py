"""Whole documents of similar length as padded batches, for training on live forwards of the backbone.

Every epoch shuffles which documents of one length meet, and the order of the batches. Both depend on the seed and the
epoch alone, so a resumed run goes on with the batch that a stopped one would have taken next.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.training.dataset import TextSet, count_runs
from engine.training.processes import ALONE, Processes

__all__ = ["DocumentBatches", "PaddedBatch"]


@dataclass(frozen=True)
class PaddedBatch:
    """tokens int64 and is_text bool [documents, longest]; padding is at the end of rows.

    run int8 [texts' tokens]: for every token, documents one behind the other, the run of labels from the next token on.
    """

    tokens: Tensor
    is_text: Tensor
    run: Tensor


class DocumentBatches:
    """Batches of at most `batch_tokens` padded tokens (at least one document each), `num_batches` an epoch.

    Of several processes each gets every count-th document of a batch, so no two get the same one.
    """

    def __init__(
        self, text: TextSet, batch_tokens: int, device: torch.device, seed: int = 0, processes: Processes = ALONE
    ) -> None:
        self.seed, self.device, self.processes = seed, device, processes
        self.num_tokens = text.num_tokens
        self._lengths = text.lengths
        self._starts = (text.lengths.cumsum(0) - text.lengths).to(device)
        self._device_lengths = text.lengths.to(device)
        self._tokens = text.tokens.to(device)
        self._run = count_runs(text.labels, text.lengths).to(device)
        self._cuts = _cut(text.lengths.sort().values.tolist(), batch_tokens)
        self._epoch, self._order, self._batch_order = -1, torch.empty(0), torch.empty(0)

    @property
    def num_batches(self) -> int:
        return len(self._cuts)

    def batch(self, epoch: int, place: int) -> PaddedBatch:
        """Return this process's part of one batch of an epoch; it may hold no document."""
        if epoch != self._epoch:
            self._shuffle(epoch)
        start, stop = self._cuts[int(self._batch_order[place])]
        chosen = self._order[start:stop][self.processes.index :: self.processes.count]
        longest = int(self._lengths[chosen].max()) if chosen.numel() else 0
        columns = torch.arange(longest, device=self.device)
        documents = chosen.to(self.device)
        is_text = columns < self._device_lengths[documents].unsqueeze(1)
        index = (self._starts[documents].unsqueeze(1) + columns).clamp(max=self.num_tokens - 1)
        tokens = self._tokens[index].long().masked_fill(~is_text, 0)
        has_next = columns + 1 < self._device_lengths[documents].unsqueeze(1)
        run = self._run[(index + 1).clamp(max=self.num_tokens - 1)].masked_fill(~has_next, 0)
        return PaddedBatch(tokens, is_text, run[is_text])

    def _shuffle(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1000 + epoch)
        mixed = torch.randperm(self._lengths.numel(), generator=generator)
        self._order = mixed[self._lengths[mixed].argsort(stable=True)]
        self._batch_order = torch.randperm(self.num_batches, generator=generator)
        self._epoch = epoch


def _cut(lengths: list[int], batch_tokens: int) -> list[tuple[int, int]]:
    """Cut ascending lengths into [start, stop) of batches."""
    cuts, start = [], 0
    for place, length in enumerate(lengths):
        if place > start and (place - start + 1) * length > batch_tokens:
            cuts.append((start, place))
            start = place
    return [*cuts, (start, len(lengths))] if lengths else []
