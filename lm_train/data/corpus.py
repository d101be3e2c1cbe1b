"""Tokens on disk: a corpus is tokenised once, under a name made of its content, and read by every rank and run.

A split is `SPLIT.bin` (little-endian ids, documents joined by the end-of-text id), complete when `SPLIT.json` stands beside
it. One process writes it under a lock; with streaming, others read it while it grows.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from lm_train import signals
from lm_train.data.cache import cache_folder, locked, locked_if_free, write_text, writing
from lm_train.data.mixing import Part
from lm_train.data.readers import Piece
from lm_train.data.source import Source, Split, open_source
from lm_train.data.tokenizer import (
    end_of_text_id,
    load_tokenizer,
    make_char_tokenizer,
    make_word_tokenizer,
    train_bpe,
    vocabulary_size,
)
from lm_train.errors import DataError
from lm_train.recipe import EmbeddedData, TextData
from lm_train.recipe.tokenizer_names import trained_bpe_size, word_vocabulary_size

_FORMAT = "1"
_BATCH_BYTES = 1 << 20
_BPE_TRAINING_CHARACTERS = 100_000_000
"""A vocabulary is learnt from the first so many characters of the training split: enough for stable merges."""
_PATIENCE_S = 180
"""A growing split may stand still so long; `datasets` itself gives up on a silent server after about 100 s."""
_START_S = 120
"""So long the process that tokenises may take to start."""


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
        self.info_file = folder / f"{split}.json"
        self.lock = folder / f"{split}.lock"
        self.fault = folder / f"{split}.error"
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._mapped: npt.NDArray[np.unsignedinteger] | None = None

    def info(self) -> SplitInfo | None:
        """Facts of the whole split, or None while it grows (or if the file is not what was written)."""
        try:
            info = SplitInfo(**json.loads(self.info_file.read_text(encoding="utf-8")))
            return info if self.file.stat().st_size == info.tokens * self.dtype.itemsize else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError):  # not what was written: it is made anew
            return None

    def available(self) -> int:
        """Tokens that can be read now."""
        try:
            return self.file.stat().st_size // self.dtype.itemsize
        except FileNotFoundError:
            return 0

    def parts(self) -> list[Part]:
        """The complete split as one source of a mixture."""
        info = self.info()
        assert info is not None
        return [Part(info.tokens)]

    def rows(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        """`length` tokens from each start: (len(starts), length)."""
        result = np.empty((len(starts), length), dtype=np.int64)
        if self._mapped is None and self.info() is not None:
            self._mapped = np.asarray(np.memmap(self.file, dtype=self.dtype, mode="r"))
        for i, start in enumerate(starts.tolist()):
            result[i] = self._growing(start, length) if self._mapped is None else self._mapped[start : start + length]
        return result

    def _growing(self, start: int, length: int) -> npt.NDArray[np.unsignedinteger]:
        """Reads from the file as it is now; it can be shorter than a moment ago, when its writer was killed."""
        while wait_for_tokens(self, start + length) >= start + length:
            try:
                with self.file.open("rb") as opened:
                    opened.seek(start * self.dtype.itemsize)
                    read = opened.read(length * self.dtype.itemsize)
            except FileNotFoundError:
                continue
            if len(read) == length * self.dtype.itemsize:
                return np.frombuffer(read, dtype=self.dtype)
        raise DataError(f"{self.file}: has {self.available():,} tokens, {start + length:,} are wanted; delete it")


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus: its tokenizer, its splits, and a fingerprint of both."""

    label: str
    fingerprint: str
    tokenizer: Tokenizer
    folder: Path
    splits: tuple[Split, ...]

    def tokens(self, split: Split) -> TokenFile:
        return TokenFile(self.folder, split, vocabulary_size(self.tokenizer))


def prepare_corpus(section: EmbeddedData | TextData, streaming: bool) -> Corpus:
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


