"""Names, numbers and weights of classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from lm_train.data.batches import Integers
from lm_train.errors import DataError


def class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """The different labels: whole numbers by size, names by the alphabet.

    >>> class_names(["10", "2", "2"]), class_names(["b", "a", "10"])
    (('2', '10'), ('10', 'a', 'b'))
    """
    names = set(labels)
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def check_classes(names: Sequence[str], labels: Integers, source: str, samples: str) -> None:
    """Ends at a set that cannot teach all its classes.

    Args:
        names: of the classes, (k,).
        labels: of the training samples, (n,).
        source: of the samples, for the message.
        samples: what they are: images, texts.

    Raises:
        DataError: if there is one class only, or one that has no training sample.
    """
    if len(names) < 2:
        raise DataError(f"{source}: only one class, {names[0]!r}; a classification needs two")
    without = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
    if len(without):
        named = ", ".join(repr(names[number]) for number in without[:5]) + (", ..." if len(without) > 5 else "")
        raise DataError(
            f"{source}: empty class: none of the training {samples} is of {named}; add {samples} of it, or take it out of "
            "the names of the classes"
        )


def balanced_weights(labels: Integers, n_classes: int) -> npt.NDArray[np.float64]:
    """Weight n / (k n_c) of each class c, (k,): every class weighs the same in sum, and a sample 1 on average.

    Args:
        labels: of the training samples, (n,).
        n_classes: k.
    """
    counts = np.bincount(labels, minlength=n_classes)
    return len(labels) / (n_classes * np.maximum(counts, 1))


def total_weight(weights: npt.NDArray[np.float64]) -> float:
    """The sum of the samples' weights as the batches carry them, in 32 bits: the numbers by which their losses are multiplied."""
    return float(weights.astype(np.float32).sum(dtype=np.float64))
