"""Pairs of texts on disk: read, divided and tokenised once, under a name made of all that decides the result."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from lm_train import signals
from lm_train.data.batches import Integers, Split
from lm_train.data.cache import cache_folder, locked, write_text, writing
from lm_train.data.order import mix64
from lm_train.data.rows import cell, open_rows
from lm_train.data.source import digest_of_parts, open_source
from lm_train.data.splits import Digests, digest_of, divide, duplicates
from lm_train.data.stored import read_stored
from lm_train.data.tokenizer import UNKNOWN, load_tokenizer, make_char_tokenizer, make_word_tokenizer, train_bpe
from lm_train.errors import DataError
from lm_train.recipe import EmbeddedData, PairData
from lm_train.recipe.tokenizer_names import PAIR_SYMBOLS, trained_bpe_size, word_vocabulary_size

_FORMAT = "1"
_BATCH_TEXTS = 4096
_DECIDING = {"source_column", "target_column", "tokenizer", "longer", "val_fraction", "folds", "fold"}
"""Keys of the section that decide the samples, beside the files."""
_WORDS = re.compile(r"(?<![A-Za-z0-9_])[a-z]{3,10}(?![A-Za-z0-9_])")
_TEST_SHARE = 0.05


@dataclass(frozen=True)
class TokenisedPairs:
    """One split: the ids of sources and of targets, one after another."""

    source_ids: npt.NDArray[np.int32]
    source_starts: Integers
    """Of each source in `source_ids`, and the end of the last, (n + 1,)."""
    target_ids: npt.NDArray[np.int32]
    target_starts: Integers

    def __len__(self) -> int:
        return len(self.source_starts) - 1

    @property
    def source_lengths(self) -> Integers:  # (n,), at least 1
        return np.diff(self.source_starts)

    @property
    def target_lengths(self) -> Integers:  # (n,), without start and end
        return np.diff(self.target_starts)

    def pair(self, number: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Source and target, (S,) and (T,)."""
        return (
            self.source_ids[self.source_starts[number] : self.source_starts[number + 1]],
            self.target_ids[self.target_starts[number] : self.target_starts[number + 1]],
        )


@dataclass(frozen=True)
class Pairs:
    """A set of pairs as the training takes it."""

    label: str
    fingerprint: str
    tokenizer: Tokenizer
    """Of both sides, with PAIR_SYMBOLS."""
    splits: dict[Split, TokenisedPairs]
    remarks: tuple[str, ...]
    """What was done to the data and what was found in them, a line each."""


class _Pair(NamedTuple):
    source: str
    target: str
    where: str
    key: str
    """Pairs of one key stay on one side when the training split is divided."""


def prepare_pairs(section: PairData, block_size: int) -> Pairs:
    """Makes sure that the pairs are tokenised, and loads them.

    Any number of processes may call this at once; one works, the others wait.

    Args:
        section: the recipe's data section.
        block_size: most tokens of a source, and of a target with its end.

    Raises:
        DataError: naming file and row.
        OutputError: if the cache cannot be written.
        StopRequested: if a signal asked for a stop meanwhile.
    """
    ready = load_tokenizer(section.tokenizer)
    rows = None if section.path is None else open_rows(section.path, section.val_path, section.test_path)
    if rows is None and (section.val_path is not None or section.test_path is not None):
        raise DataError("data.val_path and data.test_path go with data.path; the embedded pairs have a test split")
    words = open_source(EmbeddedData()) if rows is None else None
    content = rows.fingerprint if rows is not None else words.fingerprint if words is not None else ""
    chosen = section.model_dump_json(include=_DECIDING)
    tokenizer_text = "" if ready is None else ready.to_str()
    fingerprint = digest_of_parts(_FORMAT, content, chosen, str(block_size), tokenizer_text)
    label = "strings to copy and to reverse" if rows is None else rows.label
    folder = cache_folder() / "pairs" / fingerprint
    with locked(folder.with_suffix(".lock")):
        stored = read_stored(folder)
        if stored is None:
            remarks: list[str] = []
            if rows is None:
                assert words is not None
                splits = _strings(piece.text for split in words.readers for piece in words.pieces(split))
            else:
                remarks += [rows.note] if rows.note else []
                splits = {
                    split: [_pair(section, row, where) for row, where in read()] for split, read in rows.splits.items()
                }
            _make(section, splits, label, ready, block_size, folder, remarks)
            stored = read_stored(folder)
    assert stored is not None
    loaded = {split: TokenisedPairs(**arrays) for split, arrays in stored.arrays.items()}
    return Pairs(label, fingerprint, stored.tokenizer, loaded, tuple(stored.facts["remarks"]))


def _strings(texts: Iterable[str]) -> dict[Split, list[_Pair]]:
    """Each lower-case word of 3 to 10 letters in the texts, to be copied and to be reversed; some words only for the test."""
    words = sorted({word for text in texts for word in _WORDS.findall(text)})
    splits: dict[Split, list[_Pair]] = {"train": [], "test": []}
    for word in words:
        drawn = int(mix64(np.array([digest_of(b"test", word.encode())], dtype=np.uint64))[0])
        split: Split = "test" if drawn < _TEST_SHARE * 2**64 else "train"
        splits[split].append(_Pair(f"copy: {word}", word, word, word))
        splits[split].append(_Pair(f"reverse: {word}", word[::-1], word, word))
    return splits


