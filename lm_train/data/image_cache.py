"""Decoded images on disk: a set is decoded once, under a name made of its contents, and mapped into memory by every rank.

A split is `SPLIT.pixels`, (n, C, H, W) bytes, with arrays of n rows beside it and `SPLIT.where`, a line for each image that
says where it came from. A set appears as a whole or not at all; one process writes it under a lock.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lm_train import signals
from lm_train.data.batches import Integers, Split
from lm_train.data.cache import cache_folder, locked, writing
from lm_train.data.classes import class_names
from lm_train.data.image_files import Row, Rows, decode
from lm_train.data.image_source import ImageSource
from lm_train.data.splits import Digests, digest_of
from lm_train.errors import DataError
from lm_train.recipe import ImageData

_FORMAT = "2"
_TOGETHER = 512
"""Images that are checked, summed up and written at a time."""
_MOST_CLASSES = 100_000


class StoredSplit(NamedTuple):
    """The images of one split."""

    pixels: npt.NDArray[np.uint8]
    """(n, C, H, W), mapped from disk."""
    labels: Integers
    """(n,)"""
    digests: Digests
    """Of each image's pixels, (n,)."""
    sums: npt.NDArray[np.uint64]
    """Of each image and channel: the sum of its pixels, and of their squares, (n, 2, C)."""
    where_file: Path

    def where(self, sample: int) -> str:
        """File and row of an image."""
        with self.where_file.open(encoding="utf-8") as lines:
            return next(line.rstrip("\n") for number, line in enumerate(lines) if number == sample)


@dataclass(frozen=True)
class StoredImages:
    """A decoded set."""

    splits: dict[Split, StoredSplit]
    shape: tuple[int, int, int]
    """Channels, height and width of every image."""
    class_names: tuple[str, ...]


def stored_images(source: ImageSource, section: ImageData) -> StoredImages:
    """The decoded set, from the cache, or written to it now. Any number of processes may call this at once.

    Raises:
        DataError: an unreadable image, one of another size, a label that is no class; with file and row.
        OutputError: if the cache cannot be written.
    """
    folder = cache_folder() / "images" / cache_name(source, section)
    stored = _read(folder)
    if stored is None:
        with locked(folder.with_suffix(".lock")):
            stored = _read(folder)
            if stored is None:
                _write(folder, source, section)
                stored = _read(folder)
    assert stored is not None
    return stored


def cache_name(source: ImageSource, section: ImageData) -> str:
    """Made of everything that decides the pixels and labels."""
    options = (section.image_column, section.label_column, section.image_size, section.channels)
    text = json.dumps([_FORMAT, source.fingerprint, sorted(source.splits), options])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _read(folder: Path) -> StoredImages | None:
    """The set; None if it is not there as a whole."""
    try:
        facts = json.loads((folder / "set.json").read_text(encoding="utf-8"))
        return _mapped(folder, facts)
    except (
        FileNotFoundError,
        NotADirectoryError,
        EOFError,
        ValueError,
        KeyError,
    ):  # never written, or tidied away in part
        return None


def _mapped(folder: Path, facts: dict[str, Any]) -> StoredImages:
    shape = tuple(facts["shape"])
    splits: dict[Split, StoredSplit] = {}
    for split, count in facts["counts"].items():
        file = folder / f"{split}.pixels"
        if file.stat().st_size != count * int(np.prod(shape)):
            raise EOFError(file)
        pixels = np.asarray(np.memmap(file, dtype=np.uint8, mode="r", shape=(count, *shape)))
        labels, digests, sums = (np.load(folder / f"{split}.{name}.npy") for name in ("labels", "digests", "sums"))
        splits[split] = StoredSplit(pixels, labels, digests, sums, folder / f"{split}.where")
    return StoredImages(splits, shape, tuple(facts["class_names"]))


