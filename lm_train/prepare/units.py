"""The units of work: consecutive documents of a split, cut alike however many processes work, each published whole.

A unit's file is numpy's .npz of plain arrays, one entry a document unless said otherwise, in the documents' order.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lm_train.data.readers import Piece, Split
from lm_train.data.shards import write_whole
from lm_train.errors import DataError

DOCUMENT_CHARACTERS = 1 << 23
"""A longer document is taken as several."""
UNIT_CHARACTERS = 1 << 22
"""A unit ends with the document that brings it to so many characters."""
UNIT_DOCUMENTS = 1 << 15
_PLACE = re.compile(r"(.*) (?:line|row|at byte) (\d+)", re.DOTALL)


class Document(NamedTuple):
    text: str
    source: str
    """File, or split of a hub's data set."""
    row: int
    """Row of a table from 1, line of a jsonl file from 1, byte of a plain text file from 0."""

    @property
    def where(self) -> str:
        return f"{self.source} at {self.row}"


class Unit(NamedTuple):
    split: Split
    number: int
    """From 0 in its split."""
    documents: list[Document]

    @property
    def name(self) -> str:
        return unit_name(self.split, self.number)


@dataclass
class Done:
    """What is left of a unit when it has been worked on."""

    ids: npt.NDArray[np.unsignedinteger]
    """Of all documents that stayed, one after another, each with the end-of-text id."""
    tokens: npt.NDArray[np.int64]
    """Ids of each document; -1 where cleaning dropped it."""
    text_bytes: npt.NDArray[np.int64]
    characters: npt.NDArray[np.int64]
    """Of the cleaned text, as text_bytes."""
    keys: npt.NDArray[np.uint8]
    """(n, 16): equal where documents are duplicates."""
    digests: npt.NDArray[np.uint8]
    """(n, 16): BLAKE2b of the cleaned text."""
    rows: npt.NDArray[np.int64]
    bands: npt.NDArray[np.uint64]
    """(n, BANDS) where near duplicates are sought, else (n, 0); signatures alike."""
    signatures: npt.NDArray[np.uint32]
    facts: dict[str, Any] = field(default_factory=dict)
    """`sources`: distinct names in order, `source`: the index of each document's, `read`, `removed`."""

    def to_bytes(self) -> bytes:
        content = io.BytesIO()
        arrays = {name: value for name, value in vars(self).items() if name != "facts"}
        facts = np.frombuffer(json.dumps(self.facts).encode(), dtype=np.uint8)
        np.savez(content, allow_pickle=False, facts=facts, **arrays)
        return content.getvalue()

    def source_of(self, document: int) -> str:
        return self.facts["sources"][self.facts["source"][document]]


def unit_name(split: Split, number: int) -> str:
    return f"{split}-{number:06}.npz"


class DoneFile:
    """A unit's file, of which single arrays can be read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self, *names: str) -> list[Any]:
        """The arrays of these names; `facts` as the dictionary that it is.

        Raises:
            DataError: if the file is missing or damaged.
        """
        try:
            with np.load(self.file, allow_pickle=False) as stored:
                return [json.loads(stored[name].tobytes()) if name == "facts" else stored[name] for name in names]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{self.file}: damaged ({error}); delete it and give the same command again") from None


def save(file: Path, done: Done) -> None:
    """Publishes a unit's result."""
    write_whole(file, done.to_bytes())


def documents_of(pieces: Iterable[Piece]) -> Iterator[Document]:
    """The documents that the pieces make; long ones in parts."""
    texts: list[str] = []
    size, where = 0, ""
    for piece in pieces:
        where = where or piece.where
        texts.append(piece.text)
        size += len(piece.text)
        if piece.ends_document or size >= DOCUMENT_CHARACTERS:
            yield _document("".join(texts), where)
            texts, size, where = [], 0, ""
    if texts:
        yield _document("".join(texts), where)


def units_of(split: Split, documents: Iterable[Document]) -> Iterator[Unit]:
    """The documents in units; how they are cut does not show in what is made of them."""
    held: list[Document] = []
    size = number = 0
    for document in documents:
        held.append(document)
        size += len(document.text)
        if size >= UNIT_CHARACTERS or len(held) >= UNIT_DOCUMENTS:
            yield Unit(split, number, held)
            held, size, number = [], 0, number + 1
    if held:
        yield Unit(split, number, held)


def _document(text: str, where: str) -> Document:
    found = _PLACE.fullmatch(where)
    return Document(text, found[1], int(found[2])) if found else Document(text, where, 0)
