"""Named tensors in safetensors or torch checkpoints, in one file or in shards with an index, read one at a time.

Nothing is read before it is asked for: shards open on first use and their tensors are views of the mapped file. No
code from a checkpoint ever runs. What the tensors mean is not known here; the caller names the error to raise.
"""

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import EngineError

__all__ = ["MODEL_FILES", "TensorFiles", "read_json", "save_safetensors", "some_names"]

# In the order of preference where a folder holds more than one.
MODEL_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


class _Reader(Protocol):
    names: list[str]

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> Tensor: ...


class TensorFiles:
    """The tensors of one checkpoint; every failure to read is raised as `error`, a class of `EngineError`."""

    def __init__(self, path: Path, error: type[EngineError]) -> None:
        """Open a .safetensors, .pt, .bin or .index.json file."""
        self.path = path
        self._error = error
        self._readers: dict[Path, _Reader] = {}
        if path.name.endswith(".index.json"):
            self._file_of = self._read_index(path)
        else:
            self._file_of = dict.fromkeys(self._reader(path).names, path)

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its values."""
        return self._owner(name).shape(name)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in its own type; it may be a view of the file, so it must not be written to."""
        return self._owner(name).tensor(name)

    def _owner(self, name: str) -> _Reader:
        if name not in self._file_of:
            raise self._error(f"{self.path.name} lacks the tensor {name}; download or export the checkpoint again.")
        path = self._file_of[name]
        reader = self._reader(path)
        if name not in reader.names:
            raise self._error(f"{path.name} lacks the tensor {name} that {self.path.name} promises; download it again.")
        return reader

    def _reader(self, path: Path) -> _Reader:
        if path not in self._readers:
            if not path.is_file():
                raise self._error(f"{path} does not exist; check the path, or download the missing file.")
            kind = _SafetensorsReader if path.suffix == ".safetensors" else _TorchReader
            try:
                self._readers[path] = kind(path)
            except _UnreadableError as failure:
                raise self._error(str(failure)) from failure
        return self._readers[path]

    def _read_index(self, path: Path) -> dict[str, Path]:
        weight_map = read_json(path, self._error).get("weight_map")
        if not isinstance(weight_map, Mapping) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise self._error(f"{path} has no weight_map from tensors to files; download it again.")
        outside = [shard for shard in weight_map.values() if Path(shard).name != shard]
        if outside:
            raise self._error(f"{path} names the shard {outside[0]!r} outside its folder; it is not a model's index.")
        return {name: path.parent / shard for name, shard in weight_map.items()}


def read_json(path: Path, error: type[EngineError]) -> dict[str, Any]:
    """Return the JSON object in a file, or raise `error` with the reason."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as failure:
        raise error(f"{path} cannot be read as JSON ({failure}); download it again.") from failure
    if not isinstance(content, dict):
        raise error(f"{path} holds a JSON {type(content).__name__} where an object belongs; download it again.")
    return content


def save_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors that share no memory, readable by whom any new file here would be.

    `save_file` replaces the file by one that its owner alone may read, which a server under another user cannot open.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    path.chmod(mode)


class _UnreadableError(Exception):
    """A file that is no checkpoint, told in a sentence."""


class _SafetensorsReader:
    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, "pt")
        except (OSError, SafetensorError) as failure:
            raise _UnreadableError(
                f"{path} is damaged or no safetensors file ({failure}); download or export it again."
            ) from failure
        self.names = list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class _TorchReader:
    def __init__(self, path: Path) -> None:
        content = _torch_load(path)
        if not isinstance(content, Mapping):
            raise _UnreadableError(f"{path} holds a {type(content).__name__}, not named tensors; it is no checkpoint.")
        content = _unwrap(content)
        strays = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
        if strays:
            raise _UnreadableError(
                f"{path} holds things that are no tensors ({some_names(strays)}); save the heads' state_dict() alone."
            )
        self._tensors: dict[str, Tensor] = {str(name): value for name, value in content.items()}
        self.names = list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def _torch_load(path: Path) -> object:
    """Unpickle tensors and plain containers only; anything that would run code is refused by name."""
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"  # the format before torch 1.6 cannot be mapped
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as failure:
        reason = str(failure)
        if "GLOBAL" in reason or "global" in reason:
            wanted = next((line.strip() for line in reason.splitlines() if "lobal " in line or "GLOBAL " in line), "")
            raise _UnreadableError(
                f"{path} holds more than tensors: it asks to run code on loading ({wanted}). Nothing was run; "
                "get the checkpoint as .safetensors."
            ) from failure
        raise _UnreadableError(
            f"{path} is damaged or no torch checkpoint ({type(failure).__name__}); download it again."
        ) from failure


def _unwrap(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return the state_dict inside a trainer's wrapper, or the content itself."""
    inner = content.get("state_dict")
    return inner if isinstance(inner, Mapping) else content


def some_names(names: Iterable[str], limit: int = 4) -> str:
    """List a few names, with a count of the rest."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
