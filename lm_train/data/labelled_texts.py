"""Labelled texts on disk: read, cleaned, divided and tokenised once, under a name made of all that decides the result."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from lm_train import signals
from lm_train.data.batches import Integers, Split
from lm_train.data.cache import cache_folder, locked, write_text, writing
from lm_train.data.classes import class_names
from lm_train.data.cleaning import Cleaner
from lm_train.data.documentation import documentation
from lm_train.data.order import mix64
from lm_train.data.rows import RowSource, cell, open_rows
from lm_train.data.source import digest_of_parts
from lm_train.data.splits import Digests, digest_of, divide, duplicates
from lm_train.data.stored import read_stored
from lm_train.data.tokenizer import (
    PADDING,
    UNKNOWN,
    join_pairs,
    load_tokenizer,
    make_char_tokenizer,
    make_word_tokenizer,
    padding_id,
    train_bpe,
    unknown_id,
)
from lm_train.errors import DataError
from lm_train.recipe import TextClassData
from lm_train.recipe.explain import nearest
from lm_train.recipe.tokenizer_names import trained_bpe_size, word_vocabulary_size

_FORMAT = "2"
_BATCH_TEXTS = 4096
_LABELS = ("label", "labels", "class", "target")
_DECIDING = {
    "text_column", "pair_column", "label_column", "cleaning", "missing", "tokenizer", "min_frequency", "max_length",
    "val_fraction", "folds", "fold",
}  # fmt: skip
"""Keys of the section that decide the samples, beside the files."""


@dataclass(frozen=True)
class TokenisedTexts:
    """One split: the texts' ids one after another."""

    ids: npt.NDArray[np.int32]
    """(all tokens,)."""
    starts: Integers
    """Of each text in `ids`, and the end of the last, (n + 1,)."""
    labels: Integers
    """(n,)."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Integers:
        """Tokens of each text, (n,), at least 1."""
        return np.diff(self.starts)


@dataclass(frozen=True)
class LabelledTexts:
    """A set of labelled texts as the training takes it."""

    label: str
    fingerprint: str
    tokenizer: Tokenizer
    class_names: tuple[str, ...]
    splits: dict[Split, TokenisedTexts]
    remarks: tuple[str, ...]
    """What was done to the data and what was found in them, a line each."""


class _Sample(NamedTuple):
    text: str
    pair: str | None
    label: str
    where: str


def prepare_texts(section: TextClassData) -> LabelledTexts:
    """Makes sure that the texts are tokenised, and loads them.

    Any number of processes may call this at once; one works, the others wait.

    Raises:
        DataError: naming file and row.
        OutputError: if the cache cannot be written.
        StopRequested: if a signal asked for a stop meanwhile.
    """
    ready = load_tokenizer(section.tokenizer)
    if section.path is None:
        source = documentation()
        if section.val_path is not None or section.test_path is not None:
            raise DataError("data.val_path and data.test_path go with data.path; the embedded texts have a test split")
    else:
        source = open_rows(section.path, section.val_path, section.test_path)
    chosen = section.model_dump_json(include=_DECIDING)
    fingerprint = digest_of_parts(_FORMAT, source.fingerprint, chosen, "" if ready is None else ready.to_str())
    folder = cache_folder() / "texts" / fingerprint
    with locked(folder.with_suffix(".lock")):
        stored = read_stored(folder)
        if stored is None:
            _make(section, source, ready, folder)
            stored = read_stored(folder)
    assert stored is not None
    splits = {split: TokenisedTexts(**arrays) for split, arrays in stored.arrays.items()}
    names, remarks = (tuple(stored.facts[key]) for key in ("class_names", "remarks"))
    return LabelledTexts(source.label, fingerprint, stored.tokenizer, names, splits, remarks)


def _make(section: TextClassData, source: RowSource, ready: Tokenizer | None, folder: Path) -> None:
    remarks = [source.note] if source.note else []
    cleaner = Cleaner(section.cleaning)
    samples = _read(section, source, cleaner, remarks)
    names = class_names(sample.label for sample in samples["train"])
    _check_labels(samples, names, source.label)
    digests: dict[Split, Digests] = {
        split: np.array([digest_of(s.text.encode(), (s.pair or "").encode()) for s in some], dtype=np.uint64)
        for split, some in samples.items()
    }
    numbers = {name: i for i, name in enumerate(names)}
    labels = {split: np.array([numbers[s.label] for s in some], dtype=np.int64) for split, some in samples.items()}
    if "val" in samples and section.folds is not None:
        remarks.append(f"data.folds: the source's own {len(samples['val']):,} validation texts are not used")
    if "val" not in samples or section.folds is not None:
        train, val = divide(digests["train"], labels["train"], section)
        if not len(val):
            raise DataError(f"{source.label}: no class has texts enough to train and to validate; give data.val_path")
        for part in (samples, digests, labels):
            whole: Any = part["train"]
            part["train"], part["val"] = _chosen(whole, train), _chosen(whole, val)
    lost = np.flatnonzero(np.bincount(labels["train"], minlength=len(names)) == 0)
    if len(lost):
        raise DataError(
            f"{source.label}: all texts of class {names[lost[0]]!r} validate, none trains; take fewer data.folds"
        )
    for twins in duplicates(digests):
        here, there = samples[twins.split][twins.sample], samples[twins.other][twins.twin]
        remarks.append(
            f"{twins.shared} of {twins.size} {twins.split} texts stand in the {twins.other} split too; the first: {here.where}, "
            f"as {there.where}"
        )
    for split in samples.keys() - {"train"}:  # files go class by class; a part of an evaluation should show them all
        scattered = np.argsort(mix64(digests[split]), kind="stable")
        samples[split], labels[split] = _chosen(samples[split], scattered), labels[split][scattered]
    tokenizer = ready or _vocabulary(section, samples["train"])
    if section.pair_column is not None:
        join_pairs(tokenizer)
    splits = {split: _tokenised(tokenizer, some, labels[split], section.max_length) for split, some in samples.items()}
    remarks.append(_said_of_vocabulary(section, tokenizer, splits))
    for split, texts in splits.items():
        _write(folder / f"{split}.npz", texts)
    write_text(folder / "tokenizer.json", tokenizer.to_str())
    write_text(
        folder / "meta.json",
        json.dumps({"class_names": names, "splits": list(splits), "remarks": remarks}),
    )


def _chosen(of: Any, numbers: Integers) -> Any:
    return of[numbers] if isinstance(of, np.ndarray) else [of[i] for i in numbers]


def _read(
    section: TextClassData, source: RowSource, cleaner: Cleaner, remarks: list[str]
) -> dict[Split, list[_Sample]]:
    """The samples of each split, cleaned; what was done is added to the remarks."""
    samples: dict[Split, list[_Sample]] = {}
    missing, rows = 0, 0
    for split, read in source.splits.items():
        samples[split] = []
        for row, where in read():
            rows += 1
            sample = _sample(section, source, row, where, cleaner)
            missing += sample is None or not sample.text or sample.pair == ""
            if sample is not None:
                samples[split].append(sample)
        if not samples[split]:
            raise DataError(f"{source.label}: no row of the {split} split has a text and a label")
    done = "" if missing == 0 else ", dropped" if section.missing == "drop" else ", kept as empty texts"
    remarks.append(f"missing values: {missing:,} of {rows:,} rows{done}")
    for step, changed in cleaner.changed.items():
        remarks.append(f"cleaning, {step}: changed {changed:,} of {cleaner.texts:,} texts")
    return samples


def _sample(
    section: TextClassData, source: RowSource, row: dict[str, Any], where: str, clean: Cleaner
) -> _Sample | None:
    """None for a row that is dropped."""
    text_column, label_column = source.columns or (section.text_column, _label_column(section, row, where))
    label = _label(cell(row, label_column, where, "data.label_column"), where, label_column)
    text = _text(cell(row, text_column, where, "data.text_column"), where, text_column)
    pair = None
    if section.pair_column is not None:
        pair = _text(cell(row, section.pair_column, where, "data.pair_column"), where, section.pair_column)
    cleaned = clean(text), None if pair is None else clean(pair)
    absent = [c for c, value in ((text_column, cleaned[0]), (section.pair_column, cleaned[1])) if value == ""]
    if section.missing == "drop" and (absent or label is None):
        return None
    if label is None:
        raise DataError(f"{where}: {label_column} is missing; data.missing=drop leaves such rows out")
    if absent and section.missing == "error":
        was = text if absent[0] == text_column else pair
        why = f"no text is left after cleaning ({', '.join(section.cleaning)})" if was else f"{absent[0]} is missing"
        raise DataError(f"{where}: {why}; data.missing=drop leaves such rows out, data.missing=empty keeps them")
    return _Sample(cleaned[0], cleaned[1], label or "", where)


def _label_column(section: TextClassData, row: dict[str, Any], where: str) -> str:
    if section.label_column is not None:
        return section.label_column
    found = next((column for column in _LABELS if column in row), None)
    if found is None:
        raise DataError(
            f"{where}: no column {', '.join(_LABELS)}; it has {', '.join(row) or 'none'}; name one with data.label_column="
        )
    return found


def _label(value: Any, where: str, column: str) -> str | None:
    """The label as text; None where it is missing."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value != value or (isinstance(value, str) and not value.strip()):  # NaN is not itself
        return None
    if not isinstance(value, str | int):
        raise DataError(f"{where}: {column} is {value!r:.80}, expected a class")
    return str(value).strip()


