"""What one worker does: clean a unit's documents, key them for duplicates, tokenise them; or pack a shard."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from lm_train import signals
from lm_train.data.cache import write_text
from lm_train.data.readers import Split
from lm_train.data.shards import Ids, Shard, ids_dtype, shard_name, write_shard, write_whole
from lm_train.data.tokenizer import end_of_text_id, vocabulary_size
from lm_train.prepare.duplicates import BANDS, SIGNATURE, bands_of, key_of_text, signature
from lm_train.prepare.rules import Cleaning, LineHashes, line_hashes
from lm_train.prepare.units import Done, DoneFile, Unit, save, unit_name
from lm_train.recipe import CleaningRule

_BATCH_CHARACTERS = 1 << 20
"""Tokenised at a time: the tokenizer's own results take a hundred bytes a token."""


@dataclass(frozen=True)
class Task:
    """What every worker of a stage knows; the files are made before."""

    folder: Path
    """Of the unfinished work."""
    out: Path
    cleaning: tuple[CleaningRule, ...]
    near: bool
    tokenizer: Path | None = None
    """tokenizer.json; None while lines are counted."""
    repeated: Path | None = None
    """Sorted hashes of the repeated lines, where that rule is wanted."""

    def file_of(self, split: Split, number: int) -> Path:
        return self.folder / "units" / unit_name(split, number)


@dataclass(frozen=True)
class ShardTask:
    """Documents of a split that make one shard."""

    split: Split
    number: int
    parts: tuple[tuple[int, tuple[int, ...]], ...]
    """Units with their documents that belong to it, both by number."""


class Worker:
    """Holds what is made once: the tokenizer, the repeated lines."""

    def __init__(self, task: Task) -> None:
        self.task = task
        repeated: LineHashes | None = None
        if task.repeated is not None:
            repeated = np.frombuffer(task.repeated.read_bytes(), dtype="<u8")
        self.repeated = repeated
        self.tokenizer = Tokenizer.from_file(str(task.tokenizer)) if task.tokenizer is not None else None
        if self.tokenizer is not None:
            self.tokenizer.encode_special_tokens = True  # a text that has <|endoftext|> in it does not end there
            self.dtype = ids_dtype(vocabulary_size(self.tokenizer))
            self.end = end_of_text_id(self.tokenizer)

    def count_lines(self, unit: Unit) -> None:
        """Leaves the hashes of the unit's lines, each once for a document, as they are when repeated_lines comes."""
        rules = self.task.cleaning[: self.task.cleaning.index("repeated_lines")]
        cleaning = Cleaning(rules)
        hashes: list[int] = []
        for document in unit.documents:
            text = cleaning(document.text, "")
            if text is not None:
                hashes += line_hashes(text)
        content = np.sort(np.array(hashes, dtype="<u8")).tobytes()
        write_whole(self.task.folder / "lines" / unit.name, content)

    def work(self, unit: Unit) -> None:
        """Leaves the unit's file."""
        save(self.task.file_of(unit.split, unit.number), self.done(unit))

    def done(self, unit: Unit) -> Done:
        """What the unit's file is to hold."""
        cleaning = Cleaning(self.task.cleaning, self.repeated)
        texts = [cleaning(document.text, document.where) for document in unit.documents]
        lengths, ids = self.tokenise([text for text in texts if text is not None])
        n, live = len(texts), np.array([text is not None for text in texts], dtype=bool)
        tokens = np.full(n, -1, dtype=np.int64)
        tokens[live] = lengths
        encoded = [b"" if text is None else text.encode() for text in texts]
        sources: dict[str, int] = {}
        source = [sources.setdefault(document.source, len(sources)) for document in unit.documents]
        signatures = np.empty((n if self.task.near else 0, SIGNATURE), dtype=np.uint32)
        for i, text in enumerate(texts if self.task.near else ()):
            signatures[i] = signature(text or "")
        return Done(
            ids=ids,
            tokens=tokens,
            text_bytes=np.array([len(text) for text in encoded], dtype=np.int64),
            characters=np.array([len(text or "") for text in texts], dtype=np.int64),
            keys=_table(key_of_text(text or "") for text in texts),
            digests=_table(hashlib.blake2b(text, digest_size=16).digest() for text in encoded),
            rows=np.array([document.row for document in unit.documents], dtype=np.int64),
            bands=bands_of(signatures) if self.task.near else np.empty((0, BANDS), dtype=np.uint64),
            signatures=signatures,
            facts={
                "sources": list(sources),
                "source": source,
                "read": {
                    "documents": n,
                    "characters": sum(len(document.text) for document in unit.documents),
                },
                "removed": {rule: removed.as_json() for rule, removed in cleaning.removed.items()},
            },
        )

    def tokenise(self, texts: Sequence[str]) -> tuple[list[int], Ids]:
        """Ids of the texts, one after another, each closed by the end-of-text id; and how many each has."""
        assert self.tokenizer is not None
        lengths: list[int] = []
        parts: list[Ids] = []
        closing = [] if self.end is None else [self.end]
        for batch in _batches(texts):
            encodings = self.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            ids = [encoding.ids + closing for encoding in encodings]
            counts = list(map(len, ids))
            parts.append(np.fromiter(itertools.chain.from_iterable(ids), dtype=self.dtype, count=sum(counts)))
            lengths += counts
        return lengths, np.concatenate(parts) if parts else np.array([], dtype=self.dtype)

    def pack(self, task: ShardTask) -> None:
        """Writes a shard and, last, what is to be said of it."""
        shard, max_id = write_shard(
            self.task.out, shard_name(task.split, task.number), self._documents(task), self.dtype
        )
        write_text(shard_record(self.task.folder, task.split, task.number), f"{max_id}\n{shard.model_dump_json()}")

    def _documents(self, task: ShardTask) -> Iterator[Ids]:
        for number, chosen in task.parts:
            ids, tokens = DoneFile(self.task.file_of(task.split, number)).read("ids", "tokens")
            ends = np.cumsum(np.maximum(tokens, 0))
            for document in chosen:
                yield ids[ends[document] - tokens[document] : ends[document]]


def shard_record(folder: Path, split: Split, number: int) -> Path:
    """The file that says that a shard is whole."""
    return folder / "shards" / f"{shard_name(split, number)}.json"


def read_record(file: Path) -> tuple[Shard, int]:
    max_id, _, content = file.read_text(encoding="utf-8").partition("\n")
    return Shard.model_validate_json(content), int(max_id)


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    start = size = 0
    for i, text in enumerate(texts):
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield texts[start : i + 1]
            start, size = i + 1, 0
    if start < len(texts):
        yield texts[start:]


def _table(rows: Iterable[bytes]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, 16)


def start_worker() -> None:
    """What a process of the pool does first: one thread, and no signal of the terminal's; SIGTERM ends it."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.HANDLED)
    signals.die_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
