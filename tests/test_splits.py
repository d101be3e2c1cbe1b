"""How a set is divided where it brings no validation split, and samples that stand in two splits."""

from __future__ import annotations

import numpy as np
import pytest

from lm_train.data.splits import digest_of, divide, duplicates
from lm_train.errors import DataError
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
    assert {len(p) for p in parts} == {10}


@pytest.mark.parametrize(("classes", "each", "folds"), [(100, 6, 5), (10, 2, 3), (3, 7, 4)])
def test_folds_are_even_and_so_are_the_classes_in_them(classes: int, each: int, folds: int) -> None:
    labels, some = np.repeat(np.arange(classes), each), digests(classes * each)
    parts = [divide(some, labels, ImageData(folds=folds, fold=i))[1] for i in range(1, folds + 1)]
    sizes = [len(part) for part in parts]
    assert sum(sizes) == classes * each
    assert max(sizes) - min(sizes) <= 1
    counts = np.array([np.bincount(labels[part], minlength=classes) for part in parts])
    assert (counts.max(0) - counts.min(0)).max() <= 1


def test_a_class_of_one_trains_in_every_fold() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2])
    for fold in (1, 2, 3):
        train, val = divide(digests(6), labels, ImageData(folds=3, fold=fold))
        assert 3 in train
        assert len(val)
        assert set(labels[train]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 0, 1, 1, 2], r"d: 4 different samples in classes of two or more are too few .*at most data\.folds=4"),
        ([0, 1, 2, 3, 4], r"drop data\.folds"),
        (None, r"d: 5 different samples are too few .*at most data\.folds=5"),
    ],
)
def test_a_fold_without_validation_samples_is_refused_from_the_first_on(labels: list[int] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        divide(digests(5), labels, ImageData(path="d", folds=6, fold=1))


def test_of_every_class_something_trains_however_large_the_share() -> None:
    train, val = divide(digests(4), [0, 0, 1, 1], ImageData(val_fraction=0.9))
    assert (len(train), len(val)) == (2, 2)


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
