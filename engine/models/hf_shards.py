"""Write many tensors into safetensors shards with an index, holding one shard in memory at a time."""

import json
import os
from pathlib import Path

from torch import Tensor

from engine.models.tensor_files import save_safetensors

__all__ = ["ShardWriter"]


class ShardWriter:
    """Collects tensors; a full shard goes to disk at once. `finish` gives the files their final names.

    Files of an earlier model in the folder are removed only then, so that a killed run leaves it readable.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; it is copied to the CPU."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._max_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu()
        self._pending_bytes += size
        self._total_bytes += size

    def finish(self) -> None:
        """Write what is left, name the shards and write the index where there are several."""
        self._flush()
        count = len(self._shards)
        for stale in [*self._folder.glob("model*.safetensors"), self._folder / "model.safetensors.index.json"]:
            stale.unlink(missing_ok=True)
        names = ["model.safetensors"]
        if count > 1:
            names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        for number, name in enumerate(names):
            os.replace(self._unfinished(number), self._folder / name)
        if count > 1:
            owner = {tensor: name for name, tensors in zip(names, self._shards, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": owner}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")

    def _flush(self) -> None:
        save_safetensors(self._pending, self._unfinished(len(self._shards)))
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _unfinished(self, number: int) -> Path:
        return self._folder / f"shard-{number}.part"
