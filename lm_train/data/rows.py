"""Rows with named columns, each with its place: csv, tsv, jsonl, json, parquet, a folder of texts for each class, the hub."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lm_train import signals
from lm_train.data.batches import Split
from lm_train.data.hub import find_dataset, out_of_reach, quiet_datasets
from lm_train.data.readers import likely_encoding
from lm_train.data.source import content_hash, digest_of_parts, files_below, files_of_folder, is_hidden, split_of
from lm_train.errors import DataError
from lm_train.recipe.checks import is_hub_name
from lm_train.recipe.explain import nearest

Row = dict[str, Any]
PlacedRow = tuple[Row, str]
"""A row and its place for messages: `train.csv line 7`, `train.parquet row 7`."""
Rows = Callable[[], Iterator[PlacedRow]]

_KINDS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".json": "json", ".parquet": "parquet"}
_FOLDER_COLUMNS = ("text", "label")


@dataclass(frozen=True)
class RowSource:
    """A set of rows: a fingerprint of its content, and what reads each of its splits anew."""

    label: str
    fingerprint: str
    splits: dict[Split, Rows] = field(default_factory=dict)
    columns: tuple[str, str] | None = None
    """The text and the label column where the source itself names them (a folder for each class); None: the user does."""
    note: str = ""
    """What the user should know before it is read."""


def open_rows(path: str, val_path: str | None = None, test_path: str | None = None) -> RowSource:
    """The rows that a data section names; nothing is read yet but what the fingerprint needs.

    In a folder, files or subfolders named train*, val*, dev*, test* are the splits; without any train*, all others train. A
    folder without tables but with .txt files in subfolders has a class in each subfolder, and columns `text` and `label`.

    Args:
        path: file, folder, or hub name.
        val_path: file or folder in place of the source's own validation split.
        test_path: the same for the test split.

    Raises:
        DataError: if something is missing, empty, or out of reach.
    """
    try:
        source = _hub(path) if is_hub_name(path) else _local(Path(path).expanduser())
        named: dict[Split, str | None] = {"val": val_path, "test": test_path}
        others = {split: _local(Path(p).expanduser(), split) for split, p in named.items() if p is not None}
    except OSError as error:
        raise DataError(f"{error.filename or path}: {error.strerror or error}") from None
    fingerprint = digest_of_parts(source.fingerprint, *(f"{s}:{o.fingerprint}" for s, o in sorted(others.items())))
    splits = source.splits | {split: other.splits[split] for split, other in others.items()}
    return RowSource(path, fingerprint, splits, source.columns, source.note)


def read_rows(file: Path) -> Iterator[PlacedRow]:
    """The rows of one file, by the ending of its name; gzipped (`.gz`) or not.

    The cells of csv and tsv are text; a tsv has no quotes, as IANA's definition of the format says. Numbers of a parquet
    column that the hub calls classes come as the names of the classes.

    Raises:
        DataError: naming file and line or row.
    """
    kind = table_kind(file)
    if kind is None:
        raise DataError(f"{file}: not a table; expected {', '.join(_KINDS)}, or these with .gz")
    read = {"csv": _csv, "tsv": _tsv, "jsonl": _jsonl, "json": _json, "parquet": _parquet}[kind]
    empty = True
    try:
        for placed in read(file):
            empty = False
            yield placed
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if empty:
        raise DataError(f"{file}: no rows")


def table_kind(file: Path) -> str | None:
    """csv, tsv, jsonl, json or parquet; None for what has no columns."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes[-1:] == [".gz"]:
        kind = _KINDS.get(suffixes[0]) if len(suffixes) == 2 else None
        return None if kind == "parquet" else kind
    return _KINDS.get(suffixes[-1]) if suffixes else None


def cell(row: Row, column: str, where: str, key: str) -> Any:
    """The value of a row in a column.

    Args:
        row: as `read_rows` gives it.
        column: its name.
        where: the row's place.
        key: of the recipe, which names another column.

    Raises:
        DataError: if there is no such column, with the nearest name.
    """
    if column in row:
        return row[column]
    near = nearest(column, row)
    hint = f"; did you mean {key}={near}?" if near else f"; name one with {key}="
    raise DataError(f"{where}: no column {column!r}; it has {', '.join(row) or 'none'}{hint}")


