"""Which block a position takes: mixtures in their proportion, windows that hold every sample, the order of a single source."""

from __future__ import annotations

import numpy as np
import pytest

from lm_train.data.mixing import BlockOrder, Mixture, Part, permute_in_windows, train_blocks
from lm_train.data.order import SampleOrder, key_of

WEIGHTS = [[1], [2, 2], [0.7, 0.2, 0.1], [5, 3, 1, 1, 0.01], [0.333, 0.5, 0.167], [123_456, 777, 99_999], [1e-6, 1]]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_source_has_its_share_to_within_one_at_any_position(weights: list[float]) -> None:
    mixture = Mixture(weights)
    shares = np.array(weights) / sum(weights)
    assert mixture.counts / mixture.period == pytest.approx(shares, abs=1e-4), "long weights are rounded to this"
    positions = np.arange(2 * mixture.period + 7)
    sources, numbers = mixture.place(positions)
    for number in range(len(weights)):
        mine = sources == number
        assert np.array_equal(numbers[mine], np.arange(mine.sum())), "its own positions come in order, without a gap"
        due = (positions + 1) * mixture.counts[number] / mixture.period
        assert np.abs(np.cumsum(mine) - due).max() < 1


def test_a_mixture_answers_far_out_as_at_the_start() -> None:
    mixture = Mixture([0.7, 0.2, 0.1])
    sources, numbers = mixture.place(np.array([10**15, 10**15 + 1]))
    assert sources.tolist() == mixture.place(np.array([0, 1]))[0].tolist()
    assert numbers[0] == 10**14 * mixture.counts[sources[0]]


@pytest.mark.parametrize("size", [1, 2, 5, 17, 100, 1001])
@pytest.mark.parametrize(("chunk", "chunks"), [(1, 1), (3, 2), (7, 5), (64, 4)])
def test_a_permutation_in_windows_is_one(size: int, chunk: int, chunks: int) -> None:
    found = permute_in_windows(np.arange(size), size, key_of(3, size), chunk, chunks)
    assert np.array_equal(np.sort(found), np.arange(size))


def test_a_window_needs_few_places_and_shuffles_inside() -> None:
    chunk, chunks, size = 50, 4, 10_020
    found = permute_in_windows(np.arange(size), size, 7, chunk, chunks)
    places = [set((found[start : start + 200] // chunk).tolist()) for start in range(0, 9_800, 200)]
    assert {len(each) for each in places} == {4}
    assert (np.diff(found) == 1).sum() < size / 20
    assert any(np.diff(sorted(each)).min() > 1 for each in places), "neighbouring windows are drawn from all over"


def test_one_source_is_ordered_as_ever() -> None:
    """Runs on text that is not prepared go on with the order they began with."""
    tokens, size = 5003, 7
    order, plain = BlockOrder(11, size, [Part(tokens)]), SampleOrder(11, train_blocks(tokens, size))
    positions = np.arange(3 * plain.size)
    epochs, samples = plain.samples(positions)
    offsets = np.array([key_of(11, int(e), size) % size if e else 0 for e in epochs])
    found = order.at(0, len(positions))
    assert np.array_equal(found[0], epochs)
    assert np.array_equal(found[1], samples)
    assert np.array_equal(found[2], samples * size + offsets)


def test_the_order_is_the_same_however_it_is_asked() -> None:
    order = BlockOrder(1, 4, [Part(9_000, 3), Part(500, 1, chunk=8, chunks_a_window=2), Part(40, 1)])
    whole = [np.concatenate(each) for each in zip(*(order.at(i * 1000, 1000) for i in range(40)), strict=True)]
    for first, count in ((0, 1), (4090, 12), (4096, 4096), (100, 35_000), (39_999, 1)):
        for found, wanted in zip(order.at(first, count), whole, strict=True):
            assert np.array_equal(found, wanted[first : first + count])


def test_each_source_has_epochs_of_its_own_and_each_block_once_in_them() -> None:
    parts = [Part(900, 5), Part(100, 3), Part(333, 2)]
    order = BlockOrder(2, 4, parts)
    epochs, samples, starts = order.at(0, 20_000)
    first_block, first_token = 0, 0
    for part, count in zip(parts, order.blocks, strict=True):
        mine = (samples >= first_block) & (samples < first_block + count)
        assert mine.sum() == pytest.approx(20_000 * part.weight / 10, abs=1)
        for epoch in range(int(epochs[mine].max())):
            now = mine & (epochs == epoch)
            assert sorted(samples[now]) == list(range(first_block, first_block + count))
            assert len({int(s) % 4 for s in starts[now] - first_token}) == 1
        assert starts[mine].min() >= first_token
        assert starts[mine].max() + 5 <= first_token + part.tokens, "the last target is the source's own"
        first_block, first_token = first_block + count, first_token + part.tokens
    again = {order.at(0, 20_000)[0][i] for i in range(3)}
    assert again <= {0}
