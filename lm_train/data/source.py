"""Where text comes from: files, folders, tables, the hub, the standard library; as pieces of documents by split."""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lm_train import signals
from lm_train.data.cache import cache_folder, write_text
from lm_train.data.hub import find_dataset, out_of_reach, quiet_datasets
from lm_train.data.order import mix64
from lm_train.data.readers import (
    Piece,
    Reader,
    Split,
    character_boundary,
    column_of,
    file_kind,
    file_pieces,
    row_pieces,
    text_pieces,
)
from lm_train.errors import DataError, LMTrainError, OutputError
from lm_train.recipe import EmbeddedData, TextData
from lm_train.recipe.hub_names import is_hub_name

_SPLIT_NAMES: dict[Split, re.Pattern[str]] = {
    "train": re.compile(r"train(ing|set)?(?![a-z])"),
    "val": re.compile(r"(val|valid|validation|dev|development)(set)?(?![a-z])"),
    "test": re.compile(r"(test|testing|t10k)(set)?(?![a-z])"),
}
"""How file, folder and split names begin: train-00000.parquet and validation_matched, but not testament.txt."""


@dataclass(frozen=True)
class Source:
    """A corpus: a fingerprint of its content, and a reader for each of its splits."""

    label: str
    fingerprint: str
    readers: dict[Split, Reader] = field(default_factory=dict)
    note: str = ""
    """What the user should know before it is read."""
    size: int | None = None
    """Bytes of its files, or None where nobody says."""

    def pieces(self, split: Split) -> Iterator[Piece]:
        return self.readers[split]()


def open_source(section: EmbeddedData | TextData) -> Source:
    """The corpus that a data section names; nothing of it is read yet but what its fingerprint needs.

    Raises:
        DataError: if it is missing, empty, or out of reach.
    """
    try:
        if isinstance(section, EmbeddedData):
            return _standard_library()
        return _hub(section) if is_hub_name(section.path) else _files(section)
    except LMTrainError:
        raise
    except OSError as error:
        raise DataError(f"{error.filename or section}: {error.strerror or error}") from None


def split_of(name: str) -> Split | None:
    """The split that a file, folder or hub split of this name holds, if the name says so."""
    return next((split for split, pattern in _SPLIT_NAMES.items() if pattern.match(name.lower())), None)


def _files(section: TextData) -> Source:
    path, note = Path(section.path).expanduser(), ""
    by_split: dict[Split, list[Path]] = {"train": [path]}
    if path.is_dir():
        by_split, unused = files_of_folder(path)
        if unused:
            note = f"{path}: beside files named train*, {len(unused)} files such as {unused[0].name} are not used"
    named = _named_files(section)
    elsewhere = {file.resolve() for files in named.values() for file in files}
    by_split = {split: [f for f in files if f.resolve() not in elsewhere] for split, files in by_split.items()}
    if not by_split["train"]:
        raise DataError(f"{path}: data.val_path and data.test_path leave no file to train on")
    by_split = {split: files for split, files in by_split.items() if files} | named
    fingerprint = digest_of_parts(*_identities(by_split), section.text_column, str(section.streaming))
    readers = {split: _files_reader(files, section.text_column) for split, files in by_split.items()}
    if "val" not in readers:
        only = by_split["train"][0]
        if len(by_split["train"]) == 1 and file_kind(only) == "text":
            cut = character_boundary(only, int(only.stat().st_size * (1 - section.val_fraction)))
            readers["train"] = lambda: text_pieces(only, 0, cut)
            readers["val"] = lambda: text_pieces(only, cut)
            fingerprint = digest_of_parts(fingerprint, str(section.val_fraction))
        else:
            readers |= _split_documents(readers["train"], section)
            fingerprint = digest_of_parts(fingerprint, *_split_rule(section))
    size = sum(file.stat().st_size for file in {f for files in by_split.values() for f in files})
    return Source(section.path, fingerprint, readers, note, size)


def _named_files(section: TextData) -> dict[Split, list[Path]]:
    """What data.val_path and data.test_path name."""
    named: dict[Split, list[Path]] = {}
    if section.val_path is not None:
        named["val"] = files_below(Path(section.val_path).expanduser())
    if section.test_path is not None:
        named["test"] = files_below(Path(section.test_path).expanduser())
    return named


def is_hidden(name: str) -> bool:
    """A file or folder that a system leaves beside the data: .DS_Store, ._image.png, and __MACOSX in zips of macOS."""
    return name.startswith(".") or name == "__MACOSX"


def files_below(path: Path) -> list[Path]:
    """The file itself, or every file under the folder, sorted, through links, without hidden ones."""
    if not path.is_dir():
        return [path]
    files = files_inside(path)
    if not files:
        raise DataError(f"{path}: empty folder; expected text, jsonl, csv or parquet files")
    return files


def files_inside(path: Path) -> list[Path]:
    """Every file under a folder, sorted, through links, without hidden ones."""
    files: list[Path] = []
    seen: set[Path] = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = Path(folder).resolve()
        folders[:] = [] if real in seen else [name for name in folders if not is_hidden(name)]
        if real not in seen:
            files += [Path(folder, name) for name in names if not is_hidden(name)]
        seen.add(real)
    return sorted(file for file in files if file.is_file())


def files_of_folder(folder: Path) -> tuple[dict[Split, list[Path]], list[Path]]:
    """Files by split, and those that are left out.

    Files or subfolders named train*, val*, dev*, test*, t10k* are the splits; without any train*, all others train.
    """
    named: dict[Split, list[Path]] = {"train": [], "val": [], "test": []}
    others: list[Path] = []
    for file in files_below(folder):
        split = next((s for s in map(split_of, file.relative_to(folder).parts) if s is not None), None)
        (others if split is None else named[split]).append(file)
    if not named["train"]:
        named["train"], others = others, []
    if not named["train"]:
        raise DataError(f"{folder}: only validation or test files; training files are named train*, or anything else")
    return {split: files for split, files in named.items() if files}, others


