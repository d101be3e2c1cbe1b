"""Where text comes from: files, folders, tables, the hub, the standard library; as pieces of documents by split."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lm_train.data.order import mix64
from lm_train.data.tokenizer import hub_out_of_reach
from lm_train.errors import DataError
from lm_train.recipe import AnyData, EmbeddedData, TextData
from lm_train.recipe.checks import is_hub_name

Split = Literal["train", "val", "test"]
SPLIT_PREFIXES: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("val", "dev"), "test": ("test", "t10k")}
_TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_PIECE_BYTES = 1 << 16


class Piece(NamedTuple):
    """Some text of a document; long documents come in several pieces."""

    text: str
    where: str
    """File and row or byte, for messages."""
    ends_document: bool


Reader = Callable[[], Iterator[Piece]]


@dataclass(frozen=True)
class Source:
    """A corpus: a fingerprint of its content, and a reader for each of its splits."""

    label: str
    fingerprint: str
    readers: dict[Split, Reader] = field(default_factory=dict)

    def pieces(self, split: Split) -> Iterator[Piece]:
        return self.readers[split]()


def open_source(section: AnyData) -> Source:
    """The corpus that a data section names; nothing of it is read yet but what its fingerprint needs.

    Raises:
        DataError: if it is missing, empty, or out of reach.
    """
    if isinstance(section, EmbeddedData):
        return _standard_library()
    if is_hub_name(section.path):
        return _hub(section)
    path = Path(section.path).expanduser()
    by_split = _files_of_folder(path) if path.is_dir() else {"train": [path]}
    for split, extra in (("val", section.val_path), ("test", section.test_path)):
        if extra is not None:
            by_split[split] = [Path(extra).expanduser()]  # type: ignore[index]
    for file in (f for files in by_split.values() for f in files):
        if file.stat().st_size == 0:
            raise DataError(f"{file}: empty file")
    fingerprint = _digest(
        *(f"{split}:{_content_hash(f)}" for split, files in sorted(by_split.items()) for f in files),
        section.text_column,
    )
    readers: dict[Split, Reader] = {
        split: _files_reader(files, section.text_column)
        for split, files in by_split.items()  # type: ignore[misc]
    }
    only = by_split["train"][0]
    if "val" not in readers:
        if len(by_split["train"]) == 1 and only.suffix not in _TABLES:
            cut = _character_boundary(only, int(only.stat().st_size * (1 - section.val_fraction)))
            readers["train"] = lambda: _text_pieces(only, 0, cut)
            readers["val"] = lambda: _text_pieces(only, cut, None)
        else:
            readers |= _split_documents(readers["train"], section)
        fingerprint = _digest(fingerprint, str(section.val_fraction), str(section.streaming), str(section.val_tokens))
    return Source(section.path, fingerprint, readers)


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _content_hash(file: Path) -> str:
    """Hash of a file's bytes; remembered by path, size and time, since a corpus may be large."""
    stat = file.stat()
    identity = _digest(str(file.resolve()), str(stat.st_size), str(stat.st_mtime_ns), str(stat.st_ino))
    memo = cache_folder() / "hashes" / identity
    try:
        return memo.read_text()
    except OSError:
        pass
    with file.open("rb") as opened:
        content = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    memo.parent.mkdir(parents=True, exist_ok=True)
    memo.write_text(content)
    return content


def cache_folder() -> Path:
    """What belongs to the user and not to a run: $XDG_CACHE_HOME/lm_train, by default ~/.cache/lm_train."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lm_train"


def _files_of_folder(folder: Path) -> dict[Split, list[Path]]:
    """Every file under the folder, sorted; files or subfolders named train*, val*, dev*, test*, t10k* are the splits."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise DataError(f"{folder}: empty folder; expected text, jsonl, csv or parquet files")
    named: dict[Split, list[Path]] = {"train": [], "val": [], "test": []}
    rest = []
    for file in files:
        first = file.relative_to(folder).parts[0].lower()
        split = next((s for s, prefixes in SPLIT_PREFIXES.items() if first.startswith(prefixes)), None)
        (named[split] if split else rest).append(file)
    if not named["train"]:
        named["train"] = rest
    if not named["train"]:
        raise DataError(f"{folder}: only validation or test files; training files are named train*, or anything else")
    return {split: files for split, files in named.items() if files}


def _files_reader(files: list[Path], column: str) -> Reader:
    def read() -> Iterator[Piece]:
        for file in files:
            if file.suffix in _TABLES:
                yield from _table_pieces(file, column)
            else:
                yield from _text_pieces(file, 0, None)

    return read


def _character_boundary(file: Path, offset: int) -> int:
    """The first byte from `offset` on that starts a UTF-8 character."""
    with file.open("rb") as opened:
        opened.seek(offset)
        window = opened.read(4)
    return offset + next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), 0)