def _write(folder: Path, source: ImageSource, section: ImageData) -> None:
    partial = folder.with_suffix(".partial")
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        try:
            form, classes = _Form(section), _Classes(source.class_names)
            counts = {s: _write_split(partial, s, source.splits[s], form, classes) for s in _ordered(source)}
            facts = {"shape": form.shape, "class_names": classes.names, "counts": counts}
            (partial / "set.json").write_text(json.dumps(facts), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _ordered(source: ImageSource) -> Iterator[Split]:
    """The training split first: it decides sizes and classes."""
    return (split for split in ("train", "val", "test") if split in source.splits)


def _write_split(folder: Path, split: Split, rows: Rows, form: _Form, classes: _Classes) -> int:
    labels: list[str] = []
    where: list[str] = []
    digests: list[int] = []
    sums: list[npt.NDArray[np.uint64]] = []
    with (folder / f"{split}.pixels").open("wb") as file:
        together: list[npt.NDArray[np.uint8]] = []
        for row in rows():
            signals.check()
            image = form.fit(row)
            together.append(image)
            labels.append(classes.checked(row, split))
            where.append(" ".join(row.where.splitlines()))
            digests.append(digest_of(image.tobytes()))
            if len(together) == _TOGETHER:
                sums.append(_flushed(together, file))
        if together:
            sums.append(_flushed(together, file))
    if not labels:
        raise DataError(f"{form.label}: no {split} images")
    numbers = classes.numbers(labels)
    np.save(folder / f"{split}.labels.npy", numbers)
    np.save(folder / f"{split}.digests.npy", np.array(digests, dtype=np.uint64))
    np.save(folder / f"{split}.sums.npy", np.concatenate(sums))
    (folder / f"{split}.where").write_text("".join(f"{line}\n" for line in where), encoding="utf-8")
    return len(labels)


def _flushed(together: list[npt.NDArray[np.uint8]], file: Any) -> npt.NDArray[np.uint64]:
    """Writes the images and forgets them; their sums, (n, 2, C)."""
    block = np.stack(together)
    file.write(block.data)
    together.clear()
    values = block.reshape(*block.shape[:2], -1).astype(np.uint32)
    return np.stack((values.sum(axis=2, dtype=np.uint64), (values * values).sum(axis=2, dtype=np.uint64)), axis=1)


class _Form:
    """Brings every image to one size and number of channels, which are asked for, or the first image's."""

    def __init__(self, section: ImageData) -> None:
        self.label = section.path
        self.size = section.image_size
        self.channels = section.channels
        self.first = ""
        self.shape: tuple[int, int, int] | None = None

    def fit(self, row: Row) -> npt.NDArray[np.uint8]:
        """The pixels of an image, (C, H, W)."""
        image = decode(row, self.channels, self.size)
        planes = np.ascontiguousarray(image.transpose(2, 0, 1)) if image.ndim == 3 else image[None]
        if self.shape is None:
            self.first, self.shape = row.where, planes.shape
        if planes.shape == self.shape:
            return planes
        channels, height, width = self.shape
        if planes.shape[1:] != self.shape[1:]:
            raise DataError(
                f"{row.where}: {planes.shape[1]} x {planes.shape[2]} pixels (height x width), but {self.first} has "
                f"{height} x {width}; bring all to one size with data.image_size=N"
            )
        raise DataError(
            f"{row.where}: {_colours(len(planes))}, but {self.first} is {_colours(channels)}; say data.channels=1 or "
            "data.channels=3"
        )


def _colours(channels: int) -> str:
    return "grey" if channels == 1 else "coloured" if channels == 3 else f"of {channels} channels"


class _Classes:
    """The classes of a set.

    Args:
        declared: their names as the source has them; a label that is a number then counts them. None: the labels of the
            training split are the classes, and a number is a name like any other.
    """

    def __init__(self, declared: tuple[str, ...] | None) -> None:
        self.declared = declared is not None
        self.names = declared
        self._numbers = _numbered(declared or ())

    def checked(self, row: Row, split: Split) -> str:
        """The name of a row's class."""
        label = row.label
        if isinstance(label, int) and self.declared:
            assert self.names is not None
            if 0 <= label < len(self.names):
                return self.names[label]
            most = len(self.names)
            raise DataError(f"{row.where}: label {label} is outside of the {most:,} classes (0 to {most - 1:,})")
        if isinstance(label, int) and label < 0:  # how the hub's unlabelled images say so
            raise DataError(f"{row.where}: label {label} is no class; leave images without a class out")
        if self.names is not None and str(label) not in self._numbers:
            shown = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
            raise DataError(f"{row.where}: class {label!r:.60} is none of those of the training images ({shown})")
        return str(label)

    def numbers(self, labels: list[str]) -> Integers:
        """The classes of a split as numbers, (n,); the first split to come fixes them."""
        if self.names is None:
            self.names = class_names(labels)
            if len(self.names) > _MOST_CLASSES:
                raise DataError(
                    f"{len(self.names):,} different labels such as {self.names[0]!r:.60} are too many for classes; name another "
                    "column with data.label_column="
                )
            self._numbers = _numbered(self.names)
        return np.array([self._numbers[label] for label in labels], dtype=np.int64)


def _numbered(names: tuple[str, ...]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}