def _tokenizer_of_corpus(section: EmbeddedData | TextData, source: Source) -> Tokenizer:
    identity = hashlib.blake2b(f"{_FORMAT}\0{source.fingerprint}\0{section.tokenizer}".encode(), digest_size=16)
    file = cache_folder() / "tokenizers" / f"{identity.hexdigest()}.json"
    with locked(file.with_suffix(".lock")):
        if not file.exists():
            _say(f"making the vocabulary {section.tokenizer} from {source.label}")
            merges, words = trained_bpe_size(section.tokenizer), word_vocabulary_size(section.tokenizer)
            splits: tuple[Split, ...] = ("train",) if merges or words else tuple(source.readers)
            texts = (piece.text for split in splits for piece in _watched(source.pieces(split)))
            if merges:
                tokenizer = train_bpe(_first(texts, _BPE_TRAINING_CHARACTERS), merges)
            elif words:
                tokenizer = make_word_tokenizer(_first(texts, _BPE_TRAINING_CHARACTERS), words)
            else:
                tokenizer = make_char_tokenizer(texts)
            write_text(file, tokenizer.to_str())
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"{file}: damaged ({str(error)[:100]}); remove it, and it is made anew") from None


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
    if target.info() is not None:
        return
    with locked(target.lock):
        if target.info() is not None:
            return
        _say(f"tokenising {source.label} ({split}) into {corpus.folder}")
        if source.note:
            _say(source.note)
        writer = _Writer(corpus.tokenizer, target.dtype)
        with writing(target.file):
            target.info_file.unlink(missing_ok=True)
            out = target.file.open("wb")
        with out:
            for batch in _batches(_watched(source.pieces(split))):
                ids = writer.encode(batch)
                with writing(target.file):
                    out.write(ids)
                    out.flush()
            with writing(target.file):
                os.fsync(out.fileno())
        if writer.tokens == 0:
            raise DataError(f"{source.label}: no text in the {split} split")
        info = SplitInfo(writer.tokens, writer.text_bytes, writer.documents, writer.max_id, writer.max_id_where)
        write_text(target.info_file, json.dumps(asdict(info)))
        _say(
            f"{info.tokens:,} tokens, {info.text_bytes / info.tokens:.2f} bytes each, {info.documents:,} documents ({split})"
        )


class _Writer:
    """Turns batches of pieces into bytes of ids, the end-of-text id between documents, and counts."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype[np.unsignedinteger]) -> None:
        self.tokenizer, self.dtype = tokenizer, dtype
        self.end = end_of_text_id(tokenizer)
        self.tokens = self.text_bytes = self.documents = 0
        self.max_id, self.max_id_where = -1, ""
        self._document_ended = False

    def encode(self, batch: list[Piece]) -> bytes:
        parts = []
        encodings = self.tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            separator = [self.end] if self._document_ended and self.end is not None else []
            ids = np.array(separator + encoding.ids, dtype=self.dtype)
            parts.append(ids)
            self.tokens += len(ids)
            self.text_bytes += len(piece.text.encode())
            self.documents += piece.ends_document
            self._document_ended = piece.ends_document
            if len(ids) and int(ids.max()) > self.max_id:
                self.max_id, self.max_id_where = int(ids.max()), piece.where
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


def _start_producer(section: EmbeddedData | TextData, corpus: Corpus) -> None:
    """Starts a process that tokenises the training split, unless it is complete; one on a machine is enough."""
    train = corpus.tokens("train")
    if train.info() is not None or int(os.environ.get("LOCAL_RANK", 0)) != 0:
        return
    with locked_if_free(train.lock) as free, writing(train.file):
        if free:  # nobody is at it: what a killed one left is not trusted, what a failed one said is past
            for file in (train.file, train.fault):
                file.unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(
        target=_produce, args=(section, corpus.tokenizer.to_str(), corpus.folder), daemon=True
    )
    with signals.blocked():
        process.start()


def _produce(section: EmbeddedData | TextData, tokenizer: str, folder: Path) -> None:
    for number in (signal.SIGINT, signal.SIGUSR1):  # the parent decides; SIGTERM is how it ends this process
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.HANDLED)
    signals.die_with_parent()
    try:
        source = open_source(section)
        _tokenise(source, Corpus(source.label, folder.name, Tokenizer.from_str(tokenizer), folder, ("train",)), "train")
    except Exception as error:
        write_text(folder / "train.error", str(error) or type(error).__name__)


def wait_for_tokens(tokens: TokenFile, needed: int) -> int:
    """Waits until `needed` tokens of a growing split can be read, or the split is complete.

    Returns:
        The tokens that can be read now.

    Raises:
        DataError: if the tokenising process failed or ended, or nothing came for a long time.
        StopRequested: if a signal asked for a stop meanwhile.
    """
    seen, since = -1, time.monotonic()
    while True:
        complete, available = tokens.info() is not None, tokens.available()
        if available >= needed or complete:
            return available
        if tokens.fault.exists():
            raise DataError(tokens.fault.read_text(encoding="utf-8"))
        waited = time.monotonic() - since
        if available != seen:
            seen, since = available, time.monotonic()
        elif waited > _PATIENCE_S:
            raise DataError(f"{tokens.file}: no new tokens for {_PATIENCE_S} s; is the source out of reach?")
        elif waited > _START_S:
            with locked_if_free(tokens.lock) as nobody_writes:
                pass
            if nobody_writes and tokens.info() is None:
                raise DataError(f"{tokens.file}: the process that tokenised it is gone; start again")
        signals.check()
        time.sleep(0.02)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