def _text(value: Any, where: str, column: str) -> str:
    """The text, empty where it is missing."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} is {value!r:.80}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {column} has half a character at position {error.start}") from None
    return value


def _check_labels(samples: dict[Split, list[_Sample]], names: tuple[str, ...], source: str) -> None:
    if len(names) == 1:
        raise DataError(f"{source}: only one class, {names[0]!r}; a classification needs two")
    for split, some in samples.items():
        for sample in some:
            if sample.label not in names:
                near = nearest(sample.label, names)
                raise DataError(
                    f"{sample.where}: label {sample.label!r} of the {split} split is not among the training split's "
                    f"{len(names)} classes" + (f"; did you mean {near!r}?" if near else f" ({', '.join(names[:10])})")
                )


def _vocabulary(section: TextClassData, train: list[_Sample]) -> Tokenizer:
    """Made from the training split alone."""
    texts = (text for sample in train for text in (sample.text, sample.pair) if text)
    merges, words = trained_bpe_size(section.tokenizer), word_vocabulary_size(section.tokenizer)
    if merges is not None:
        return train_bpe(texts, merges)
    if words is not None:
        return make_word_tokenizer(texts, words, section.min_frequency)
    return make_char_tokenizer(texts, (PADDING, UNKNOWN))


def _tokenised(tokenizer: Tokenizer, samples: list[_Sample], labels: Integers, max_length: int) -> TokenisedTexts:
    tokenizer.enable_truncation(max_length)
    empty = np.array([padding_id(tokenizer)], dtype=np.int32)
    parts: list[npt.NDArray[np.int32]] = []
    for batch in _batches(samples):
        signals.check()
        texts = [s.text if s.pair is None else (s.text, s.pair) for s in batch]
        encodings = tokenizer.encode_batch_fast(texts)
        parts += [np.array(encoding.ids, dtype=np.int32) if encoding.ids else empty for encoding in encodings]
    tokenizer.no_truncation()
    starts = np.concatenate(([0], np.cumsum([len(part) for part in parts], dtype=np.int64)))
    return TokenisedTexts(np.concatenate(parts), starts, labels)


def _batches(samples: list[_Sample]) -> Iterator[list[_Sample]]:
    for start in range(0, len(samples), _BATCH_TEXTS):
        yield samples[start : start + _BATCH_TEXTS]


def _said_of_vocabulary(section: TextClassData, tokenizer: Tokenizer, splits: Mapping[Split, TokenisedTexts]) -> str:
    lengths, val = splits["train"].lengths, splits["val"].ids
    said = f"tokens: {tokenizer.get_vocab_size():,} ids ({section.tokenizer}), {lengths.mean():.0f} a text"
    cut = int((lengths >= section.max_length).sum())
    unknown = unknown_id(tokenizer)
    if unknown is not None:
        said += f", {np.mean(val == unknown):.1%} of the validation's unknown"
    return said + (f", {cut:,} texts cut at data.max_length={section.max_length}" if cut else "")


def _write(file: Path, texts: TokenisedTexts) -> None:
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}.npz")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            np.savez(partial, ids=texts.ids, starts=texts.starts, labels=texts.labels)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def counts_in_words(names: Iterable[str], labels: Integers) -> str:
    """`sport 412, tech 330`, most frequent first."""
    counted = Counter(labels.tolist())
    names = tuple(names)
    return ", ".join(f"{names[number]} {count:,}" for number, count in counted.most_common())
