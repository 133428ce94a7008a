"""Read the header of a GGUF file: its fields, and the shapes of its tensors.

`gguf.GGUFReader` does this too, but takes seconds for the vocabulary of a model. The format is that
of versions 2 and 3, as ggml's documentation describes it.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

_NUMBERS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")  # by GGUF's type
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32


@dataclass(frozen=True)
class Header:
    """Hold the fields of a GGUF file, those with lists left out, and {name: shape} of its tensors,
    as transformers orders a shape: (out, in)."""

    fields: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def is_adapter(header: Header) -> bool:
    """Return whether a file holds an adapter, not a whole model."""
    return header.fields.get("general.type", "model") == "adapter"


class _Cursor:
    def __init__(self, data):
        self.data, self.place = data, 0

    def take(self, form: str) -> Any:
        values = struct.unpack_from(f"<{form}", self.data, self.place)
        self.place += struct.calcsize(f"<{form}")
        return values[0] if len(values) == 1 else values

    def text(self) -> str:
        size = self.take("Q")
        self.place += size
        return self.data[self.place - size : self.place].decode()

    def value(self, kind: int) -> Any:
        """Return a value; None for a list, which is passed over."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.take(_NUMBERS[kind])
        of, size = self.take("IQ")
        if of == _STRING:
            for _ in range(size):
                length = self.take("Q")
                self.place += length
        elif of == _ARRAY:
            for _ in range(size):
                self.value(_ARRAY)
        else:
            self.place += size * struct.calcsize(f"<{_NUMBERS[of]}")
        return None


def read_header(file: str | os.PathLike, what: str = "file") -> Header:
    """Return the header of a GGUF file. FileNotFoundError for a missing one, ValueError for a file
    that is no GGUF file or is cut off; `what` names the argument."""
    path = Path(file)
    if path.is_dir():
        raise ValueError(
            f"{what}={str(path)!r} is a folder: export it first, with to_gguf or adapter_to_gguf"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{what}={str(path)!r}: there is no such file")
    size = path.stat().st_size
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"{what}={str(path)!r} is not a GGUF file")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header, end = _parse(_Cursor(data))
            except (struct.error, IndexError, TypeError, ValueError, KeyError):
                header, end = None, size + 1
    if end > size:
        raise ValueError(f"{what}={str(path)!r} is broken or cut off: write it again")
    return header


def _parse(cursor: _Cursor) -> tuple[Header, int]:
    """Return the header and the size that the file must have."""
    cursor.take("4sI")
    tensors, entries = cursor.take("QQ")
    fields, shapes, end = {}, {}, 0
    for _ in range(entries):
        name = cursor.text()
        fields[name] = cursor.value(cursor.take("I"))
    for _ in range(tensors):
        name = cursor.text()
        shape = [cursor.take("Q") for _ in range(cursor.take("I"))]
        kind, offset = cursor.take("IQ")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        numbers = 1
        for length in shape:
            numbers *= length
        end = max(end, offset + numbers // block * size)
        shapes[name] = tuple(reversed(shape))
    step = fields.get("general.alignment", _ALIGNMENT)
    start = -(-cursor.place // step) * step
    return Header({k: v for k, v in fields.items() if v is not None}, shapes), start + end
