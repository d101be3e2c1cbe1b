"""How a set is divided where it brings no validation split, and samples that stand in two splits."""

from __future__ import annotations

import numpy as np
import pytest

from lm_train.data.splits import digest_of, divide, duplicates
from lm_train.recipe import ImageData


def digests(n: int) -> np.ndarray:
    return np.array([digest_of(str(i).encode()) for i in range(n)], dtype=np.uint64)


def test_each_class_gives_the_same_share() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    train, val = divide(digests(160), labels, ImageData(val_fraction=0.2))
    assert sorted([*train, *val]) == list(range(160))
    assert np.bincount(labels[val]).tolist() == [20, 10, 2]


def test_contents_alone_decide() -> None:
    labels = np.arange(60) % 3
    some, shuffled = digests(60), np.random.default_rng(0).permutation(60)
    _, val = divide(some, labels, ImageData())
    _, again = divide(some[shuffled], labels[shuffled], ImageData())
    assert set(some[val]) == set(some[shuffled][again])


def test_equal_contents_come_to_one_side() -> None:
    twice = np.concatenate([digests(40), digests(40)])
    train, val = divide(twice, None, ImageData(val_fraction=0.3))
    assert not set(twice[train]) & set(twice[val])
    assert len(val) == 24


def test_folds_cover_everything_once() -> None:
    labels = np.repeat([0, 1], [33, 17])
    parts = [divide(digests(50), labels, ImageData(folds=5, fold=i))[1] for i in range(1, 6)]
    assert sorted(np.concatenate(parts)) == list(range(50))
    assert {len(p) for p in parts} == {10, 11, 9} or {len(p) for p in parts} <= {9, 10, 11}


@pytest.mark.parametrize("n", [1, 2])
def test_a_class_of_one_trains(n: int) -> None:
    train, _ = divide(digests(n), None, ImageData())
    assert len(train) == 1


def test_duplicates_are_found() -> None:
    whole = digests(20)
    (found,) = duplicates({"train": whole[:10], "test": np.array([whole[15], whole[3], whole[3]], dtype=np.uint64)})
    assert (found.split, found.other, found.shared, found.size, found.sample, found.twin) == (
        "test",
        "train",
        2,
        3,
        1,
        3,
    )