def _text_pieces(file: Path, start: int, end: int | None) -> Iterator[Piece]:
    """Bytes start..end of a plain text file as one document, in pieces that end with a line."""
    with file.open("rb") as opened:
        opened.seek(start)
        offset, stop = start, file.stat().st_size if end is None else end
        while offset < stop:
            piece = opened.read(min(_PIECE_BYTES, stop - offset))
            if offset + len(piece) < stop:
                piece += opened.readline()[: stop - offset - len(piece)]
            try:
                text = piece.decode("utf-8")
            except UnicodeDecodeError as error:
                at = offset + error.start
                raise DataError(
                    f"{file}: not UTF-8 text at byte {at} (0x{piece[error.start]:02x}); convert it, for instance with "
                    f"iconv -f LATIN1 -t UTF-8"
                ) from None
            offset += len(piece)
            yield Piece(text, f"{file} at byte {offset - len(piece)}", ends_document=offset >= stop)


def _table_pieces(file: Path, column: str) -> Iterator[Piece]:
    import datasets

    datasets.disable_progress_bars()
    kind = _TABLES[file.suffix]
    row = 0
    try:
        table = datasets.load_dataset(kind, data_files=[str(file)], split="train", streaming=True)
        for batch in table.iter(batch_size=256):
            for text in _column(batch, column, str(file)):
                row += 1
                yield _row_piece(text, f"{file} row {row}", column)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{file}: {_bad_line(file) or f'not readable as {kind} after row {row}: {error}'}") from None
    if row == 0:
        raise DataError(f"{file}: no rows")


def _column(batch: dict[str, list[Any]], column: str, where: str) -> list[Any]:
    if column not in batch:
        raise DataError(f"{where}: no column {column!r}; it has {', '.join(batch)}; name one with data.text_column=")
    return batch[column]


def _row_piece(text: Any, where: str, column: str) -> Piece:
    if not isinstance(text, str):
        raise DataError(f"{where}: {column} is {text!r}, expected text")
    return Piece(text, where, ends_document=True)


def _bad_line(file: Path) -> str | None:
    """The first line of a jsonl file that is not JSON; the reader itself names no line."""
    if file.suffix != ".jsonl":
        return None
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            try:
                json.loads(line)
            except ValueError as error:
                return f"line {number} is not JSON: {error}"
    return None


def _split_documents(train: Reader, section: TextData) -> dict[Split, Reader]:
    """Train and validation documents of a source without a validation split; the two never overlap.

    By a hash of the document's number, so that the choice needs neither the count nor a second pass. With streaming, the
    first documents up to `val_tokens` (four bytes a token assumed) validate, so that validation can start early.
    """

    def choose(validating: bool) -> Iterator[Piece]:
        number = taken = 0
        is_val = _validates(0, taken, section)
        for piece in train():
            if is_val == validating:
                yield piece
            if is_val:
                taken += len(piece.text)
            if piece.ends_document:
                number += 1
                is_val = _validates(number, taken, section)
                if section.streaming and validating and not is_val:
                    return

    return {"train": lambda: choose(False), "val": lambda: choose(True)}


def _validates(number: int, characters_before: int, section: TextData) -> bool:
    if section.streaming:
        return characters_before < 4 * section.val_tokens
    return int(mix64(np.array([number], dtype=np.uint64))[0]) < section.val_fraction * 2**64


def _hub(section: TextData) -> Source:
    import datasets

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(section.path, section.subset)
        names = list(builder.info.splits or datasets.get_dataset_split_names(section.path, section.subset))
    except Exception as error:
        raise DataError(hub_out_of_reach(section.path, error)) from None
    readers: dict[Split, Reader] = {}
    for split, prefixes in SPLIT_PREFIXES.items():
        name = next((n for n in names if n.startswith(prefixes)), None)
        if name is not None:
            readers[split] = _hub_reader(section, name)
    if "train" not in readers:
        raise DataError(f"{section.path}: no train split; it has {', '.join(names)}")
    if "val" not in readers:
        readers |= _split_documents(readers["train"], section)
    identity = (section.path, str(section.subset), builder.hash or "", section.text_column)
    rule = (str(section.val_fraction), str(section.streaming), str(section.val_tokens))
    return Source(section.path, _digest(*identity, *rule), readers)


def _hub_reader(section: TextData, split: str) -> Reader:
    def read() -> Iterator[Piece]:
        import datasets

        row = 0
        try:
            for batch in datasets.load_dataset(section.path, section.subset, split=split, streaming=True).iter(256):
                for text in _column(batch, section.text_column, section.path):
                    row += 1
                    yield _row_piece(text, f"{section.path} {split} row {row}", section.text_column)
        except DataError:
            raise
        except Exception as error:
            raise DataError(hub_out_of_reach(f"{section.path} {split} after row {row}", error)) from None

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

    fingerprint = _digest(*(part for name, text in texts.items() for part in (name, text)))
    label = "the Python standard library"
    return Source(label, fingerprint, {"train": lambda: read(False), "val": lambda: read(True)})