def _local(path: Path, only: Split | None = None) -> RowSource:
    """Rows of a file or folder; with `only` all of them belong to that split."""
    if not path.is_dir():
        files: dict[Split, list[Path]] = {only or "train": [path]}
        return _tables(path, files, "")
    inside = files_below(path)
    tables = [file for file in inside if table_kind(file) is not None]
    if not tables:
        return _class_folders(path, [file for file in inside if file.suffix.lower() == ".txt"], only)
    if only is not None:
        return _tables(path, {only: tables}, "")
    by_split, unused = files_of_folder(path)
    by_split = {split: [f for f in fs if table_kind(f) is not None] for split, fs in by_split.items()}
    if not by_split["train"]:
        raise DataError(f"{path}: no table to train on; expected train*.csv, .tsv, .jsonl or .parquet")
    unused = [file for file in unused if table_kind(file) is not None]
    note = (
        f"{path}: beside files named train*, {len(unused)} tables such as {unused[0].name} are not used"
        if unused
        else ""
    )
    return _tables(path, {split: files for split, files in by_split.items() if files}, note)


def _tables(path: Path, by_split: dict[Split, list[Path]], note: str) -> RowSource:
    for file in (f for files in by_split.values() for f in files):
        if file.stat().st_size == 0:
            raise DataError(f"{file}: empty file")
    identities = [f"{split}:{f.name}:{content_hash(f)}" for split, files in sorted(by_split.items()) for f in files]
    splits: dict[Split, Rows] = {split: _reader(files) for split, files in by_split.items()}
    return RowSource(str(path), digest_of_parts(*identities), splits, note=note)


def _reader(files: Iterable[Path]) -> Rows:
    def read() -> Iterator[PlacedRow]:
        for file in files:
            for placed in read_rows(file):
                signals.check()
                yield placed

    return read


def _class_folders(path: Path, files: list[Path], only: Split | None) -> RowSource:
    """Text files whose folder is their class: CLASS/*.txt, or train/CLASS/*.txt and test/CLASS/*.txt."""
    by_split: dict[Split, list[Path]] = {}
    parts: list[str] = []
    for file in files:
        inner = file.relative_to(path).parts
        split = split_of(inner[0]) if len(inner) > 2 else None
        if len(inner) < 2 or (len(inner) == 2 and split_of(inner[0]) is not None):
            continue  # a text beside the classes
        by_split.setdefault(only or split or "train", []).append(file)
        signals.check()
        parts += (str(file.relative_to(path)), hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest())
    if not by_split:
        raise DataError(f"{path}: neither tables ({', '.join(_KINDS)}) nor a folder of .txt files for each class")
    if "train" not in by_split and only is None:
        raise DataError(f"{path}: only validation or test texts; training texts are in train/CLASS/, or in CLASS/")
    filled = {folder for chosen in by_split.values() for file in chosen for folder in file.parents}
    for folder in sorted({file.parent.parent for chosen in by_split.values() for file in chosen}):
        for place in sorted(folder.iterdir()):
            is_class = split_of(place.name) is None and not is_hidden(place.name)
            if is_class and place.is_dir() and place not in filled:
                raise DataError(f"{place}: a class without a text; fill the folder or remove it")
    splits: dict[Split, Rows] = {split: _texts(chosen) for split, chosen in by_split.items()}
    return RowSource(str(path), digest_of_parts(*parts), splits, _FOLDER_COLUMNS)


def _texts(files: list[Path]) -> Rows:
    text, label = _FOLDER_COLUMNS

    def read() -> Iterator[PlacedRow]:
        for file in files:
            signals.check()
            with _utf8(file):
                yield {text: file.read_bytes().decode("utf-8"), label: file.parent.name}, str(file)

    return read


def _hub(path: str) -> RowSource:
    found = find_dataset(path, None)
    splits: dict[Split, Rows] = {}
    for name in found.splits:
        split = split_of(name)
        if split is not None:
            splits.setdefault(split, _hub_rows(path, name))
    if "train" not in splits:
        raise DataError(f"{path}: no train split; it has {', '.join(found.splits)}")
    return RowSource(path, digest_of_parts(path, found.revision), splits)


