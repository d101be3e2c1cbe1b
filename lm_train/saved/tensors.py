"""safetensors files (huggingface.co/docs/safetensors): their header read with distrust, and written.

8 bytes, little-endian: length of the header
header: JSON {name: {"dtype": .., "shape": [..], "data_offsets": [begin, end]}, "__metadata__": {text: text}}
the tensors' bytes, without a gap
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lm_train.errors import CheckpointError

MOST_HEADER_BYTES = 100_000_000
"""As in the reference implementation."""
TYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
"""torch's name of a type: safetensors' name, and bytes of an element."""
_BY_NAME = {name: (ours, width) for ours, (name, width) in TYPES.items()}


class Entry(NamedTuple):
    """A tensor in a file."""

    dtype: str
    """torch's name."""
    shape: tuple[int, ...]
    begin: int
    """Of its first byte in the file."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return TYPES[self.dtype][1]


class Header(NamedTuple):
    tensors: dict[str, Entry]
    metadata: dict[str, str]


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The head of a file of these tensors (name, torch's type, shape) in this order, to be followed by their bytes."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape in tensors:
        kind, width = TYPES[dtype]
        begin, end = end, end + width * math.prod(shape)
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(file: Path) -> Header:
    """What a file says it holds, if that is possible.

    Raises:
        CheckpointError: saying what is not.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
                raise CheckpointError(
                    f"{file}: not a safetensors file: expected a header within its {size:,} bytes, found one of {length:,}"
                )
            text = opened.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        content = json.loads(text)
        metadata = content.pop("__metadata__", {})
        named = {name: _entry(entry) for name, entry in content.items()}
        if not all(isinstance(part, str) for pair in metadata.items() for part in pair):
            raise TypeError("metadata that is not text")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: not a safetensors file: its header cannot be read ({str(error)[:200]})"
        ) from None
    reached = 0
    for name, (entry, begin, end) in sorted(named.items(), key=lambda item: item[1][1:]):
        if begin != reached or end - begin != entry.numel * entry.itemsize:
            raise CheckpointError(
                f"{file}: tensor {name[:200]!r}: expected {entry.numel * entry.itemsize:,} bytes from {reached:,} on, found "
                f"{begin:,} to {end:,}"
            )
        reached = end
    if 8 + length + reached != size:
        raise CheckpointError(f"{file}: expected {8 + length + reached:,} bytes, found {size:,}")
    tensors = {name: entry._replace(begin=8 + length + begin) for name, (entry, begin, _) in named.items()}
    return Header(tensors, metadata)


def _entry(value: dict[str, Any]) -> tuple[Entry, int, int]:
    dtype, _ = _BY_NAME[value["dtype"]]
    shape, (begin, end) = value["shape"], value["data_offsets"]
    numbers = [begin, end, *shape]
    if any(type(number) is not int or not 0 <= number < 1 << 62 for number in numbers) or len(shape) > 64:
        raise ValueError(f"impossible numbers {str(numbers)[:80]}")
    return Entry(dtype, tuple(shape), 0), begin, end
