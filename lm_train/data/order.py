"""The order of samples: a pure function (seed, epoch, position) -> sample.

A training position is one number, so that any number of processes and loader workers, and a resumed run, see the same
samples at the same steps, and finding the next sample costs the same at the start and at the end of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
_ROUNDS = 6
_CHUNK = 4096
"""Positions that are looked up together: numpy's cost is by the call more than by the number."""
_KEPT = 4


Skipped = tuple[tuple[int, int], ...]
"""Ranges [start, stop) of global positions that a run does not train on, in ascending order, apart from one another."""


def first_position(step: int, size: int, skipped: Skipped = ()) -> int:
    """The global position with which the step behind `step` optimizer steps begins; its batch is the `size` positions from there.

    A step whose batch would reach into a range begins behind it, and the steps after it follow on.

    Args:
        step: optimizer steps before it.
        size: samples of a global batch.
        skipped: what an earlier part of the run has found harmful.
    """
    base, before = 0, 0  # from here on, which is where this step begins, positions run on without a gap
    for start, stop in skipped:
        fitting = (start - base) // size
        if step < before + fitting:
            break
        base, before = stop, before + fitting
    return base + (step - before) * size


def joined(ranges: Iterable[Iterable[int]]) -> Skipped:
    """Ranges of positions as `Skipped` has them: sorted, and those that overlap or touch as one."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted((int(start), int(stop)) for start, stop in ranges):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return tuple(found)


def mix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): a bijection of 64-bit numbers that scatters every bit."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@lru_cache(maxsize=256)
def key_of(*parts: int) -> int:
    """One 64-bit key from several numbers."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = mix64(key ^ np.array([part & (2**64 - 1)], dtype=np.uint64))
    return int(key[0])


def permute(positions: Integers, size: int, key: int) -> Integers:
    """Where a keyed permutation of range(size) sends each position; nothing of length `size` is ever made.

    A Feistel network on the smallest even number of bits that holds `size`, walked until the result is inside
    (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    keys = _round_keys(key)
    result = positions.astype(np.uint64)
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        left, right = result[outside] >> shift, result[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (mix64(right ^ round_key) & mask)
        result[outside] = (left << shift) | right
        outside = result >= np.uint64(size)
    return result.astype(np.int64)


@lru_cache(maxsize=64)
def _round_keys(key: int) -> list[np.uint64]:
    return [np.uint64(key_of(key, round_)) for round_ in range(_ROUNDS)]


class SampleOrder:
    """Shuffled order over `size` samples, epoch after epoch.

    Args:
        seed: the recipe's.
        size: samples in an epoch.
        window: shuffle only inside consecutive windows of so many samples, for a corpus whose end is not there yet;
            None shuffles all.
    """

    def __init__(self, seed: int, size: int, window: int | None = None) -> None:
        assert size > 0
        self.seed = seed
        self.size = size
        self.window = window
        self._chunk = min(_CHUNK, 16 * size)
        self._chunks: dict[int, tuple[Integers, Integers]] = {}

    def samples(self, positions: Integers) -> tuple[Integers, Integers]:
        """Epoch and sample of each global position (the number of samples handed out before it)."""
        if self.window is not None or not len(positions):
            return self._looked_up(positions)
        first, last = int(positions.min()) // self._chunk, int(positions.max()) // self._chunk
        if last - first >= _KEPT:
            return self._looked_up(positions)
        chunks = [self._chunk_of(number) for number in range(first, last + 1)]
        epochs, samples = chunks[0] if len(chunks) == 1 else map(np.concatenate, zip(*chunks, strict=True))
        inside = positions - first * self._chunk
        return epochs[inside], samples[inside]

    def _chunk_of(self, number: int) -> tuple[Integers, Integers]:
        """Epochs and samples of a stretch of positions, kept while batches are taken from it."""
        if number not in self._chunks:
            while len(self._chunks) >= _KEPT:
                del self._chunks[next(iter(self._chunks))]
            self._chunks[number] = self._looked_up(np.arange(number * self._chunk, (number + 1) * self._chunk))
        return self._chunks[number]

    def _looked_up(self, positions: Integers) -> tuple[Integers, Integers]:
        epochs, within = np.divmod(positions, self.size)
        samples = np.empty_like(within)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            samples[chosen] = self._epoch(int(epoch), within[chosen])
        return epochs, samples

    def _epoch(self, epoch: int, within: Integers) -> Integers:
        if self.window is None:
            return permute(within, self.size, key_of(self.seed, epoch))
        result = np.empty_like(within)
        for number in np.unique(within // self.window):
            start = int(number) * self.window
            chosen = within // self.window == number
            size = min(self.window, self.size - start)
            result[chosen] = start + permute(within[chosen] - start, size, key_of(self.seed, epoch, int(number)))
        return result