def _files_reader(files: list[Path], column: str) -> Reader:
    def read() -> Iterator[Piece]:
        for file in files:
            yield from file_pieces(file, column)

    return read


def digest_of_parts(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _identities(by_split: dict[Split, list[Path]]) -> list[str]:
    """One text for each file: its split, how it is read, and its content."""
    for file in (f for files in by_split.values() for f in files):
        if file.stat().st_size == 0:
            raise DataError(f"{file}: empty file")
    return [f"{split}:{file_kind(f)}:{content_hash(f)}" for split, files in sorted(by_split.items()) for f in files]


def content_hash(file: Path) -> str:
    """Hash of a file's bytes; remembered by path, size and time, since a corpus may be large."""
    stat = file.stat()
    identity = digest_of_parts(str(file.resolve()), str(stat.st_size), str(stat.st_mtime_ns), str(stat.st_ino))
    memo = cache_folder() / "hashes" / identity
    with suppress(OSError, UnicodeDecodeError):
        known = memo.read_text(encoding="utf-8")
        if len(known) == 32 and known.isalnum():  # a machine that failed may have left an empty one
            return known
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 22):
            signals.check()
            digest.update(chunk)
    with suppress(OutputError):  # whoever writes the tokens reports it
        write_text(memo, digest.hexdigest())
    return digest.hexdigest()


def _split_documents(train: Reader, section: TextData) -> dict[Split, Reader]:
    """Train and validation documents of a source without a validation split; the two never overlap.

    By a hash of the document's number, so that the choice needs neither the count nor a second pass; the first document
    trains and the second validates, so that two suffice. With streaming, the first documents up to `val_tokens` (four
    characters a token assumed) validate, so that validation can start early.
    """

    def choose(validating: bool) -> Iterator[Piece]:
        number = taken = chosen = 0
        is_val = _validates(0, taken, section)
        for piece in train():
            if is_val == validating:
                chosen += 1
                yield piece
            if is_val:
                taken += len(piece.text)
            if piece.ends_document:
                number += 1
                is_val = _validates(number, taken, section)
                if section.streaming and validating and not is_val:
                    return
        if not chosen and section.streaming:
            raise DataError(
                f"{section.path}: its {number} documents are fewer than data.val_tokens={section.val_tokens} and all "
                "validate; lower data.val_tokens, give data.val_path, or set data.streaming=false"
            )
        if not chosen:
            raise DataError(
                f"{section.path}: {number} document is too few to train on some and validate on others; give data.val_path"
            )

    return {"train": lambda: choose(False), "val": lambda: choose(True)}


def _validates(number: int, characters_before: int, section: TextData) -> bool:
    if section.streaming:
        return characters_before < 4 * section.val_tokens
    if number < 2:
        return number == 1
    return int(mix64(np.array([number], dtype=np.uint64))[0]) < section.val_fraction * 2**64


def _split_rule(section: TextData) -> tuple[str, ...]:
    return ("streaming", str(section.val_tokens)) if section.streaming else ("hash", str(section.val_fraction))


def _hub(section: TextData) -> Source:
    found = find_dataset(section.path, section.subset)
    readers: dict[Split, Reader] = {}
    for name in found.splits:
        split = split_of(name)
        if split is not None:
            readers.setdefault(split, _hub_reader(section, name))
    if "train" not in readers:
        raise DataError(f"{section.path}: no train split; it has {', '.join(found.splits)}")
    named = _named_files(section)
    readers |= {split: _files_reader(files, section.text_column) for split, files in named.items()}
    fingerprint = digest_of_parts(
        section.path,
        str(section.subset),
        found.revision,
        *_identities(named),
        section.text_column,
        str(section.streaming),
    )
    if "val" not in readers:
        readers |= _split_documents(readers["train"], section)
        fingerprint = digest_of_parts(fingerprint, *_split_rule(section))
    return Source(section.path, fingerprint, readers)


def _hub_reader(section: TextData, split: str) -> Reader:
    def read() -> Iterator[Piece]:
        datasets = quiet_datasets()
        row = 0
        try:
            for batch in datasets.load_dataset(section.path, section.subset, split=split, streaming=True).iter(256):
                for text in column_of(batch, section.text_column, section.path):
                    row += 1
                    yield from row_pieces(text, f"{section.path} {split} row {row}", section.text_column)
        except DataError:
            raise
        except Exception as error:
            raise DataError(out_of_reach(f"{section.path} {split} after row {row}", error)) from None

    return read


def _standard_library() -> Source:
    """The .py files of the running Python's standard library, without its tests and bundled tools."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}
    files = [
        file
        for file in sorted(root.rglob("*.py"))
        if not skipped.intersection(file.relative_to(root).parts) and file.stat().st_size > 0
    ]
    texts = {}
    for file in files:
        try:
            texts[str(file.relative_to(root))] = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # a handful declare another encoding
            continue
    if not texts:
        raise DataError(f"{root}: no source files of the standard library; give data.path=FILES")

    def read(validating: bool) -> Iterator[Piece]:
        for name, text in texts.items():
            digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
            if (digest < 0.1 * 2**64) == validating:
                yield Piece(text, name, ends_document=True)

    fingerprint = digest_of_parts(*(part for name, text in texts.items() for part in (name, text)))
    label = "the Python standard library"
    readers: dict[Split, Reader] = {"train": lambda: read(False), "val": lambda: read(True)}
    return Source(label, fingerprint, readers, size=sum(map(len, texts.values())))
