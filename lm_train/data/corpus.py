"""Tokens on disk: a corpus is tokenised once, under a name made of its content, and read by every rank and run.

A split is `SPLIT.bin` (little-endian ids, documents joined by the end-of-text id), complete when `SPLIT.json` stands beside
it. One process writes it under a lock; with streaming, others read it while it grows.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from lm_train import signals
from lm_train.data.source import Piece, Source, Split, cache_folder, open_source
from lm_train.data.tokenizer import end_of_text_id, load_tokenizer, make_char_tokenizer, train_bpe
from lm_train.errors import DataError, LMTrainError, OutputError
from lm_train.recipe import AnyData
from lm_train.recipe.tokenizer_names import trained_bpe_size

_FORMAT = "1"
_BATCH_BYTES = 1 << 20
_BPE_TRAINING_CHARACTERS = 100_000_000
"""A vocabulary is learnt from the first so many characters of the training split: enough for stable merges."""


@dataclass(frozen=True)
class SplitInfo:
    """What is known of a complete split."""

    tokens: int
    text_bytes: int
    """UTF-8 bytes of the text the tokens stand for."""
    documents: int
    max_id: int
    max_id_where: str
    """The piece of text that holds the largest id."""


class TokenFile:
    """Reads one split, complete or growing.

    Args:
        folder: the corpus' cache folder.
        split: which split.
        vocab_size: of the tokenizer; decides two or four bytes an id.
    """

    def __init__(self, folder: Path, split: Split, vocab_size: int) -> None:
        self.file = folder / f"{split}.bin"
        self._info_file = folder / f"{split}.json"
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._mapped: npt.NDArray[np.unsignedinteger] | None = None

    def info(self) -> SplitInfo | None:
        """Facts of the whole split, or None while it grows."""
        try:
            return SplitInfo(**json.loads(self._info_file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def available(self) -> int:
        """Tokens that can be read now."""
        try:
            return self.file.stat().st_size // self.dtype.itemsize
        except FileNotFoundError:
            return 0

    def rows(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        """`length` tokens from each start: (len(starts), length)."""
        result = np.empty((len(starts), length), dtype=np.int64)
        if self._mapped is None and self.info() is not None:
            self._mapped = np.memmap(self.file, dtype=self.dtype, mode="r")
        for i, start in enumerate(starts):
            result[i] = self._read(int(start), length)
        return result

    def _read(self, start: int, length: int) -> npt.NDArray[np.unsignedinteger]:
        if self._mapped is not None:
            return self._mapped[start : start + length]
        with self.file.open("rb") as opened:
            opened.seek(start * self.dtype.itemsize)
            return np.frombuffer(opened.read(length * self.dtype.itemsize), dtype=self.dtype)


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus: its tokenizer, its splits, and a fingerprint of both."""

    label: str
    fingerprint: str
    tokenizer: Tokenizer
    folder: Path
    splits: tuple[Split, ...]

    def tokens(self, split: Split) -> TokenFile:
        return TokenFile(self.folder, split, self.tokenizer.get_vocab_size())


def prepare_corpus(section: AnyData, streaming: bool) -> Corpus:
    """Makes sure that the corpus is tokenised, or with `streaming` that someone is at it, and opens it.

    Any number of processes may call this at once; one works, the others wait.

    Raises:
        DataError: if the data are missing, wrong or out of reach.
        OutputError: if the cache cannot be written.
        StopRequested: if a signal asked for a stop meanwhile.
    """
    ready = load_tokenizer(section.tokenizer)
    source = open_source(section)
    tokenizer = ready or _tokenizer_of_corpus(section, source)
    fingerprint = hashlib.blake2b(
        "\0".join((_FORMAT, source.fingerprint, tokenizer.to_str())).encode(), digest_size=16
    ).hexdigest()
    corpus = Corpus(
        source.label, fingerprint, tokenizer, cache_folder() / "tokens" / fingerprint, tuple(source.readers)
    )
    for split in corpus.splits:
        if streaming and split == "train":
            _start_producer(section, corpus)
        else:
            _tokenise(source, corpus, split)
    return corpus


def _tokenizer_of_corpus(section: AnyData, source: Source) -> Tokenizer:
    identity = hashlib.blake2b(f"{_FORMAT}\0{source.fingerprint}\0{section.tokenizer}".encode(), digest_size=16)
    file = cache_folder() / "tokenizers" / f"{identity.hexdigest()}.json"
    with _locked(file.with_suffix(".lock")):
        if not file.exists():
            _say(f"making the vocabulary {section.tokenizer} from {source.label}")
            size = trained_bpe_size(section.tokenizer)
            splits: tuple[Split, ...] = ("train",) if size else tuple(source.readers)
            texts = (piece.text for split in splits for piece in _watched(source.pieces(split)))
            tokenizer = train_bpe(_first(texts, _BPE_TRAINING_CHARACTERS), size) if size else make_char_tokenizer(texts)
            partial = file.with_suffix(".partial")
            with _writing(partial):
                partial.write_text(tokenizer.to_str(), encoding="utf-8")
                partial.replace(file)
    return Tokenizer.from_file(str(file))


