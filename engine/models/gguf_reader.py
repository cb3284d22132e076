"""Parse a GGUF file's header and map its tensors, in a tenth of a second.

The gguf package's reader wraps every string of the vocabulary in arrays, which alone takes longer than all the rest of
a start. The layout: "GGUF", version, counts, key-value fields, tensor infos, padding, tensor data (GGUF
specification, version 3).
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

__all__ = ["GGUFHeader", "GGUFTensor", "read_gguf"]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: block type and raw bytes [rows, bytes of a row], mapped from the file."""

    kind: GGMLQuantizationType
    data: np.ndarray


@dataclass(frozen=True)
class GGUFHeader:
    """Everything in the file: its fields and its tensors by name."""

    fields: dict[str, object]
    tensors: dict[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFHeader:
    """Read a little-endian GGUF file of version 2 or 3; raises ValueError or OSError for anything else."""
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    cursor = _Cursor(content)
    magic, version, num_tensors, num_fields = cursor.unpack("<4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it starts with {magic!r}, version {version}; GGUF version 2 or 3 is expected")
    fields = {cursor.string(): cursor.value() for _ in range(num_fields)}
    infos = [cursor.tensor_info() for _ in range(num_tensors)]
    alignment = int(fields.get("general.alignment", 32))  # type: ignore[call-overload]
    start = -(-cursor.offset // alignment) * alignment
    return GGUFHeader(fields, {name: _map(content, start, shape, kind, offset) for name, shape, kind, offset in infos})


def _map(content: mmap.mmap, start: int, shape: list[int], kind: GGMLQuantizationType, offset: int) -> GGUFTensor:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    columns, rows = shape[0], int(np.prod(shape[1:], dtype=np.int64))
    row_bytes = columns // block * block_bytes
    if start + offset + rows * row_bytes > len(content):
        raise ValueError("it ends before its last tensor does")
    data = np.frombuffer(content, np.uint8, rows * row_bytes, start + offset)
    return GGUFTensor(kind, data.reshape(rows, row_bytes) if len(shape) > 1 else data)


class _Cursor:
    """A reading position in the header."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self.offset = 0

    def unpack(self, layout: str) -> tuple:
        try:
            values = struct.unpack_from(layout, self._content, self.offset)
        except struct.error as error:
            raise ValueError(f"its header ends early, at byte {self.offset}") from error
        self.offset += struct.calcsize(layout)
        return values

    def string(self) -> str:
        (length,) = self.unpack("<Q")
        self.offset += length
        return self._content[self.offset - length : self.offset].decode("utf-8", "replace")

    def value(self) -> object:
        (kind,) = self.unpack("<I")
        return self._typed(kind)

    def _typed(self, kind: int) -> object:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.unpack("<IQ")
            if item in _SCALARS:
                return list(self.unpack(f"<{count}{_SCALARS[item]}"))
            return [self._typed(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a field has the unknown type {kind}")
        return self.unpack("<" + _SCALARS[kind])[0]

    def tensor_info(self) -> tuple[str, list[int], GGMLQuantizationType, int]:
        name = self.string()
        (dimensions,) = self.unpack("<I")
        shape = list(self.unpack(f"<{dimensions}Q"))
        kind, offset = self.unpack("<IQ")
        return name, shape, GGMLQuantizationType(kind), offset
