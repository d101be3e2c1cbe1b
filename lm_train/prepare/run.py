"""`lm-train prepare`: text in, a folder of shards out. Free of torch.

The text is read in order and cut into units; workers clean, key and tokenise them; when all are done, the first of equal
documents is chosen and the rest is packed. Each unit and each shard is published whole, so that a killed preparation goes on
with what is missing, and neither kills nor the number of workers show in a single byte of the result.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from lm_train import signals
from lm_train.data.cache import write_text
from lm_train.data.readers import Piece, Split
from lm_train.data.shards import (
    TOKENIZER,
    Manifest,
    Shard,
    digest,
    ids_dtype,
    make_manifest,
    write_manifest,
    write_whole,
)
from lm_train.data.source import Source, open_source
from lm_train.data.tokenizer import (
    end_of_text_id,
    load_tokenizer,
    make_char_tokenizer,
    make_word_tokenizer,
    train_bpe,
    vocabulary_size,
)
from lm_train.errors import DataError, ExitCode, OutputError, StopRequested, UsageError
from lm_train.planning import split_words
from lm_train.prepare.deciding import Decided, decide, summary
from lm_train.prepare.folder import PreparedFolder
from lm_train.prepare.pool import Pool
from lm_train.prepare.progress import Progress
from lm_train.prepare.report import report
from lm_train.prepare.rules import Cleaning, LineHashes, frequent
from lm_train.prepare.table import write_documents
from lm_train.prepare.units import DoneFile, Unit, documents_of, units_of
from lm_train.prepare.work import ShardTask, Task, read_record, shard_record
from lm_train.recipe import EmbeddedData, Recipe, TextData, load
from lm_train.recipe.tokenizer_names import trained_bpe_size, word_vocabulary_size

RULES = 1
"""Counts up with every change of a rule that may change its result."""
_VOCABULARY_CHARACTERS = 100_000_000
"""A vocabulary is learnt from the first so many characters of the training split: enough for stable merges."""


def prepare(words: Sequence[str]) -> int:
    """Prepares the text that a recipe names.

    Args:
        words: a recipe's, and `out=DIR`; without it, prepared/RECIPE in the current folder.

    Raises:
        UsageError: if the recipe is wrong or not of running text.
        DataError: if the text is missing, wrong, or nothing is left of it.
        OutputError: if the folder cannot be written, or is somebody else's.
    """
    own, rest = split_words(words, {"out": ()})
    recipe = load(rest)
    if not isinstance(recipe.data, EmbeddedData | TextData):
        raise UsageError(
            f"data={recipe.data.kind}: lm-train prepare is for running text; give data=embedded, or data=text data.path=FILES"
        )
    os.environ.setdefault("USE_TORCH", "0")  # `datasets` would import it
    signals.listen()
    folder = PreparedFolder(Path(own.get("out", f"prepared/{recipe.recipe}")).expanduser())
    try:
        manifest = Preparation(recipe, recipe.data, folder).run()
    except StopRequested as stop:
        print("lm-train: stopped; the same command goes on from here", file=sys.stderr)
        return stop.exit_code
    except OutputError as error:
        full = "the disk is full" in str(error)
        raise OutputError(f"{error}; make room, and the same command goes on" if full else str(error)) from None
    print(report(manifest))
    print(folder.out)
    return ExitCode.DONE


class Preparation:
    """One preparation: its stages in order."""

    def __init__(self, recipe: Recipe, data: EmbeddedData | TextData, folder: PreparedFolder) -> None:
        self.section, self.data, self.folder = recipe.prepare, data, folder
        auto = self.section.workers == "auto"
        self.workers = _cores() if auto else int(self.section.workers)
        self.task = Task(folder.work, folder.out, self.section.cleaning, self.section.dedup == "near")
        self.pool = Pool(self.workers)

    def run(self) -> Manifest:
        """All stages, each from where an earlier start has left it."""
        source = open_source(self.data)
        loaded = load_tokenizer(self.data.tokenizer)
        request = self._request(source, loaded)
        with self.folder.owned(request) as finished, self.pool:
            if finished is not None:
                print(f"{self.folder.out}: has been prepared already", file=sys.stderr)
                return finished
            if source.note:
                print(source.note, file=sys.stderr)
            if "repeated_lines" in self.section.cleaning:
                self._find_repeated_lines(source)
                self.task = replace(self.task, repeated=self.folder.repeated)
            tokenizer = self._tokenizer(source, loaded)
            self.task = replace(self.task, tokenizer=self.folder.tokenizer)
            units = self._work(source)
            decided = decide(self.task, units, self.section)
            shards = self._pack(decided)
            return self._finish(request, tokenizer, decided, shards)

    def _request(self, source: Source, loaded: Tokenizer | None) -> dict[str, Any]:
        """Everything that the result depends on."""
        section = self.section
        repeated = {"repeated_in": section.repeated_in} if "repeated_lines" in section.cleaning else {}
        near = {"near_threshold": section.near_threshold} if section.dedup == "near" else {}
        return {
            "data": source.label,
            "text": source.fingerprint,
            "tokenizer": self.data.tokenizer if loaded is None else digest(loaded.to_str().encode()),
            "cleaning": list(section.cleaning),
            **repeated,
            "dedup": section.dedup,
            **near,
            "shard_tokens": section.shard_tokens,
            "rules": RULES,
        }

    def _find_repeated_lines(self, source: Source) -> None:
        """Makes the file of the lines that stand in many documents."""
        if self.folder.repeated.exists():
            return
        files: list[Path] = []
        progress = Progress("counting lines", source.size)
        units = self._missing(source, self.folder.work / "lines", progress, files)
        self.pool.run(self.task, "count_lines", units, lambda unit: progress.add(_size(unit)))

        def hashes() -> Iterator[LineHashes]:
            for file in files:
                signals.check()
                yield np.frombuffer(file.read_bytes(), dtype="<u8")

        repeated = frequent(hashes, self.section.repeated_in)
        write_whole(self.folder.repeated, repeated.astype("<u8").tobytes())
        progress.close(f"{len(repeated):,} stand in {self.section.repeated_in} documents or more")
        for file in files:
            file.unlink()

    def _tokenizer(self, source: Source, loaded: Tokenizer | None) -> Tokenizer:
        """The named tokenizer, or the one made of the cleaned text."""
        file = self.folder.tokenizer
        if loaded is not None:
            write_text(file, loaded.to_str())
        elif not file.exists():
            progress = Progress(f"making the vocabulary {self.data.tokenizer}", None)
            merges, words = trained_bpe_size(self.data.tokenizer), word_vocabulary_size(self.data.tokenizer)
            if merges or words:
                texts = self._cleaned(source, ("train",), _VOCABULARY_CHARACTERS, progress)
                made = train_bpe(texts, merges) if merges else make_word_tokenizer(texts, words or 0)
            else:
                made = make_char_tokenizer(self._cleaned(source, tuple(source.readers), None, progress))
            progress.close(f"{vocabulary_size(made):,} ids")
            write_text(file, made.to_str())
        return Tokenizer.from_file(str(file))

    def _cleaned(
        self, source: Source, splits: tuple[Split, ...], characters: int | None, progress: Progress
    ) -> Iterator[str]:
        repeated = self.task.repeated
        cleaning = Cleaning(
            self.section.cleaning, None if repeated is None else np.frombuffer(repeated.read_bytes(), dtype="<u8")
        )
        left = characters
        for split in splits:
            for document in documents_of(_watched(source.pieces(split))):
                text = cleaning(document.text, "")
                if text is None:
                    continue
                yield text
                progress.add(len(text))
                if left is not None:
                    left -= len(text)
                    if left <= 0:
                        return

    def _work(self, source: Source) -> dict[Split, int]:
        """Makes every unit's file; returns how many units each split has."""
        known = self.folder.work / "units.json"
        if known.exists():
            counted: dict[Split, int] = json.loads(known.read_text(encoding="utf-8"))
            if all(self.task.file_of(split, i).exists() for split, n in counted.items() for i in range(n)):
                return counted
        files: list[Path] = []
        progress = Progress("cleaning and tokenising", source.size)
        units = self._missing(source, self.folder.work / "units", progress, files)
        self.pool.run(self.task, "work", units, lambda unit: progress.add(_size(unit)))
        names = [file.name for file in files]
        counts = {split: sum(name.startswith(f"{split}-") for name in names) for split in source.readers}
        progress.close(f"{(progress.before + progress.done) / 1e6:,.1f} MB of text")
        if not files:
            raise DataError(f"{source.label}: no text")
        write_text(known, json.dumps(counts))
        return counts

    def _missing(self, source: Source, place: Path, progress: Progress, files: list[Path]) -> Iterator[Unit]:
        """The units that have no file in `place` yet; `files` takes the names of all."""
        for split in source.readers:
            for unit in units_of(split, documents_of(_watched(source.pieces(split)))):
                files.append(place / unit.name)
                if files[-1].exists():
                    progress.skip(_size(unit))
                else:
                    yield unit

    def _pack(self, decided: Decided) -> dict[Split, list[tuple[Shard, int]]]:
        """Writes the shards that are missing; returns all of them with their largest ids."""
        tasks = [task for split in decided.units for task in decided.shard_tasks(split, self.section.shard_tokens)]
        if not any(task.split == "train" for task in tasks):
            worst = max(decided.removed.items(), key=lambda item: item[1].dropped)
            raise DataError(
                f"{self.data.kind}: nothing is left of the training text: {decided.read['documents']:,} documents were read, "
                f"{worst[1].dropped:,} fell to {worst[0]}; change prepare.cleaning, or data.path"
            )
        progress = Progress("packing", len(tasks), "shards")
        work = self.folder.work
        missing = [task for task in tasks if not shard_record(work, task.split, task.number).exists()]
        progress.skip(len(tasks) - len(missing))

        def done(task: Unit | ShardTask) -> None:
            progress.add(1)

        self.pool.run(self.task, "pack", missing, done)
        shards: dict[Split, list[tuple[Shard, int]]] = {}
        for task in tasks:
            record = read_record(shard_record(work, task.split, task.number))
            shards.setdefault(task.split, []).append(record)
        progress.close(f"{len(tasks):,} shards")
        for split in set(decided.units) - set(shards):
            progress.line(f"{split}: nothing is left of it, so that the folder has no such split")
        return shards

    def _finish(
        self,
        request: dict[str, Any],
        tokenizer: Tokenizer,
        decided: Decided,
        shards: dict[Split, list[tuple[Shard, int]]],
    ) -> Manifest:
        out = self.folder.out
        content = tokenizer.to_str().encode()
        write_whole(out / TOKENIZER, content)
        table = write_documents(out, decided, {split: [shard for shard, _ in made] for split, made in shards.items()})
        splits = {}
        for split, made in shards.items():
            text_bytes = 0
            for number, first, end in decided.ranges(split):
                lengths = DoneFile(self.task.file_of(split, number)).read("text_bytes")[0]
                text_bytes += int(lengths[decided.stays[first:end]].sum())
            splits[split] = {
                "tokens": sum(shard.tokens for shard, _ in made),
                "documents": sum(shard.documents for shard, _ in made),
                "text_bytes": text_bytes,
                "max_id": max(max_id for _, max_id in made),
                "shards": [shard for shard, _ in made],
            }
        size = vocabulary_size(tokenizer)
        manifest = make_manifest(
            dtype=f"uint{8 * ids_dtype(size).itemsize}",
            tokenizer={"blake2b": digest(content), "vocab_size": size, "end_of_text": end_of_text_id(tokenizer)},
            settings=request,
            splits=splits,
            documents=table,
            counts=summary(decided),
        )
        write_manifest(out, manifest)
        self.folder.finish()
        return manifest


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _size(unit: Unit | ShardTask) -> int:
    """UTF-8 bytes of a unit's text."""
    return sum(len(document.text.encode()) for document in unit.documents) if isinstance(unit, Unit) else 0


def _watched(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Lets a signal end a long read."""
    for piece in pieces:
        signals.check()
        yield piece
