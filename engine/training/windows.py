"""Batches of windows for training heads on cached hidden states, dealt so that any number of processes gets the same.

The text is split into lanes whose number depends on the text alone. A process keeps the lanes that are its own, and
no other's; a step takes windows from the lanes in turn. So a step learns from the same windows whether one process
holds all lanes or several share them, and a stopped run may go on with another number of processes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from engine.training.dataset import MIDDLE, HiddenCache, TextSet, build_cache
from engine.training.dense import TrainingModel
from engine.training.processes import ALONE, Processes

__all__ = ["HeadBatch", "Lanes", "WindowBatches", "build_lanes"]

MAX_LANES = 16
MIN_WINDOWS = 4  # a lane; text for less is not worth a lane more


@dataclass(frozen=True)
class HeadBatch:
    """Text one behind the other: hidden [n, hidden], tokens [n]; `rows` to learn at and their runs of labels.

    `middle` as in HiddenCache.
    """

    hidden: Tensor
    tokens: Tensor
    rows: Tensor
    run: Tensor
    middle: Tensor | None = None


@dataclass(frozen=True)
class Lanes:
    """A process's share of the text: its `own` lanes one behind the other in `cache`; `sizes` are all lanes' tokens.

    `quantize` is the format of the backbone that the states came from.
    """

    cache: HiddenCache
    sizes: tuple[int, ...]
    own: tuple[int, ...]
    quantize: str = "none"

    @property
    def num_tokens(self) -> int:
        """The tokens of all lanes of all processes."""
        return sum(self.sizes)

    @staticmethod
    def of(cache: HiddenCache) -> "Lanes":
        """Return the whole of a cache as one lane."""
        return Lanes(cache, (cache.num_tokens,), (0,))


def build_lanes(
    model: TrainingModel,
    text: TextSet,
    window: int,
    processes: Processes = ALONE,
    report: Callable[[str], None] = lambda line: None,
    layers: Sequence[int] = (),
) -> Lanes:
    """Run the backbone once over the documents of this process's lanes; of `layers` the features are kept too.

    Every lane gets documents of all lengths, so lanes are about equally long.
    """
    count = max(1, min(MAX_LANES, text.num_tokens // (MIN_WINDOWS * window)))
    documents = [chosen for chosen in _deal(text, count) if chosen.numel()]
    sizes = tuple(int(text.lengths[chosen].sum()) for chosen in documents)
    own = tuple(range(processes.index, len(sizes), processes.count))
    total, offset = sum(sizes[lane] for lane in own), 0
    if len(sizes) < processes.count:
        report(f"{text.num_tokens:,} tokens are work for {len(sizes)} of {processes.count} processes; the others wait")
    hidden = torch.empty(total, model.backbone.config.hidden_size, dtype=model.backbone.cos.dtype, device=model.device)
    tokens = torch.empty(total, dtype=torch.int64, device=model.device)
    run = torch.empty(total, dtype=torch.int8, device=model.device)
    middle = torch.empty(total, len(layers) * hidden.shape[1], dtype=MIDDLE, device=model.device) if layers else None
    for number, lane in enumerate(own, 1):
        told = _numbered(report, number, len(own))
        part = build_cache(model, text.select(documents[lane]), report=told, layers=layers)
        place = slice(offset, offset + part.num_tokens)
        hidden[place], tokens[place], run[place] = part.hidden, part.tokens, part.run
        if middle is not None and part.middle is not None:
            middle[place] = part.middle
        offset += part.num_tokens
    return Lanes(HiddenCache(hidden, tokens, run, middle), sizes, own, model.quantize)


def _deal(text: TextSet, count: int) -> list[Tensor]:
    order = text.lengths.argsort(stable=True)
    return [order[lane::count] for lane in range(count)]


def _numbered(report: Callable[[str], None], number: int, count: int) -> Callable[[str], None]:
    return (lambda line: report(f"part {number} of {count}: {line}")) if count > 1 else report


class WindowBatches:
    """The windows of every step. Which they are depends on the seed, the epoch and the lanes' sizes alone.

    Slot j of an epoch is the next window of lane j % lanes; a step takes `per_step` slots. Every epoch moves the
    windows by a random offset and takes them in another order.
    """

    def __init__(self, lanes: Lanes, window: int, per_step: int, halo: int, seed: int) -> None:
        self.cache, self.window, self.halo, self.seed = lanes.cache, window, halo, seed
        self.per_step, self.num_lanes, self.sizes = per_step, len(lanes.sizes), lanes.sizes
        self.num_slots = self.num_lanes * max(1, min(lanes.sizes) // window)
        self.num_steps = max(1, self.num_slots // per_step)
        ends = torch.tensor([0, *(lanes.sizes[lane] for lane in lanes.own)]).cumsum(0).tolist()
        self._span = dict(zip(lanes.own, pairwise(ends), strict=True))
        self._epoch = -1
        self._starts: dict[int, list[int]] = {}

    def batch(self, step: int) -> HeadBatch | None:
        """Return this process's part of a step, or None where it has nothing to learn from."""
        windows = self._windows(step)
        if not windows:
            return None
        device = self.cache.tokens.device
        starts, ends = torch.tensor(windows, device=device).T
        columns = torch.arange(self.window + self.halo, device=device)
        index = starts.unsqueeze(1) + columns
        # A window's halo is read, not learnt at; nothing is learnt past the end of a lane.
        last = (ends - 1).unsqueeze(1)
        may_learn = (columns < self.window) & (index < last)
        index = torch.minimum(index, last).flatten()
        run = self.cache.run[(index + 1).clamp(max=self.cache.num_tokens - 1)].masked_fill(~may_learn.flatten(), 0)
        rows = (run >= 2).nonzero().flatten()
        if rows.numel() == 0:
            return None
        middle = None if self.cache.middle is None else self.cache.middle[index]
        return HeadBatch(self.cache.hidden[index], self.cache.tokens[index], rows, run[rows], middle)

    def _windows(self, step: int) -> list[tuple[int, int]]:
        """Return (start, end of the lane) in the cache of each own window of a step."""
        epoch, place = divmod(step, self.num_steps)
        if epoch != self._epoch:
            self._epoch, self._starts = epoch, {lane: self._shuffled(epoch, lane) for lane in self._span}
        slots = range(place * self.per_step, min((place + 1) * self.per_step, self.num_slots))
        taken = [(slot % self.num_lanes, slot // self.num_lanes) for slot in slots]
        return [(self._starts[lane][turn], self._span[lane][1]) for lane, turn in taken if lane in self._span]

    def _shuffled(self, epoch: int, lane: int) -> list[int]:
        generator = torch.Generator().manual_seed((self.seed * 1000 + epoch) * MAX_LANES + lane)
        count = max(1, self.sizes[lane] // self.window)
        shift = int(torch.randint(self.window, (1,), generator=generator)) if count > 1 else 0
        order = torch.randperm(count, generator=generator) * self.window + shift + self._span[lane][0]
        return order.tolist()