def _hub_rows(path: str, split: str) -> Rows:
    def read() -> Iterator[PlacedRow]:
        number = 0
        try:
            table = quiet_datasets().load_dataset(path, split=split, streaming=True)
            names = {
                column: feature.names for column, feature in (table.features or {}).items() if hasattr(feature, "names")
            }
            for number, row in enumerate(table, 1):
                signals.check()
                yield _named(row, names), f"{path} {split} row {number}"
        except DataError:
            raise
        except Exception as error:
            raise DataError(out_of_reach(f"{path} {split} after row {number}", error)) from None

    return read


@contextmanager
def _utf8(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not UTF-8 text ({error.reason} 0x{error.object[error.start]:02x}); convert it, for instance with "
            f"iconv -f {likely_encoding(file)} -t UTF-8"
        ) from None


def _opened(file: Path) -> BinaryIO:
    return gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb")  # type: ignore[return-value]


def _csv(file: Path) -> Iterator[PlacedRow]:
    return _separated(file, delimiter=",", quoting=csv.QUOTE_MINIMAL, strict=True)


def _tsv(file: Path) -> Iterator[PlacedRow]:
    return _separated(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _separated(file: Path, **form: Any) -> Iterator[PlacedRow]:
    """A header line, then rows of as many cells; empty lines are skipped."""
    csv.field_size_limit(1 << 30)
    line = 0
    with _opened(file) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, **form)
        try:
            header = next((cells for cells in reader if not _is_blank(cells)), [])
            if len(header) == 1 and form["delimiter"] == "," and (";" in header[0] or "\t" in header[0]):
                raise DataError(
                    f"{file} line {reader.line_num}: only one column, {header[0]!r:.80}; the separator of a .csv must be a comma"
                )
            if len(set(header)) < len(header):
                raise DataError(f"{file} line {reader.line_num}: two columns have the same name: {', '.join(header)}")
            line = reader.line_num
            for cells in reader:
                where, line = f"{file} line {line + 1}", reader.line_num
                if _is_blank(cells):
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{where}: {len(cells)} cells, the header has {len(header)} ({', '.join(header)}); quote cells that "
                        "hold the separator"
                    )
                yield dict(zip(header, cells, strict=True)), where
        except csv.Error as error:
            raise DataError(f"{file} line {line + 1}: not readable: {error}") from None
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file} after line {line}: not UTF-8 text (0x{error.object[error.start]:02x}); convert it, for instance with "
                f"iconv -f {likely_encoding(file)} -t UTF-8"
            ) from None


def _is_blank(cells: list[str]) -> bool:
    """Whether they are of a line without anything, or of blanks alone."""
    return not cells or (len(cells) == 1 and cells[0].isspace())


def _jsonl(file: Path) -> Iterator[PlacedRow]:
    with _opened(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            yield _object(line, f"{file} line {number}"), f"{file} line {number}"


def _object(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with columns, got {row!r:.80}")
    return row


def _json(file: Path) -> Iterator[PlacedRow]:
    """One list of objects; a file of one object a line is read as jsonl."""
    with _opened(file) as opened:
        first = opened.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
        while not first and (more := opened.read(1 << 16)):
            first = more.lstrip()
    if not first.startswith(b"["):
        yield from _jsonl(file)
        return
    with _opened(file) as opened:
        try:
            rows = json.loads(opened.read())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: not JSON: {error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{file} row {number}: expected an object with columns, got {row!r:.80}")
        yield row, f"{file} row {number}"


def _parquet(file: Path) -> Iterator[PlacedRow]:
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = _class_names((table.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield _named(row, names), f"{file} row {number}"
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: not readable as parquet after row {number}: {' '.join(str(error).split())}") from None


def _class_names(metadata: bytes) -> dict[str, list[str]]:
    """The names of classes by column, from what `datasets` writes into a parquet file."""
    try:
        features = json.loads(metadata).get("info", {}).get("features", {})
        return {column: f["names"] for column, f in features.items() if isinstance(f, dict) and "names" in f}
    except (ValueError, AttributeError):
        return {}


def _named(row: Row, names: dict[str, list[str]]) -> Row:
    for column, classes in names.items():
        number = row.get(column)
        if isinstance(number, int) and 0 <= number < len(classes):
            row = row | {column: classes[number]}
        elif number == -1:  # how the hub's unlabelled test splits say so
            row = row | {column: None}
    return row
