"""Self-made conversations on disk: shards of token ids with a loss mask, and an index that says what is complete.

A shard is one safetensors file: `tokens` of all documents in a row, `labels` (1 where the model answered), `lengths`
and `greedy` by document, `source` (number of the given prompt, or -1). The index is replaced as a whole after each
shard, so a killed run leaves only complete shards in it.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import InvalidParameterError

__all__ = ["Document", "ShardWriter", "pack_documents", "read_documents", "read_index", "read_shards"]

INDEX = "index.json"


@dataclass(frozen=True)
class Document:
    """One conversation: `spans` are the [start, stop) of the model's answers in `tokens`."""

    tokens: Sequence[int]
    spans: Sequence[tuple[int, int]]
    is_greedy: bool
    source: int = -1

    @property
    def num_labels(self) -> int:
        return sum(stop - start for start, stop in self.spans)


class ShardWriter:
    """Collects documents and writes a shard whenever `shard_tokens` are full; opens on what is already there.

    `about` describes the run: a folder written for another model, from other prompts or by another server is refused.
    """

    def __init__(self, folder: Path, about: dict[str, object], shard_tokens: int = 1_000_000) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.shard_tokens = folder, shard_tokens
        self.index = read_index(folder) or {"version": 1, "about": about, "shards": []}
        _check_same_run(folder, self.index["about"], about)
        self._pending: list[Document] = []
        self._pending_tokens = 0
        self._new_rejections: list[int] = []

    @property
    def num_shards(self) -> int:
        return len(self.index["shards"])

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, those not yet on disk included."""
        return self._pending_tokens + sum(shard["tokens"] for shard in self.index["shards"])

    @property
    def num_labels(self) -> int:
        """Tokens that the model answered with, on disk or not yet."""
        pending = sum(document.num_labels for document in self._pending)
        return pending + sum(shard["labels"] for shard in self.index["shards"])

    @property
    def rejected(self) -> list[int]:
        """Given prompts whose answers were not worth keeping."""
        return [*self.index.get("rejected", []), *self._new_rejections]

    def reject(self, source: int) -> None:
        """Note that a given prompt is not to be answered again."""
        self._new_rejections.append(source)

    def add(self, document: Document) -> None:
        self._pending.append(document)
        self._pending_tokens += len(document.tokens)
        if self._pending_tokens >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what is collected as a shard, then name it in the index."""
        if self._pending:
            self._write_shard()
        elif not self._new_rejections:
            return
        self.index["rejected"] = self.rejected
        unfinished = self.folder / (INDEX + ".part")
        unfinished.write_text(json.dumps(self.index, indent=1))
        os.replace(unfinished, self.folder / INDEX)
        self._pending, self._pending_tokens, self._new_rejections = [], 0, []

    def _write_shard(self) -> None:
        name = f"shard-{self.num_shards:05d}.safetensors"
        tensors = pack_documents(self._pending)
        unfinished = self.folder / (name + ".part")
        save_file(tensors, unfinished)
        os.replace(unfinished, self.folder / name)
        self.index["shards"].append(
            {
                "file": name,
                "documents": len(self._pending),
                "tokens": int(tensors["tokens"].numel()),
                "labels": int(tensors["labels"].sum()),
                "greedy": int(tensors["greedy"].sum()),
            }
        )


def _check_same_run(folder: Path, known: dict, about: dict[str, object]) -> None:
    if known.get("model") != about.get("model"):
        raise InvalidParameterError(
            f"{folder} holds data of {known.get('model')}, not of {about.get('model')}; give another --out."
        )
    if known.get("server") != about.get("server"):
        raise InvalidParameterError(
            f"{folder} was answered by {known.get('server') or 'the model itself'}, not by "
            f"{about.get('server') or 'the model itself'}; give another --out."
        )
    if "prompts" in about and known.get("prompts") != about["prompts"]:
        raise InvalidParameterError(
            f"{folder} was begun with other prompts (or none) than are given now; give another --out."
        )


def read_index(folder: Path) -> dict | None:
    """Return the folder's index, or None where nothing was finished yet."""
    path = folder / INDEX
    return json.loads(path.read_text()) if path.is_file() else None


def read_shards(folder: Path) -> Iterator[dict[str, Tensor]]:
    """Return the shards' tensors one after the other; raises InvalidParameterError for a folder without data."""
    index = read_index(folder)
    if index is None:
        raise InvalidParameterError(f"{folder} holds no training data; make some with the distill command.")
    return (load_file(folder / shard["file"]) for shard in index["shards"])


def read_documents(folder: Path) -> Iterator[Document]:
    """Return the folder's documents one by one."""
    for shard in read_shards(folder):
        tokens, labels = shard["tokens"].tolist(), shard["labels"].tolist()
        start = 0
        for length, greedy, source in zip(
            shard["lengths"].tolist(), shard["greedy"].tolist(), shard["source"].tolist(), strict=True
        ):
            stop = start + length
            yield Document(tokens[start:stop], _spans(labels[start:stop]), bool(greedy), source)
            start = stop


def pack_documents(documents: Sequence[Document]) -> dict[str, Tensor]:
    """Return the tensors of one shard."""
    tokens = torch.tensor([token for document in documents for token in document.tokens], dtype=torch.int32)
    labels = torch.zeros(tokens.numel(), dtype=torch.uint8)
    base = 0
    for document in documents:
        for start, stop in document.spans:
            labels[base + start : base + stop] = 1
        base += len(document.tokens)
    return {
        "tokens": tokens,
        "labels": labels,
        "lengths": torch.tensor([len(document.tokens) for document in documents], dtype=torch.int32),
        "greedy": torch.tensor([document.is_greedy for document in documents], dtype=torch.uint8),
        "source": torch.tensor([document.source for document in documents], dtype=torch.int32),
    }


def _spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    bounded = [0, *labels, 0]
    edges = [at for at in range(len(labels) + 1) if bounded[at] != bounded[at + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))
