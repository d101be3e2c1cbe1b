"""Names, numbers and weights of classes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from lm_train.data.batches import Integers


def class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """The different labels: whole numbers by size, names by the alphabet.

    >>> class_names(["10", "2", "2"]), class_names(["b", "a", "10"])
    (('2', '10'), ('10', 'a', 'b'))
    """
    names = set(labels)
    if all(name.lstrip("-").isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def balanced_weights(labels: Integers, n_classes: int) -> npt.NDArray[np.float64]:
    """Weight n / (k n_c) of each class c, (k,): every class weighs the same in sum, and a sample 1 on average.

    Args:
        labels: of the training samples, (n,).
        n_classes: k.
    """
    counts = np.bincount(labels, minlength=n_classes)
    return len(labels) / (n_classes * np.maximum(counts, 1))
