"""Batched generation with continuously refilled slots: every slot is a text of its own length.

One step feeds every slot's current token and decides the next: a token that is already written (the prompt) is taken as
it is, otherwise the model's choice. A slot whose text has ended stands still until it is placed anew or extended. The
step has one static shape and is captured as a CUDA graph where there is one. What the texts mean is not known here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.backbone import Backbone
from engine.training.ragged_attention import attend_rows
from engine.training.row_sampler import choose_tokens

__all__ = ["BatchDecoder", "Placement", "Snapshot"]

MIN_P = 0.05  # drawn tokens have at least this share of the best token's probability


@dataclass(frozen=True)
class Placement:
    """Text to write into a slot: from the start, or after what the slot holds; then up to `limit` tokens in all."""

    slot: int
    tokens: Sequence[int]
    limit: int
    temperature: float
    start: int = 0


@dataclass(frozen=True)
class Snapshot:
    """The slots' state at one moment, on the CPU once `ready`."""

    tokens: Tensor  # int32 [slots, capacity]
    position: Tensor  # int64 [slots]: the last written token of an ended slot
    is_done: Tensor  # bool [slots]
    event: "torch.cuda.Event | None"

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()


class BatchDecoder:
    """`slots` texts of up to `capacity` tokens over one dense backbone.

    `prefix` is a common beginning whose cached rows are computed once and copied into slots that start with it.
    """

    def __init__(
        self, backbone: Backbone, slots: int, capacity: int, end_tokens: Sequence[int], prefix: Sequence[int] = ()
    ) -> None:
        config, device = backbone.config, backbone.cos.device
        self.backbone, self.slots, self.capacity, self.device = backbone, slots, capacity, device
        dtype = backbone.cos.dtype
        shape = (config.num_layers, 2, slots, config.num_kv_heads, capacity, config.head_dim)
        self.cache = torch.zeros(shape, dtype=dtype, device=device)
        self.tokens = torch.zeros(slots, capacity, dtype=torch.int32, device=device)
        self.position = torch.zeros(slots, dtype=torch.int64, device=device)
        self.known = torch.ones(slots, dtype=torch.int64, device=device)
        self.limit = torch.full((slots,), capacity, dtype=torch.int64, device=device)
        self.temperature = torch.zeros(slots, dtype=torch.float32, device=device)
        self.is_done = torch.ones(slots, dtype=torch.bool, device=device)
        self.end_tokens = torch.tensor(list(end_tokens), device=device)
        self.seed = torch.randint(0, 2**31 - 1, (1,), device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.prefix: tuple[int, ...] = ()
        if prefix:
            self._compute_prefix(tuple(prefix))

    @torch.no_grad()
    def step(self) -> None:
        """Advance every running slot by one token."""
        rows = self.position.unsqueeze(1)
        current = self.tokens.gather(1, rows).squeeze(1).long()
        hidden = self.backbone(current, self.position, self._attend)
        chosen = choose_tokens(self.backbone.lm_head(hidden), self.temperature, MIN_P, self.seed)
        following = self.position + 1
        place = following.clamp(max=self.capacity - 1).unsqueeze(1)
        written = self.tokens.gather(1, place).squeeze(1)
        is_given = following < self.known
        keep = is_given | self.is_done
        self.tokens.scatter_(1, place, torch.where(keep, written, chosen.int()).unsqueeze(1))
        is_end = (chosen.unsqueeze(1) == self.end_tokens).any(dim=1) | (following + 1 >= self.limit)
        self.position.copy_(torch.where(self.is_done, self.position, following))
        self.is_done.logical_or_(is_end & ~is_given)

    def capture(self) -> None:
        """Warm the step up and capture it; a no-op without CUDA."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self._graph = graph

    def run(self, steps: int) -> None:
        """Take `steps` steps; on CUDA they are queued, not waited for."""
        for _ in range(steps):
            if self._graph is not None:
                self._graph.replay()
            else:
                self.step()

    def place(self, placements: Sequence[Placement]) -> None:
        """Write the placements' texts into their slots and let these run."""
        if not placements:
            return
        assert all(item.start + len(item.tokens) < self.capacity for item in placements), "a text longer than a slot"
        slots = self._to_device([item.slot for item in placements])
        rows = [item.slot for item in placements for _ in item.tokens]
        columns = [item.start + offset for item in placements for offset in range(len(item.tokens))]
        written = self._to_device([token for item in placements for token in item.tokens])
        self.tokens[self._to_device(rows), self._to_device(columns)] = written.int()
        cached = [len(self.prefix) if self._starts_with_prefix(item) else 0 for item in placements]
        begin = [max(item.start - 1, skip) for item, skip in zip(placements, cached, strict=True)]
        self.position[slots] = self._to_device(begin)
        self.known[slots] = self._to_device([item.start + len(item.tokens) for item in placements])
        self.limit[slots] = self._to_device([min(item.limit, self.capacity) for item in placements])
        self.temperature[slots] = self._to_device([item.temperature for item in placements], torch.float32)
        self.is_done[slots] = False
        with_prefix = [item.slot for item in placements if self._starts_with_prefix(item)]
        if with_prefix:
            self.cache[:, :, self._to_device(with_prefix), :, : len(self.prefix)] = self._prefix_rows.unsqueeze(2)

    def snapshot(self) -> Snapshot:
        """Copy the slots' state to the CPU behind the queued steps, without waiting."""
        if self.device.type != "cuda":
            return Snapshot(self.tokens.clone(), self.position.clone(), self.is_done.clone(), None)
        copies = [
            torch.empty(state.shape, dtype=state.dtype, pin_memory=True).copy_(state, non_blocking=True)
            for state in (self.tokens, self.position, self.is_done)
        ]
        event = torch.cuda.Event()
        event.record()
        return Snapshot(*copies, event)

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend_rows(query, key, value, self.cache[layer, 0], self.cache[layer, 1], self.position)

    def _starts_with_prefix(self, item: Placement) -> bool:
        size = len(self.prefix)
        return item.start == 0 and size > 0 and len(item.tokens) > size and tuple(item.tokens[:size]) == self.prefix

    def _compute_prefix(self, prefix: tuple[int, ...]) -> None:
        self.place([Placement(0, [*prefix, 0], self.capacity, 0.0)])
        for _ in prefix:
            self.step()
        self.prefix = prefix
        self._prefix_rows = self.cache[:, :, 0, :, : len(prefix)].clone()
        self.is_done.fill_(True)

    def _to_device(self, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        """Copy behind the queued steps: only from pinned memory does that not wait for them."""
        tensor = torch.tensor(list(values), dtype=dtype)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor
