"""Prepared text on disk, format 1: token ids in shards, where documents begin, checksums by block, one manifest of all.

A folder holds `manifest.json`, `tokenizer.json`, `documents.parquet` (one row for each document: split, shard, first_token,
tokens, source, row, blake2b of the text), and for each shard

* `SPLIT-NNNNN.bin`: little-endian ids, documents one after another, each closed by the end-of-text id if there is one;
* `SPLIT-NNNNN.idx`: int64 little-endian, the first token of each document in the shard, then the shard's token count;
* `SPLIT-NNNNN.sum`: for each 1 MiB block of the .bin (the last may be shorter) its 8-byte BLAKE2b, so that damage has a place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tokenizers import Tokenizer

from lm_train.data.cache import writing
from lm_train.errors import DataError

FORMAT: Final = 1
MANIFEST, DOCUMENTS = "manifest.json", "documents.parquet"
TOKENIZER: Final = "tokenizer.json"
UNFINISHED = ".unfinished"
"""Folder inside, for as long as the preparation has not ended."""
BLOCK_BYTES = 1 << 20
BLOCK_DIGEST_BYTES = 8
_MOST_MANIFEST_BYTES = 1 << 28
"""A manifest of a million shards has about 200 MB; a larger file is none."""

Ids = npt.NDArray[np.unsignedinteger]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""16-byte BLAKE2b in hexadecimal digits."""
Size = Annotated[int, Field(ge=0, lt=2**62)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Shard(_Part):
    """One shard of a split."""

    name: Annotated[str, Field(pattern=r"^(train|val|test)-[0-9]{5,9}\.bin$")]
    """A plain file name, never a path."""
    tokens: Size
    documents: Size
    bytes: Size
    """Of the .bin."""
    blake2b: Hash
    """Of the .bin, .idx and .sum."""
    idx_blake2b: Hash
    sum_blake2b: Hash

    @property
    def index_name(self) -> str:
        return self.name.removesuffix(".bin") + ".idx"

    @property
    def sums_name(self) -> str:
        return self.name.removesuffix(".bin") + ".sum"

    def sizes(self) -> dict[str, int]:
        """Bytes of its three files by name."""
        blocks = -(-self.bytes // BLOCK_BYTES)
        return {
            self.name: self.bytes,
            self.index_name: 8 * (self.documents + 1),
            self.sums_name: BLOCK_DIGEST_BYTES * blocks,
        }


class SplitShards(_Part):
    """A split: its totals and its shards in order."""

    tokens: Size
    documents: Size
    text_bytes: Size
    """UTF-8 bytes of the text the tokens stand for."""
    max_id: Annotated[int, Field(ge=-1, lt=2**32)]
    """Largest id; -1 without tokens."""
    shards: Annotated[tuple[Shard, ...], Field(strict=False)]


class TokenizerFacts(_Part):
    file: Literal["tokenizer.json"] = TOKENIZER
    blake2b: Hash
    """Of the file."""
    vocab_size: Annotated[int, Field(ge=1, le=2**32)]
    end_of_text: Annotated[int, Field(ge=0, lt=2**32)] | None
    """The id that closes a document; None where the vocabulary has none (characters)."""


class Manifest(_Part):
    """What a prepared folder holds."""

    format: Literal[1] = FORMAT
    dtype: Literal["uint16", "uint32"]
    tokenizer: TokenizerFacts
    settings: dict[str, Any]
    """What was asked for, and the fingerprint of the text it was made of."""
    splits: dict[Literal["train", "val", "test"], SplitShards]
    documents: Hash
    """BLAKE2b of documents.parquet."""
    counts: dict[str, Any]
    """What was read, and what each rule removed, with examples."""
    fingerprint: Hash
    """Of everything above."""

    @property
    def ids(self) -> np.dtype[np.unsignedinteger]:
        """The type of an id in the .bin files."""
        return ids_dtype(self.tokenizer.vocab_size)

    def shards(self) -> Iterable[Shard]:
        for split in self.splits.values():
            yield from split.shards


def ids_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Two little-endian bytes an id where they suffice, else four."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05}.bin"


def digest(content: bytes | memoryview) -> str:
    """As the manifest has it."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def block_digest(block: bytes | memoryview) -> bytes:
    """What the .sum file holds of one block."""
    return hashlib.blake2b(block, digest_size=BLOCK_DIGEST_BYTES).digest()


def make_manifest(**values: Any) -> Manifest:
    """A manifest of these values, with its fingerprint."""
    unsigned = Manifest(**values, fingerprint="0" * 32)
    return unsigned.model_copy(update={"fingerprint": _fingerprint(unsigned.model_dump(mode="json"))})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes it whole or not at all; it comes last, and makes the folder complete.

    Raises:
        OutputError: if it cannot be written.
    """
    content = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / MANIFEST, content.encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        DataError: if there is none, or it is not one, or it is not what was written.
    """
    file = folder / MANIFEST
    try:
        if file.stat().st_size > _MOST_MANIFEST_BYTES:
            raise DataError(f"{file}: {file.stat().st_size:,} bytes; a manifest has at most {_MOST_MANIFEST_BYTES:,}")
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_no_manifest(folder)) from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    return parse_manifest(content, str(file))


def parse_manifest(content: bytes, where: str) -> Manifest:
    """The manifest in a file's bytes; `where` is the file's name for messages.

    Raises:
        DataError: as read_manifest.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}; prepare the text again, or copy the file again") from None
    number = values.get("format") if isinstance(values, dict) else None
    if number != FORMAT:
        raise DataError(f"{where}: expected the manifest of prepared text, format {FORMAT}; got {number!r:.40}")
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(f"{where}: {key}: {first['msg']}; got {first['input']!r:.80}") from None
    found = _fingerprint(manifest.model_dump(mode="json"))
    if found != manifest.fingerprint:
        raise DataError(
            f"{where}: its content has the fingerprint {found}, it says {manifest.fingerprint}: damaged or edited; "
            "prepare the text again, or copy the file again"
        )
    _check_sums(manifest, where)
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Checks that every file of every shard is there in its size, and that the tokenizer is the one of the manifest.

    Raises:
        DataError: naming the first file that is not.
    """
    for shard in manifest.shards():
        for name, size in shard.sizes().items():
            check_size(folder / name, size)
    read_tokenizer(folder, manifest)


def check_size(file: Path, size: int) -> None:
    """Raises DataError unless the file is there and has so many bytes."""
    try:
        found = file.stat().st_size
    except OSError:
        raise DataError(f"{file}: missing, and the manifest names it; prepare the text again, or copy it") from None
    if found != size:
        raise DataError(f"{file}: {found:,} bytes, expected {size:,}; prepare the text again, or copy it again")


def read_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer whose ids the shards hold.

    Raises:
        DataError: if it is missing, or another one.
    """
    file = folder / manifest.tokenizer.file
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    if digest(content) != manifest.tokenizer.blake2b:
        raise DataError(
            f"{file}: its BLAKE2b is {digest(content)}, expected {manifest.tokenizer.blake2b}: another tokenizer, or damaged"
        )
    return Tokenizer.from_buffer(content)


def read_index(folder: Path, shard: Shard) -> npt.NDArray[np.int64]:
    """Where the shard's documents begin, and its token count at the end: (documents + 1,).

    Raises:
        DataError: if the file is missing or damaged.
    """
    return parse_index(_read(folder / shard.index_name), shard, str(folder / shard.index_name))


def parse_index(content: bytes, shard: Shard, where: str) -> npt.NDArray[np.int64]:
    """The index in a file's bytes; arguments and errors as of the manifest's."""
    _compare(content, shard.idx_blake2b, where)
    index = np.frombuffer(content, dtype="<i8").astype(np.int64, copy=False)
    if len(index) != shard.documents + 1 or index[-1] != shard.tokens or (np.diff(index) < 0).any():
        raise DataError(f"{where}: not the index of {shard.documents:,} documents with {shard.tokens:,} tokens")
    return index


def read_sums(folder: Path, shard: Shard) -> npt.NDArray[np.uint8]:
    """The block digests of a shard: (blocks, 8).

    Raises:
        DataError: if the file is missing or damaged.
    """
    return parse_sums(_read(folder / shard.sums_name), shard, str(folder / shard.sums_name))


def parse_sums(content: bytes, shard: Shard, where: str) -> npt.NDArray[np.uint8]:
    """The block digests in a file's bytes; arguments and errors as of the manifest's."""
    _compare(content, shard.sum_blake2b, where)
    return np.frombuffer(content, dtype=np.uint8).reshape(-1, BLOCK_DIGEST_BYTES)


def write_shard(
    folder: Path, name: str, documents: Iterable[Ids], dtype: np.dtype[np.unsignedinteger]
) -> tuple[Shard, int]:
    """Writes one shard's three files; each appears under its name only when it is whole and on the disk.

    Args:
        folder: where.
        name: as `shard_name` makes it.
        documents: the ids of each, (tokens,), with the closing end-of-text id.
        dtype: as `ids_dtype` says.

    Returns:
        The shard, and its largest id (-1 without tokens).

    Raises:
        OutputError: if it cannot be written.
    """
    file = folder / name
    partial = folder / f".{name}.partial"
    whole, sums, held = hashlib.blake2b(digest_size=16), bytearray(), bytearray()
    starts, tokens, max_id = [], 0, -1
    with writing(file), removed_on_failure(partial), partial.open("wb") as out:
        for ids in documents:
            starts.append(tokens)
            tokens += len(ids)
            if len(ids):
                max_id = max(max_id, int(ids.max()))
            held += ids.astype(dtype, copy=False).tobytes()
            while len(held) >= BLOCK_BYTES:
                _put(out.write, bytes(held[:BLOCK_BYTES]), whole, sums)
                del held[:BLOCK_BYTES]
        if held:
            _put(out.write, bytes(held), whole, sums)
        out.flush()
        os.fsync(out.fileno())
    index = np.array([*starts, tokens], dtype="<i8").tobytes()
    shard = Shard(
        name=name,
        tokens=tokens,
        documents=len(starts),
        bytes=tokens * dtype.itemsize,
        blake2b=whole.hexdigest(),
        idx_blake2b=digest(index),
        sum_blake2b=digest(bytes(sums)),
    )
    write_whole(folder / shard.index_name, index)
    write_whole(folder / shard.sums_name, bytes(sums))
    with writing(file):
        partial.replace(file)
    return shard, max_id


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file so that it is there with all of its content, on the disk, or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    partial = file.with_name(f".{file.name}.partial")
    with writing(file), removed_on_failure(partial):
        with partial.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)


@contextmanager
def removed_on_failure(partial: Path) -> Iterator[None]:
    """Gives a full disk its room back."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _put(write: Any, block: bytes, whole: Any, sums: bytearray) -> None:
    whole.update(block)
    sums += block_digest(block)
    write(block)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}; prepare the text again, or copy it") from None


def _compare(content: bytes, expected: str, where: str) -> None:
    if digest(content) != expected:
        raise DataError(f"{where}: its BLAKE2b is {digest(content)}, expected {expected}: damaged; copy it again")


def _check_sums(manifest: Manifest, where: str) -> None:
    """What the pieces say must fit together: a manifest can be whole and wrong all the same."""
    width = manifest.ids.itemsize
    if manifest.dtype != f"uint{8 * width}":
        raise DataError(f"{where}: dtype {manifest.dtype} for a vocabulary of {manifest.tokenizer.vocab_size:,} ids")
    for split, shards in manifest.splits.items():
        totals = (sum(shard.tokens for shard in shards.shards), sum(shard.documents for shard in shards.shards))
        names = [shard.name for shard in shards.shards]
        if totals != (shards.tokens, shards.documents):
            raise DataError(f"{where}: {split}: its shards do not add up to {shards.tokens:,} tokens")
        if names != [shard_name(split, i) for i in range(len(names))]:
            raise DataError(f"{where}: {split}: its shards are not numbered from 0 on")
        if any(shard.bytes != shard.tokens * width for shard in shards.shards):
            raise DataError(f"{where}: {split}: a shard's bytes are not its tokens times {width}")


def _fingerprint(values: Mapping[str, Any]) -> str:
    signed = {key: value for key, value in values.items() if key != "fingerprint"}
    return digest(json.dumps(signed, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode())


def _no_manifest(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such folder; make it with lm-train prepare recipe=... out={folder}"
    if (folder / UNFINISHED).is_dir():
        return f"{folder}: not prepared to its end; the same lm-train prepare command goes on"
    return f"{folder}: no {MANIFEST}; expected a folder that lm-train prepare has made"
