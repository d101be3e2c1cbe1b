"""Whole tensors out of the ranges that ranks have saved, as plain safetensors that any program reads.

model.safetensors                                              with one file
model-00001-of-00003.safetensors ..., model.safetensors.index.json      with several: {"weight_map": {tensor: file}}
optimizer.safetensors                                          the optimizer's states, named `parameter.key`
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lm_train.errors import CheckpointError
from lm_train.saved.durable import sync
from lm_train.saved.manifest import Manifest
from lm_train.saved.shards import Shards
from lm_train.saved.tensors import TYPES, header_bytes

Kind = Literal["model", "optimizer"]
_OF_MODEL = ("param", "buffer")


def convert(folder: Path, manifest: Manifest, out: Path, kind: Kind, files: int) -> None:
    """Writes the tensors of a checkpoint whose checksums were compared; one at a time is in memory, and none of it copied twice.

    Args:
        folder: of the checkpoint.
        manifest: its own.
        out: a folder that is there.
        kind: parameters and buffers, or what the optimizer keeps for them.
        files: among which they are divided by their bytes, in the model's order.

    Raises:
        CheckpointError: if the shards do not hold every tensor whole.
        OSError: if it cannot be written.
    """
    shards = Shards(folder, manifest)
    tensors = [
        (name, key)
        for name, stored in manifest.tensors.items()
        for key in stored.keys
        if (key in _OF_MODEL) == (kind == "model")
    ]
    if not tensors:
        raise CheckpointError(f"{folder}: holds no {'parameters' if kind == 'model' else 'state of an optimizer'}")
    total = sum(_size(manifest, name, key) for name, key in tensors)
    parts: list[list[tuple[str, str]]] = [[] for _ in range(min(files, len(tensors)))]
    reached = 0
    for name, key in tensors:
        middle = reached + _size(manifest, name, key) / 2
        parts[min(len(parts) - 1, int(middle * len(parts) / max(1, total)))].append((name, key))
        reached += _size(manifest, name, key)
    parts = [part for part in parts if part]
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        title = f"{kind}-{number:05}-of-{len(parts):05}" if len(parts) > 1 else kind
        _write(out / f"{title}.safetensors", shards, part)
        weight_map |= {_label(name, key): f"{title}.safetensors" for name, key in part}
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / f"{kind}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    sync(out)


def _label(name: str, key: str) -> str:
    return name if key in _OF_MODEL else f"{name}.{key}"


def _size(manifest: Manifest, name: str, key: str) -> int:
    stored = manifest.tensors[name]
    return stored.numel * TYPES[stored.keys[key]][1]


def _write(file: Path, shards: Shards, tensors: list[tuple[str, str]]) -> None:
    # the widest first, as safetensors has them: each begins at a multiple of its elements' width
    ordered = sorted(tensors, key=lambda tensor: -shards.width(*tensor))
    stored = shards.manifest.tensors
    header = header_bytes(
        ((_label(name, key), stored[name].keys[key], stored[name].shape) for name, key in ordered), {"format": "pt"}
    )
    with file.open("xb") as opened:
        opened.write(header)
        for name, key in ordered:
            for piece in _bytes(shards, name, key):
                opened.write(piece)
        opened.flush()
        os.fsync(opened.fileno())


def _bytes(shards: Shards, name: str, key: str) -> Iterator[memoryview]:
    for _, piece in shards.between(name, key, 0, shards.manifest.tensors[name].numel):
        yield piece