def _pair(section: PairData, row: dict[str, Any], where: str) -> _Pair:
    signals.check()
    texts = []
    for column, key in ((section.source_column, "source_column"), (section.target_column, "target_column")):
        text = cell(row, column, where, f"data.{key}")
        if not isinstance(text, str) or not text.strip():
            found = "is missing" if text is None or text == "" else f"is {text!r:.80}, expected text"
            raise DataError(f"{where}: {column} {found}; give each row both texts, or leave it out")
        texts.append(text)
    return _Pair(texts[0], texts[1], where, texts[0])


def _make(
    section: PairData,
    splits: dict[Split, list[_Pair]],
    label: str,
    ready: Tokenizer | None,
    block_size: int,
    folder: Path,
    remarks: list[str],
) -> None:
    if "val" in splits and section.folds is not None:
        remarks.append(f"data.folds: the source's own {len(splits['val']):,} validation pairs are not used")
    if "val" not in splits or section.folds is not None:
        keys = np.array([digest_of(pair.key.encode()) for pair in splits["train"]], dtype=np.uint64)
        train, val = divide(keys, None, section)
        if not len(train) or not len(val):
            raise DataError(f"{label}: {len(keys)} pairs are too few to train and to validate; give data.val_path")
        splits["val"], splits["train"] = ([splits["train"][i] for i in part] for part in (val, train))
    digests: dict[Split, Digests] = {
        split: np.array([digest_of(pair.source.encode()) for pair in pairs], dtype=np.uint64)
        for split, pairs in splits.items()
    }
    for twins in duplicates(digests):
        here, there = splits[twins.split][twins.sample], splits[twins.other][twins.twin]
        remarks.append(
            f"{twins.shared} of {twins.size} {twins.split} sources stand in the {twins.other} split too; the first: "
            f"{here.where}, as {there.where}"
        )
    tokenizer = ready or _vocabulary(section.tokenizer, splits["train"])
    tokenised = {split: _tokenised(tokenizer, pairs) for split, pairs in splits.items()}
    for split, (sources, targets) in tokenised.items():
        kept = _fitting(sources, targets, block_size, section.longer)
        long = len(sources) - len(kept) if section.longer == "drop" else _too_long(sources, targets, block_size)
        if long:
            done = "dropped" if section.longer == "drop" else "cut"
            remarks.append(f"{long:,} of {len(sources):,} {split} pairs are longer than {block_size} tokens: {done}")
        if not kept:
            raise DataError(f"{label}: all {split} pairs are longer than model.block_size={block_size}; raise it")
        _write(folder / f"{split}.npz", kept)
    tokenizer.add_special_tokens(list(PAIR_SYMBOLS))
    write_text(folder / "tokenizer.json", tokenizer.to_str())
    write_text(folder / "meta.json", json.dumps({"splits": list(splits), "remarks": remarks}))


def _vocabulary(name: str, train: list[_Pair]) -> Tokenizer:
    """Made from both sides of the training split alone."""
    texts = (text for pair in train for text in (pair.source, pair.target))
    merges, words = trained_bpe_size(name), word_vocabulary_size(name)
    if merges is not None:
        return train_bpe(texts, merges)
    if words is not None:
        return make_word_tokenizer(texts, words)
    return make_char_tokenizer(texts, (UNKNOWN,))


def _tokenised(tokenizer: Tokenizer, pairs: list[_Pair]) -> tuple[list[list[int]], list[list[int]]]:
    sides: tuple[list[list[int]], list[list[int]]] = ([], [])
    for start in range(0, len(pairs), _BATCH_TEXTS):
        signals.check()
        batch = pairs[start : start + _BATCH_TEXTS]
        for side, texts in zip(sides, ([p.source for p in batch], [p.target for p in batch]), strict=True):
            side += [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return sides


def _fitting(
    sources: list[list[int]], targets: list[list[int]], size: int, longer: str
) -> list[tuple[list[int], list[int]]]:
    """Pairs of at most `size` tokens on each side, the target's end included."""
    pairs = zip(sources, targets, strict=True)
    if longer == "cut":
        return [(source[:size], target[: size - 1]) for source, target in pairs if source]
    return [(source, target) for source, target in pairs if 0 < len(source) <= size and len(target) < size]


def _too_long(sources: list[list[int]], targets: list[list[int]], size: int) -> int:
    return sum(len(source) > size or len(target) >= size for source, target in zip(sources, targets, strict=True))


def _write(file: Path, pairs: list[tuple[list[int], list[int]]]) -> None:
    arrays: dict[str, Any] = {}
    for name, side in (("source", [s for s, _ in pairs]), ("target", [t for _, t in pairs])):
        arrays[f"{name}_ids"] = np.array([i for ids in side for i in ids], dtype=np.int32)
        arrays[f"{name}_starts"] = np.concatenate(([0], np.cumsum([len(ids) for ids in side], dtype=np.int64)))
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}.npz")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            np.savez(partial, **arrays)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
