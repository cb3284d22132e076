"""The keys and values of one sequence: committed rows in one growing buffer, the verified tree's rows beside it.

Committed rows are stored at their absolute position. The buffer grows with the text, in steps, up to the model's
maximum; it never starts there. Scratch rows stay as the layers hand them over; only accepted ones
are copied.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.backbone import BackboneConfig
from engine.errors import ContextLengthError

__all__ = ["KVCache"]

_GROWTH = 256  # rows; a step this small keeps unused rows under a few MB for the bundled model


class KVCache:
    """`keys` and `values` are [layers, kv_heads, capacity, head_dim]; rows from `length` on are free to overwrite."""

    def __init__(
        self, config: BackboneConfig, device: torch.device | str, dtype: torch.dtype, *, num_layers: int | None = None
    ) -> None:
        self._config = config
        self._num_layers = config.num_layers if num_layers is None else num_layers
        self._device, self._dtype = device, dtype
        self.length = 0
        self.keys = self._buffer(0)
        self.values = self._buffer(0)
        self._scratch: list[tuple[Tensor, Tensor]] = []

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows after the committed ones; raises ContextLengthError past the model's maximum."""
        needed, maximum = self.length + rows, self._config.max_positions
        if needed > maximum:
            raise ContextLengthError(
                f"The conversation needs {needed} tokens but the model holds {maximum}; start a new chat or shorten it."
            )
        if needed > self.capacity:
            self._grow(min(maximum, -(-max(needed, self.capacity * 5 // 4) // _GROWTH) * _GROWTH))

    def hold_scratch(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep one layer's rows of the tree: [nodes, kv_heads, head_dim]; layers come in order."""
        if layer == 0:
            self._scratch.clear()
        self._scratch.append((key, value))

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write a layer's rows [rows, kv_heads, head_dim] after the committed ones; `advance` commits them."""
        rows = slice(self.length, self.length + key.shape[0])
        self.keys[layer, :, rows] = key.transpose(0, 1)
        self.values[layer, :, rows] = value.transpose(0, 1)

    def advance(self, rows: int) -> None:
        """Count appended rows as committed."""
        self.length += rows

    def commit(self, path: Sequence[int]) -> None:
        """Copy the scratch rows of `path` (root first) behind the committed ones and drop the rest.

        Layers that kept no scratch rows get none.
        """
        for layer, (key, value) in enumerate(self._scratch):
            self.append(layer, key[list(path)], value[list(path)])
        self._scratch.clear()
        self.advance(len(path))

    def truncate(self, length: int) -> None:
        """Forget committed rows from `length` on."""
        self.length = min(self.length, length)

    def memory_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def _buffer(self, rows: int) -> Tensor:
        config = self._config
        shape = (self._num_layers, config.num_kv_heads, rows, config.head_dim)
        return torch.zeros(shape, device=self._device, dtype=self._dtype)

    def _grow(self, rows: int) -> None:
        for name in ("keys", "values"):
            larger = self._buffer(rows)
            larger[:, :, : self.length] = getattr(self, name)[:, :, : self.length]
            setattr(self, name, larger)
