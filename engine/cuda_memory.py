"""The static memory of a captured step: what goes in, what lies between its launches, the cache, what comes out.

Everything has room for MAX_ROWS rows, and smaller steps use the beginning, so all graphs share it. Only the cache
grows, in large steps, and with it what depends on the longest context; graphs captured before are then void. The
heads' prefix attention has a layer of its own in it, behind the backbone's (`add_layer`).
"""

import math

import torch
from torch import Tensor

from engine.backbone import BackboneConfig
from engine.kernels.draft_prune import KeptTables
from engine.kernels.fused_ops import LENGTH, RECORD_SIZE, rotary_angles
from engine.kernels.linear_config import MAX_PLACES
from engine.kernels.tree_attention import AttentionShape, AttentionWorkspace

__all__ = ["MAX_ROWS", "StepMemory", "roomy"]

MAX_ROWS = 64
CACHE_STEP = 1024  # rows by which the cache grows: capturing again takes longer than copying
OUTBOX_SIZE = RECORD_SIZE + 3 * MAX_ROWS


class StepMemory:
    """Buffers of one sequence, named after what they hold.

    `outbox` int32 is all that the host reads after a step: `record`, the drafted nodes' `tokens`, their `chances`, and
    which of them were `kept`, where not all were verified.
    """

    cache_keys: Tensor  # [layers, kv_heads, capacity, head_dim]
    cache_values: Tensor

    def __init__(self, config: BackboneConfig, dtype: torch.dtype, device: str) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim, dtype)
        self.outbox = torch.zeros(OUTBOX_SIZE, dtype=torch.int32, device=device)
        self.record = self.outbox[:RECORD_SIZE]
        self.tokens = self.outbox[RECORD_SIZE : RECORD_SIZE + MAX_ROWS]
        self.chances = self.outbox[RECORD_SIZE + MAX_ROWS : RECORD_SIZE + 2 * MAX_ROWS].view(torch.float32)
        self.chances.fill_(1.0)  # the root's stays
        self.kept = KeptTables.empty(self.outbox[RECORD_SIZE + 2 * MAX_ROWS :])
        self.span = torch.zeros(1, dtype=torch.int32, device=device)  # where the prompt's chunk ends
        self.chunk_tokens = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)
        qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.x, self.normed, self.hidden = (self.rows(config.hidden_size) for _ in range(3))
        self.qkv, self.inner = self.rows(qkv), self.rows(config.intermediate_size)
        self.attended = self.rows(config.num_heads, config.head_dim)
        self.attention = AttentionWorkspace(self.shape, MAX_ROWS, device)
        self.state = torch.zeros(1, config.hidden_size, dtype=dtype, device=device)  # behind the root: heads read it
        self._logits = torch.zeros(0, device=device)
        self._outgrown: list[Tensor] = []  # captured graphs still write there
        self._keys = torch.zeros(MAX_ROWS * MAX_PLACES, dtype=torch.int64, device=device)
        self.num_layers = config.num_layers
        self._scratch = self._scratch_room()
        self.capacity = 0
        self.grow(CACHE_STEP)

    def scratch(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return the tree's keys and values for trees of `rows` nodes, [layers, rows, kv_heads, head_dim] each."""
        shape = (self.num_layers, rows, self.config.num_kv_heads, self.config.head_dim)
        keys, values = (room[: math.prod(shape)].view(shape) for room in self._scratch)
        return keys, values

    def add_layer(self) -> int:
        """Make room for one more layer in an empty cache; return its index. What was captured before is void."""
        self.num_layers += 1
        rows, self.capacity = self.capacity, 0
        del self.cache_keys, self.cache_values, self._scratch  # before there are larger ones
        self._scratch = self._scratch_room()
        self.grow(rows)
        return self.num_layers - 1

    def logits(self, rows: int) -> Tensor:
        """Return room for scores [rows, vocab], float32; it is made for the most rows that were asked for so far."""
        vocab = self.config.vocab_size
        if self._logits.numel() < rows * vocab:
            self._outgrown.append(self._logits)
            self._logits = torch.zeros(roomy(rows) * vocab, device=self.device)
        return self._logits[: rows * vocab].view(rows, -1)

    def logits_room(self) -> tuple[Tensor, int]:
        """Return the room for scores as it is, for `use_logits_room`."""
        return self._logits, len(self._outgrown)

    def use_logits_room(self, room: tuple[Tensor, int]) -> None:
        """Give back what room has been made since, where nothing that was captured uses it."""
        self._logits, kept = room
        del self._outgrown[kept:]

    def keys_of_best(self, rows: int, places: int) -> Tensor:
        """Return room for the keys of each row's best token by place, int64 [rows, places]."""
        return self._keys[: rows * places].view(rows, places)

    def grow(self, rows: int) -> bool:
        """Make room for `rows` committed and coming rows; True where the cache has moved for it."""
        config, device = self.config, self.device
        most = _in_steps(config.max_positions + MAX_ROWS)
        if min(rows, most) <= self.capacity:
            return False
        capacity = min(most, _in_steps(max(rows, self.capacity * 5 // 4)))
        shape = (self.num_layers, config.num_kv_heads, capacity, config.head_dim)
        for name in ("cache_keys", "cache_values"):
            larger = torch.zeros(shape, dtype=self.dtype, device=device)
            if self.capacity:
                larger[:, :, : self.capacity] = getattr(self, name)
            setattr(self, name, larger)
            del larger
            if self.capacity and device == "cuda":
                torch.cuda.empty_cache()  # what has been outgrown is of no use to anyone in this process
        self.capacity = capacity
        self.angles = rotary_angles(config.rope_theta, config.head_dim, capacity).to(device)
        return True

    def set_length(self, length: int) -> None:
        """Say how many rows are committed, in stream order."""
        self.record[LENGTH : LENGTH + 1].fill_(length)

    @property
    def cache_bytes(self) -> int:
        return self.cache_keys.nbytes + self.cache_values.nbytes

    @property
    def work_bytes(self) -> int:
        """Bytes of everything but the cache."""
        tensors = [value for value in vars(self).values() if isinstance(value, Tensor)]
        owned = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        others = sum(tensor.nbytes for tensor in (*self._scratch, *self._outgrown))
        others += self.attention.num_bytes + self.kept.num_bytes
        return sum(owned.values()) + others - self.cache_bytes

    def rows(self, *width: int) -> Tensor:
        """Make a buffer [MAX_ROWS, ..width] in the activations' type."""
        return torch.zeros(MAX_ROWS, *width, dtype=self.dtype, device=self.device)

    def _scratch_room(self) -> list[Tensor]:
        width = self.config.num_kv_heads * self.config.head_dim
        return [self.rows(self.num_layers * width).flatten() for _ in range(2)]


def roomy(rows: int) -> int:
    """Round a number of rows up so that what has been outgrown, which captured graphs still use, stays small."""
    return next(size for size in (1, 16, MAX_ROWS) if size >= rows)


def _in_steps(rows: int) -> int:
    return -(-rows // CACHE_STEP) * CACHE_STEP