def _first(texts: Iterator[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def _watched(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Lets a signal end a long read."""
    for piece in pieces:
        signals.check()
        yield piece


def _tokenise(source: Source, corpus: Corpus, split: Split) -> None:
    """Writes one split, unless it is there; waits while another process writes it."""
    target = corpus.tokens(split)
    with _locked(corpus.folder / f"{split}.lock"):
        if target.info() is not None:
            return
        _say(f"tokenising {source.label} ({split}) into {corpus.folder}")
        writer = _Writer(corpus.tokenizer, target.dtype)
        several = False
        with _writing(target.file), target.file.open("wb") as out:
            for batch in _batches(_watched(source.pieces(split))):
                several = several or sum(piece.ends_document for piece in batch) > 1 or writer.documents > 0
                out.write(writer.encode(batch, separate=several))
                out.flush()
            os.fsync(out.fileno())
        if writer.tokens == 0:
            raise DataError(f"{source.label}: no text in the {split} split")
        info = SplitInfo(writer.tokens, writer.text_bytes, writer.documents, writer.max_id, writer.max_id_where)
        info_file = corpus.folder / f"{split}.json"
        with _writing(info_file):
            info_file.with_suffix(".partial").write_text(json.dumps(asdict(info)), encoding="utf-8")
            info_file.with_suffix(".partial").replace(info_file)
        _say(
            f"{info.tokens:,} tokens, {info.text_bytes / info.tokens:.2f} bytes each, {info.documents:,} documents ({split})"
        )


class _Writer:
    """Turns batches of pieces into bytes of ids, and counts."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype[np.unsignedinteger]) -> None:
        self.tokenizer, self.dtype = tokenizer, dtype
        self.end = end_of_text_id(tokenizer)
        self.tokens = self.text_bytes = self.documents = 0
        self.max_id, self.max_id_where = -1, ""

    def encode(self, batch: list[Piece], separate: bool) -> bytes:
        parts = []
        encodings = self.tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            ids = encoding.ids
            if piece.ends_document:
                self.documents += 1
                if separate and self.end is not None:
                    ids.append(self.end)
            array = np.array(ids, dtype=self.dtype)
            parts.append(array)
            self.tokens += len(array)
            self.text_bytes += len(piece.text.encode())
            if len(array) and int(array.max()) > self.max_id:
                self.max_id, self.max_id_where = int(array.max()), piece.where
        return np.concatenate(parts).tobytes()


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _start_producer(section: AnyData, corpus: Corpus) -> None:
    """Starts a process that tokenises the training split, unless it is complete or another one is at it."""
    if corpus.tokens("train").info() is None:
        corpus.folder.mkdir(parents=True, exist_ok=True)
        process = multiprocessing.get_context("spawn").Process(
            target=_produce, args=(section, corpus.tokenizer.to_str(), corpus.folder), daemon=True
        )
        process.start()


def _produce(section: AnyData, tokenizer: str, folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signals.die_with_parent()
    fault = folder / "train.error"
    source = open_source(section)
    corpus = Corpus(source.label, folder.name, Tokenizer.from_str(tokenizer), folder, ("train",))
    fault.unlink(missing_ok=True)
    try:
        _tokenise(source, corpus, "train")
    except LMTrainError as error:
        fault.write_text(str(error), encoding="utf-8")


def wait_for_tokens(tokens: TokenFile, needed: int, patience_s: float = 60.0) -> int:
    """Waits until `needed` tokens of a growing split can be read, or the split is complete.

    Returns:
        The tokens that can be read now.

    Raises:
        DataError: if the tokenising process failed, or nothing came for `patience_s` seconds.
    """
    fault = tokens.file.with_suffix(".error")
    seen, since = tokens.available(), time.monotonic()
    while True:
        complete = tokens.info() is not None
        available = tokens.available()
        if complete or available >= needed:
            return available
        if fault.exists():
            raise DataError(fault.read_text(encoding="utf-8"))
        if available > seen:
            seen, since = available, time.monotonic()
        elif time.monotonic() - since > patience_s:
            raise DataError(f"{tokens.file}: no new tokens for {patience_s:.0f} s; is the source out of reach?")
        signals.check()
        time.sleep(0.02)


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Holds a lock file; the kernel frees it when its holder dies."""
    with _writing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        opened = lock.open("w")
    with opened:
        while True:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                signals.check()
                time.sleep(0.05)
        yield


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise OutputError(
            f"{file}: {why}; the token cache lies under $XDG_CACHE_HOME, set it to a place with room"
        ) from None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
