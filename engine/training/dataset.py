"""Training text in one flat tensor, and the backbone's hidden states for it, computed once.

Documents are ordered by length for the backbone pass and lie one behind the other. `run[t]` says how many of the tokens
from t on are labels of the same answer: a head that guesses t+2+i learns at t where run[t+1] >= i+2.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import InvalidParameterError
from engine.heads import MedusaHeads
from engine.training.dense import TrainingModel, attend_causal
from engine.training.prefix_states import heads_states, middle_features
from engine.training.shards import Document, pack_documents, read_shards

__all__ = [
    "HiddenCache",
    "TextSet",
    "build_cache",
    "count_runs",
    "hold_back",
    "load_text",
    "most_used_tokens",
    "split_text",
    "text_of",
]

MAX_RUN = 32
MIDDLE = torch.float8_e4m3fn  # of middle layers' features: of unit scale, and in 16 bits twice the states' size
HELD_BACK = 1500  # conversations, or a tenth of them where that is less


@dataclass(frozen=True)
class TextSet:
    """Documents one behind the other: tokens int32 [total], labels uint8 [total], lengths and greedy by document."""

    tokens: Tensor
    labels: Tensor
    lengths: Tensor
    greedy: Tensor

    @property
    def num_documents(self) -> int:
        return self.lengths.numel()

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()

    def select(self, documents: Tensor) -> "TextSet":
        """Return the set of these documents, in this order (int64 indices)."""
        starts = self.lengths.cumsum(0) - self.lengths
        lengths = self.lengths[documents]
        ends = lengths.cumsum(0)
        offset = torch.repeat_interleave(starts[documents] - (ends - lengths), lengths)
        index = torch.arange(offset.numel()) + offset
        return TextSet(self.tokens[index], self.labels[index], lengths, self.greedy[documents])


@dataclass(frozen=True)
class HiddenCache:
    """Everything a head learns from, on the training device, all of one length.

    hidden [total, hidden]; tokens int64 [total]; run int8 [total]: labels of one answer from here on, MAX_RUN at most;
    middle [total, layers x hidden]: features of middle layers, where a prefix attention is to learn from them.
    """

    hidden: Tensor
    tokens: Tensor
    run: Tensor
    middle: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()

    def anchors(self) -> Tensor:
        """Return the positions whose next token the model wrote: where a decode step may start, int64."""
        return (self.run[1:] >= 1).nonzero().flatten()


def load_text(folder: Path) -> TextSet:
    """Read all shards of a data folder."""
    shards = list(read_shards(folder))
    if not shards:
        raise InvalidParameterError(f"{folder} holds no finished shard; let the distill command run longer.")
    return _join(shards)


def text_of(documents: Sequence[Document]) -> TextSet:
    """Return documents that are not on disk as a set."""
    return _join([pack_documents(documents)])


def split_text(text: TextSet, held_back: int, seed: int = 0) -> tuple[TextSet, TextSet]:
    """Return (training set, `held_back` greedy documents for calibration and evaluation)."""
    order = torch.randperm(text.num_documents, generator=torch.Generator().manual_seed(seed))
    chosen = order[text.greedy[order]][:held_back]
    is_held = torch.zeros(text.num_documents, dtype=torch.bool)
    is_held[chosen] = True
    return text.select((~is_held).nonzero().flatten()), text.select(chosen)


def hold_back(text: TextSet) -> tuple[TextSet, TextSet]:
    """Split a data folder's text as the commands do: (to train on, greedy conversations that calibration may use)."""
    return split_text(text, max(1, min(HELD_BACK, text.num_documents // 10)))


def most_used_tokens(text: TextSet, count: int, vocab_size: int) -> Tensor:
    """Return the ids of the `count` tokens that answers use most, the most used first, int64 [count]."""
    used = torch.bincount(text.tokens[text.labels.bool()].long(), minlength=vocab_size)
    return used.argsort(descending=True, stable=True)[:count]


def count_runs(labels: Tensor, lengths: Tensor) -> Tensor:
    """Return, for every token, how many labels of the same document follow from it on without a gap, int8."""
    total = labels.numel()
    place = torch.arange(total)
    begins = torch.full((total,), total)
    starts = (lengths.cumsum(0) - lengths)[lengths > 0]
    begins[starts] = starts
    gaps = torch.where(labels.bool(), total, place)
    next_gap = gaps.flip(0).cummin(0).values.flip(0)
    next_start = torch.cat([begins.flip(0).cummin(0).values.flip(0)[1:], torch.tensor([total])])
    return (torch.minimum(next_gap, next_start) - place).clamp(0, MAX_RUN).to(torch.int8)


@torch.no_grad()
def build_cache(
    model: TrainingModel,
    text: TextSet,
    batch_tokens: int = 65536,
    report: Callable[[str], None] = lambda line: None,
    *,
    layers: Sequence[int] = (),
    heads: MedusaHeads | None = None,
) -> HiddenCache:
    """Run the backbone once over all documents and keep its hidden states on its device.

    With `layers` the cache has their features beside them, to learn from. With `heads` that have a prefix attention
    its answers stand in the place of the hidden states, to measure these heads.
    """
    prefix = None if heads is None else heads.prefix
    assert prefix is None or not layers, "a cache is to learn from, or of what these heads read"
    text = text.select(text.lengths.argsort())
    device, config = model.device, model.backbone.config
    total = text.num_tokens
    hidden = torch.empty(total, config.hidden_size, dtype=model.backbone.cos.dtype, device=device)
    middle = torch.empty(total, len(layers) * config.hidden_size, dtype=MIDDLE, device=device) if layers else None
    read = layers if prefix is None else prefix.config.layers
    tokens = text.tokens.to(device, torch.int64)
    start, reported, offset = time.monotonic(), 0.0, 0
    for lengths in _batches(text.lengths.tolist(), batch_tokens):
        count = sum(lengths)
        part, is_text, features = _states(model, tokens[offset : offset + count], lengths, read)
        if prefix is not None:
            part = heads_states(prefix, model.backbone, part, features)
        hidden[offset : offset + count] = part[is_text]
        if middle is not None and features is not None:
            middle[offset : offset + count] = features[is_text].to(MIDDLE)
        offset += count
        seconds = time.monotonic() - start
        if seconds - reported > 5 or offset == total:
            reported = seconds
            report(f"hidden states of {offset:,} of {total:,} tokens, {offset / seconds:,.0f} tokens/s")
    return HiddenCache(hidden, tokens, count_runs(text.labels, text.lengths).to(device), middle)


def _join(shards: Sequence[dict[str, Tensor]]) -> TextSet:
    parts = {name: torch.cat([shard[name] for shard in shards]) for name in ("tokens", "labels", "lengths", "greedy")}
    return TextSet(parts["tokens"], parts["labels"], parts["lengths"].long(), parts["greedy"].bool())


def _states(
    model: TrainingModel, tokens: Tensor, lengths: Sequence[int], layers: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden states [documents, longest, hidden], where text is, and the features of `layers`.

    tokens [sum of lengths]: documents one behind the other.
    """
    widths = torch.tensor(lengths, device=tokens.device)
    columns = torch.arange(max(lengths), device=tokens.device)
    is_text = columns < widths.unsqueeze(1)
    padded = torch.zeros(is_text.shape, dtype=torch.int64, device=tokens.device)
    padded[is_text] = tokens
    hidden, *left = model.backbone.states(padded, columns.expand_as(padded), attend_causal, layers)
    return hidden, is_text, middle_features(left)


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Cut ascending lengths into batches of at most `batch_tokens` padded tokens (at least one document each)."""
    batches: list[list[int]] = [[]]
    for length in lengths:
        if batches[-1] and (len(batches[-1]) + 1) * length > batch_tokens:
            batches.append([])
        batches[-1].append(length)
    return batches if batches[0] else []
