"""Training and validation samples of a set that brings no validation split; samples that stand in two splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lm_train.data.batches import Integers, Split
from lm_train.data.order import key_of, mix64
from lm_train.errors import DataError
from lm_train.recipe import LabelledData

Digests = npt.NDArray[np.uint64]


def digest_of(*parts: bytes) -> int:
    """A 64-bit number made of a sample's content; equal contents have equal numbers, others almost surely not."""
    hashed = hashlib.blake2b(digest_size=8)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return int.from_bytes(hashed.digest(), "little")


def divide(
    digests: Digests, labels: Sequence[int] | Integers | None, section: LabelledData
) -> tuple[Integers, Integers]:
    """Numbers of the training and of the validation samples, each in ascending order.

    The choice depends on the contents alone: it is the same in whatever order the samples stand, and equal contents come to
    the same side. Of each class the same share validates, at least one of two, and something of each trains: a class of one
    sample in every fold. Folds are dealt out class after class, each going on where the last one ended, so that they differ
    by one content at most.

    Args:
        digests: of each sample's content, (n,).
        labels: of each sample, (n,); None where there are no classes.
        section: `val_fraction`, or `folds` and `fold`.

    Raises:
        DataError: if there are fewer contents to validate on than folds.
    """
    classes = np.zeros(len(digests), dtype=np.int64) if labels is None else np.asarray(labels)
    unique, first, group = np.unique(digests, return_index=True, return_inverse=True)
    chosen = np.zeros(len(unique), dtype=bool)
    order = np.argsort(mix64(unique ^ np.uint64(key_of(len("validation")))), kind="stable")
    by_class = [order[classes[first[order]] == label] for label in np.unique(classes)]
    divisible = [members for members in by_class if len(members) > 1]
    if section.folds is not None and section.fold is not None:
        dealt = np.concatenate([*divisible, np.empty(0, dtype=np.int64)])
        _check_folds(section.folds, len(dealt), section.path, labels is not None)
        chosen[dealt[section.fold - 1 :: section.folds]] = True
    else:
        for members in divisible:
            wanted = max(1, round(section.val_fraction * len(members)))
            chosen[members[: min(wanted, len(members) - 1)]] = True
    validates = chosen[group]
    return np.flatnonzero(~validates), np.flatnonzero(validates)


def _check_folds(folds: int, n: int, path: str | None, has_classes: bool) -> None:
    if n >= folds:
        return
    of = "different samples in classes of two or more" if has_classes else "different samples"
    way_out = f"at most data.folds={n}" if n > 1 else "drop data.folds, or add samples"
    raise DataError(f"{path or 'the data'}: {n} {of} are too few for data.folds={folds} validation parts; {way_out}")


class Duplicates(NamedTuple):
    """Samples of one split whose content stands in another split too."""

    split: Split
    other: Split
    shared: int
    """So many samples of the split."""
    size: int
    """Of the split."""
    sample: int
    """Number of the first of them, and its twin's in the other split."""
    twin: int


def duplicates(digests: Mapping[Split, Digests]) -> Iterable[Duplicates]:
    """Which splits share contents: validation and test against training, test against validation."""
    for split, other in (("val", "train"), ("test", "train"), ("test", "val")):
        if split not in digests or other not in digests:
            continue
        here, there = digests[split], digests[other]  # type: ignore[index]
        twice = np.isin(here, there)
        if twice.any():
            sample = int(np.flatnonzero(twice)[0])
            twin = int(np.flatnonzero(there == here[sample])[0])
            yield Duplicates(split, other, int(twice.sum()), len(here), sample, twin)  # type: ignore[arg-type]
