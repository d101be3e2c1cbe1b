"""The shards of a checkpoint as one: which file holds which range of which tensor, as bytes."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import NamedTuple

from lm_train.errors import CheckpointError
from lm_train.saved.manifest import Manifest
from lm_train.saved.tensors import TYPES, read_header


class Piece(NamedTuple):
    """Elements start .. stop of a flattened tensor."""

    start: int
    stop: int
    file: Path
    begin: int
    """Of its first byte in the file."""


class Shards:
    """The tensors of a checkpoint whose checksums were compared.

    Args:
        folder: of the checkpoint.
        manifest: its own.

    Raises:
        CheckpointError: if the shards do not hold every element of every tensor exactly once.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.metadata: list[dict[str, str]] = []
        """Of each rank's shard."""
        self.pieces: dict[tuple[str, str], list[Piece]] = {}
        self._open: dict[Path, mmap.mmap] = {}
        for name in manifest.shards:
            header = read_header(folder / name)
            self.metadata.append(header.metadata)
            for label, entry in header.tensors.items():
                tensor, key, start = self._named(folder / name, label)
                if manifest.tensors[tensor].keys[key] != entry.dtype or len(entry.shape) != 1:
                    raise CheckpointError(
                        f"{folder / name}: {label[:200]!r}: expected a row of {manifest.tensors[tensor].keys[key]}, found "
                        f"{entry.dtype} {entry.shape}"
                    )
                piece = Piece(start, start + entry.numel, folder / name, entry.begin)
                self.pieces.setdefault((tensor, key), []).append(piece)
        self._check_coverage()

    def _named(self, file: Path, label: str) -> tuple[str, str, int]:
        parts = label.rsplit("|", 2)
        known = self.manifest.tensors.get(parts[0]) if len(parts) == 3 else None
        if known is None or parts[1] not in known.keys or not parts[2].isdecimal() or len(parts[2]) > 18:
            raise CheckpointError(f"{file}: holds {label[:200]!r}, which its manifest does not know")
        return parts[0], parts[1], int(parts[2])

    def _check_coverage(self) -> None:
        for name, tensor in self.manifest.tensors.items():
            for key in tensor.keys:
                pieces = self.pieces.setdefault((name, key), [])
                pieces.sort()
                reached = 0
                for piece in pieces:
                    if piece.start != reached:
                        break
                    reached = piece.stop
                else:
                    if reached == tensor.numel:
                        continue
                raise CheckpointError(
                    f"{self.folder}: {name[:200]} {key}: expected {tensor.numel:,} elements, each once; found a gap or an "
                    f"overlap at {reached:,}"
                )

    def width(self, name: str, key: str) -> int:
        """Bytes of an element."""
        return TYPES[self.manifest.tensors[name].keys[key]][1]

    def between(self, name: str, key: str, start: int, stop: int) -> list[tuple[int, memoryview]]:
        """The bytes of elements start .. stop, in pieces, each with its first element."""
        width = self.width(name, key)
        found = []
        for piece in self.pieces[name, key]:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                begin = piece.begin + (first - piece.start) * width
                found.append((first, self._bytes(piece.file)[begin : begin + (last - first) * width]))
        return found

    def _bytes(self, file: Path) -> memoryview:
        if file not in self._open:
            with file.open("rb") as opened:
                # private and writable, since torch warns about a buffer that is not
                self._open[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        return memoryview(self._open[file])
