"""Reads the text out of files: plain text by lines, tables by rows; in pieces, so that no file's size matters."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lm_train.data.hub import quiet_datasets
from lm_train.errors import DataError

Split = Literal["train", "val", "test"]
_TABLES = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz", ".7z")
_PIECE_BYTES = 1 << 16
_LINE_BYTES = 1 << 20
"""A line longer than this is cut."""
_ROW_BYTES = 1 << 26
"""A longer line of a jsonl file is refused: it would take ten times that in memory."""


class Piece(NamedTuple):
    """Some text of a document; long documents come in several pieces."""

    text: str
    where: str
    """File and row, line or byte, for messages."""
    ends_document: bool


Reader = Callable[[], Iterator[Piece]]


def file_kind(file: Path) -> str:
    """text, jsonl, json, csv or parquet, by the name's ending; a gzipped jsonl, json or csv is read as it is.

    Raises:
        DataError: for other compressed files.
    """
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes[-1:] == [".gz"] and suffixes[0] in (".jsonl", ".json", ".csv"):
        return _TABLES[suffixes[0]]
    if suffixes and suffixes[-1] in _COMPRESSED:
        raise DataError(
            f"{file}: compressed; unpack it first (of compressed files only .jsonl.gz, .json.gz and .csv.gz are read)"
        )
    return _TABLES.get(suffixes[-1], "text") if suffixes else "text"


def file_pieces(file: Path, column: str) -> Iterator[Piece]:
    """A plain text file as one document, or a table's rows as one each."""
    match file_kind(file):
        case "text":
            return text_pieces(file)
        case "jsonl":
            return _jsonl_pieces(file, column)
        case kind:
            return _table_pieces(file, kind, column)


def text_pieces(file: Path, start: int = 0, end: int | None = None) -> Iterator[Piece]:
    """Bytes start..end of a plain text file as one document, in pieces that end with a line where lines are not huge."""
    with _reading(file), file.open("rb") as opened:
        opened.seek(start)
        offset, stop = start, file.stat().st_size if end is None else end
        while offset < stop:
            piece = opened.read(min(_PIECE_BYTES, stop - offset))
            if not piece:
                raise DataError(f"{file}: ends at byte {offset}, had {stop} before; it changed while it was read")
            if offset + len(piece) < stop:
                piece += opened.readline(min(_LINE_BYTES, stop - offset - len(piece)))
            if offset + len(piece) < stop and not piece.endswith(b"\n"):
                piece = _whole_characters(piece)
                opened.seek(offset + len(piece))
            try:
                text = piece.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(_not_utf8(file, offset + error.start, piece[error.start])) from None
            offset += len(piece)
            yield Piece(text, f"{file} at byte {offset - len(piece)}", ends_document=offset >= stop)


def character_boundary(file: Path, offset: int) -> int:
    """The first byte from `offset` on that starts a UTF-8 character."""
    with file.open("rb") as opened:
        opened.seek(offset)
        window = opened.read(4)
    return offset + next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), 0)


def row_pieces(text: Any, where: str, column: str) -> Iterator[Piece]:
    """The text of one row, checked, in pieces."""
    if not isinstance(text, str):
        raise DataError(f"{where}: {column} is {text!r:.80}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"{where}: {column} has half a character ({code}) at position {error.start}") from None
    for start in range(0, max(1, len(text)), _LINE_BYTES):
        yield Piece(text[start : start + _LINE_BYTES], where, ends_document=start + _LINE_BYTES >= len(text))


def column_of(row: dict[str, Any], column: str, where: str) -> Any:
    """The named column of a row or of a batch of rows."""
    if column not in row:
        columns = ", ".join(row) or "none"
        raise DataError(f"{where}: no column {column!r}; it has {columns}; name one with data.text_column=")
    return row[column]


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{file}: no longer there") from None
        raise DataError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _jsonl_pieces(file: Path, column: str) -> Iterator[Piece]:
    """Line by line, not through `datasets`: its rows must have one schema, and its errors do not name the line."""
    empty = True
    with _reading(file), gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as opened:
        for number, line in enumerate(iter(lambda: opened.readline(_ROW_BYTES + 1), b""), 1):
            where = f"{file} line {number}"
            if len(line) > _ROW_BYTES:
                raise DataError(f"{where}: longer than {_ROW_BYTES >> 20} MiB; expected one JSON object a line")
            if line.isspace():
                continue
            empty = False
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected an object with the column {column!r}, got {row!r:.80}")
            yield from row_pieces(column_of(row, column, where), where, column)
    if empty:
        raise DataError(f"{file}: no rows")


def _table_pieces(file: Path, kind: str, column: str) -> Iterator[Piece]:
    datasets = quiet_datasets()
    # pandas would take a text that reads NA or 12 for a missing value or a number
    options = {"keep_default_na": False, "converters": {column: str}} if kind == "csv" else {}
    row = 0
    try:
        # data_files are patterns; an escaped name means only itself
        table = datasets.load_dataset(kind, data_files=[_escaped(str(file))], split="train", streaming=True, **options)
        for batch in table.iter(batch_size=256):
            for text in column_of(batch, column, str(file)):
                row += 1
                yield from row_pieces(text, f"{file} row {row}", column)
    except DataError:
        raise
    except Exception as error:
        reason = _undecodable(file) or f"{file}: not readable as {kind} after row {row}: {' '.join(str(error).split())}"
        raise DataError(reason) from None
    if row == 0:
        raise DataError(f"{file}: no rows")


def _escaped(path: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)


def _whole_characters(piece: bytes) -> bytes:
    """Without the UTF-8 character at the end, which may go on after the piece."""
    for i in range(1, min(4, len(piece)) + 1):
        if piece[-i] & 0xC0 != 0x80:
            return piece[:-i] if piece[-i] >= 0xC0 else piece
    return piece


def _not_utf8(file: Path, at: int, byte: int) -> str:
    what = f"{file}: not UTF-8 text at byte {at} (0x{byte:02x})"
    return f"{what}; convert it, for instance with iconv -f {likely_encoding(file)} -t UTF-8"


def likely_encoding(file: Path) -> str:
    """What text that is not UTF-8 may be, as iconv names it: UTF-16 where its mark stands in front."""
    with _reading(file), gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as opened:
        return "UTF-16" if opened.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "LATIN1"


def _undecodable(file: Path) -> str | None:
    """Where a text table stops being UTF-8; its reader names no place."""
    if file_kind(file) not in ("csv", "json") or file.suffix.lower() == ".gz":
        return None
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with _reading(file), file.open("rb") as opened:
        while chunk := opened.read(_LINE_BYTES):
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                return _not_utf8(file, offset - held + error.start, error.object[error.start])
            offset += len(chunk)
    return None
