"""A save: each rank writes its shard into a hidden folder beside the final one; when all are on disk rank 0 publishes it.

A process that is killed at any instant leaves what was published before, and a hidden folder that the next save removes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lm_train.checkpoint.agreement import Group
from lm_train.checkpoint.snapshot import Snapshot
from lm_train.checkpoint.views import Views
from lm_train.errors import OutputError
from lm_train.saved.durable import sync
from lm_train.saved.manifest import FORMAT, MANIFEST, STATE
from lm_train.saved.places import hidden
from lm_train.saved.publish import make_latest, put_in_place
from lm_train.saved.sealed import sealed
from lm_train.saved.space import check_space, disk_is_full


class Published(NamedTuple):
    """A checkpoint that is in its place."""

    folder: Path
    bytes: int


def save(folder: Path, views: Views, state: dict[str, Any], group: Group | None = None) -> Published:
    """Writes `folder` while the training stands still; every rank calls it at the same step boundary.

    Args:
        folder: final name, such as checkpoints/step-100. An existing one is replaced, once this one is complete.
        views: of the network and the optimizer that are saved.
        state: JSON values; must hold `step`.
        group: of all ranks; None for one alone.

    Raises:
        OutputError: if it cannot be written; an older checkpoint is untouched.
    """
    return write(Snapshot(views, state), folder, group or Group(1))


def write(
    snapshot: Snapshot, folder: Path, group: Group, afterwards: Callable[[Path], object] | None = None
) -> Published:
    """Writes and publishes what was seen at a boundary; every rank calls it, each from one thread.

    Args:
        snapshot: this rank's.
        folder: as of `save`.
        group: of all ranks.
        afterwards: what rank 0 does once this checkpoint is the latest.

    Raises:
        OutputError: on all ranks, if any cannot write.
    """
    partial = hidden(folder, "partial")
    total = sum(group.gather(snapshot.n_bytes + 2 * len(snapshot.state)))
    with _Together(group, folder, partial, snapshot.rank) as together:
        if snapshot.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            check_space(folder.parent, total, snapshot.world + 4, "a checkpoint")
            partial.mkdir(parents=True)
    with _Together(group, folder, partial, snapshot.rank) as together:
        name = f"shard-{snapshot.rank}.safetensors"
        together.value = {name: _written(partial / name, snapshot.chunks())}, snapshot.held
    answers = together.answers
    with _Together(group, folder, partial, snapshot.rank):
        if snapshot.rank == 0:
            files = {name: entry for shards, _ in answers for name, entry in shards.items()}
            files[STATE] = _written(partial / STATE, [memoryview(snapshot.state.encode())])
            manifest = {
                "format": FORMAT,
                "world_size": snapshot.world,
                "optimizer": snapshot.optimizer,
                "optimizer_step": snapshot.optimizer_step,
                "tensors": _merged([tensors for _, tensors in answers]),
                "files": files,
            }
            _written(partial / MANIFEST, [memoryview(sealed(manifest).encode())])
            sync(partial)
            put_in_place(partial, folder)
            make_latest(folder)
            if afterwards is not None:
                afterwards(folder)
    return Published(folder, total)


class _Together:
    """A part of the work on every rank, at whose end all know whether it was done everywhere.

    Raises:
        OutputError: on all ranks, with the first one's words; what was written of the checkpoint is removed.
    """

    value: Any = None
    answers: list[Any]

    def __init__(self, group: Group, folder: Path, partial: Path, rank: int) -> None:
        self.group, self.folder, self.partial, self.rank = group, folder, partial, rank

    def __enter__(self) -> _Together:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, Exception):
            return
        told = self.group.gather([None if error is None else self._words(error), self.value])
        faults = [fault for fault, _ in told if fault]
        if faults:
            if self.rank == 0:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise OutputError(faults[0]) from None
        self.answers = [value for _, value in told]

    def _words(self, error: Exception) -> str:
        if isinstance(error, OutputError):
            return f"cannot write the checkpoint {self.folder.name}: {error}"
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = disk_is_full(self.folder.parent) if full else f"{type(error).__name__}: {error}"
        return f"cannot write the checkpoint {self.folder}: {why}"


def _written(file: Path, chunks: Iterator[memoryview] | list[memoryview]) -> dict[str, Any]:
    """Writes a file, waits until it is on the disk, and says what it holds; hashing and writing leave Python to others."""
    digest, size = hashlib.blake2b(digest_size=32), 0
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            while len(chunk):
                chunk = chunk[os.write(descriptor, chunk) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "blake2b": digest.hexdigest()}


def _merged(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for tensors in ranks:
        for name, entry in tensors.items():
            merged.setdefault(name, {"shape": entry["shape"], "keys": {}})["keys"].update(entry["keys"])
    return merged
