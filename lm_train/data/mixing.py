"""Which block of tokens a position takes: several sources mixed by weight, each shuffled, all of it a pure function.

Nothing here has a state: position 10 and position 10**12 cost the same, and any process may ask for any of them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from lm_train.data.order import Integers, key_of, permute

_CHUNK = 4096
"""Positions that are looked up together: numpy's cost is by the call more than by the number, and no fetch shall wait long."""
_KEPT = 8
_LONGEST_PERIOD = 10_000
"""Weights are rounded to parts of this where their exact ratio needs a longer pattern."""


@dataclass(frozen=True)
class Part:
    """One source of a mixture."""

    tokens: int
    weight: float = 1.0
    chunk: int | None = None
    """Blocks that stay together when an epoch is shuffled in windows, for a source that is fetched piece by piece; None:
    every block by itself."""
    chunks_a_window: int = 1


def train_blocks(tokens: int, block_size: int) -> int:
    """Blocks of an epoch; one block is left over so that later epochs may start anywhere inside the first."""
    return max(0, (tokens - block_size) // block_size)


class Mixture:
    """Deals positions out to sources by weight, in a pattern that repeats.

    After any number of positions each source has had its share to within one (Tijdeman 1980, "The chairman assignment
    problem", Discrete Mathematics 32), so that between any two positions its share holds to within two.

    Args:
        weights: above 0; only their ratio matters.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = np.array(_whole(weights), dtype=np.int64)
        """Positions of each source in one period."""
        self.period = int(self.counts.sum())
        self._source = np.zeros(self.period, dtype=np.int64)
        if len(self.counts) > 1:
            self._source[:] = _chairmen(self.counts.tolist())
        self._before = np.zeros(self.period, dtype=np.int64)
        for number, count in enumerate(self.counts):
            self._before[self._source == number] = np.arange(count)

    def place(self, positions: Integers) -> tuple[Integers, Integers]:
        """Source of each position, and how many positions that source had before it."""
        periods, slots = np.divmod(positions, self.period)
        sources = self._source[slots]
        return sources, periods * self.counts[sources] + self._before[slots]


def _whole(weights: Sequence[float]) -> list[int]:
    exact = [Fraction(str(weight)) for weight in weights]
    multiple = math.lcm(*(each.denominator for each in exact))
    counts = [int(each * multiple) for each in exact]
    common = math.gcd(*counts)
    counts = [count // common for count in counts]
    if sum(counts) > _LONGEST_PERIOD:
        total = sum(exact)
        wanted = [each / total * _LONGEST_PERIOD for each in exact]
        counts = [max(1, math.floor(each)) for each in wanted]
        by_remainder = sorted(range(len(counts)), key=lambda i: (counts[i] - wanted[i], i))
        for i in by_remainder[: max(0, _LONGEST_PERIOD - sum(counts))]:
            counts[i] += 1
    return counts


def _chairmen(counts: list[int]) -> list[int]:
    """Tijdeman's pattern: of the sources that may have the next slot, it goes to the one that must have one soonest."""
    period, k = sum(counts), len(counts)
    # whole numbers: everything times 2 (k - 1) period
    scale, had, slots = 2 * (k - 1), [0] * k, []
    for n in range(1, period + 1):
        best, deadline = -1, Fraction(0)
        for i, count in enumerate(counts):
            owed = scale * (count * n - had[i] * period)  # what its share lacks
            if owed >= period:
                latest = Fraction(scale * period - period - owed, count)
                if best < 0 or latest < deadline:
                    best, deadline = i, latest
        had[best] += 1
        slots.append(best)
    return slots


def permute_in_windows(positions: Integers, size: int, key: int, chunk: int, chunks_a_window: int) -> Integers:
    """Where a keyed permutation of range(size) sends each position, so that neighbouring positions need few places.

    Chunks of neighbouring samples are permuted; so many of them in a row make a window, in which all samples are shuffled.
    What makes no full window at the end joins the last one; what makes no full chunk stands there as well.
    """
    full = size // chunk
    if full < 2:
        return permute(positions, size, key)
    windows = max(1, full // chunks_a_window)
    length = chunk * chunks_a_window
    numbers = np.minimum(positions // length, windows - 1)
    within = np.empty_like(positions)
    for number in np.unique(numbers).tolist():
        start, chosen = number * length, numbers == number
        held = length if number < windows - 1 else size - start
        within[chosen] = start + permute(positions[chosen] - start, held, key_of(key, number))
    slots, offsets = np.divmod(within, chunk)
    whole = slots < full
    slots[whole] = permute(slots[whole], full, key_of(key, full, chunk))
    return slots * chunk + offsets


class BlockOrder:
    """The blocks of T + 1 tokens that positions take, of sources whose tokens lie one source after another.

    A position is the number of samples that were handed out before it. Within an epoch of a source each of its blocks comes
    once. In a source's first epoch its blocks begin at its first token; in later ones elsewhere in the first block, so that
    they are not cut alike again.

    Args:
        seed: the recipe's.
        block_size: T.
        parts: the sources, each of which has a block at least.
    """

    def __init__(self, seed: int, block_size: int, parts: Sequence[Part]) -> None:
        self.seed, self.block_size, self.parts = seed, block_size, tuple(parts)
        self.blocks = [train_blocks(part.tokens, block_size) for part in parts]
        assert all(self.blocks)
        self.size = sum(self.blocks)
        self.mixture = Mixture([part.weight for part in parts])
        self._first_block = np.concatenate(([0], np.cumsum(self.blocks)))
        self._first_token = np.concatenate(([0], np.cumsum([part.tokens for part in parts])))
        self._seeds = [seed] if len(parts) == 1 else [key_of(seed, number, len(parts)) for number in range(len(parts))]
        self._chunks: dict[int, tuple[Integers, Integers, Integers]] = {}
        self._lock = threading.Lock()

    def at(self, first: int, count: int) -> tuple[Integers, Integers, Integers]:
        """Of the positions first to first + count: epoch of the source, number of the block among those of all sources, and
        its first token among the tokens of all sources; (count,) each, not to be written to."""
        number, inside = divmod(first, _CHUNK)
        if inside + count <= _CHUNK:
            epochs, samples, starts = self._chunk(number)
            return epochs[inside : inside + count], samples[inside : inside + count], starts[inside : inside + count]
        if count > _KEPT * _CHUNK:
            return self._looked_up(np.arange(first, first + count))
        chunks = [self._chunk(each) for each in range(number, (first + count - 1) // _CHUNK + 1)]
        epochs, samples, starts = (np.concatenate(each)[inside : inside + count] for each in zip(*chunks, strict=True))
        return epochs, samples, starts

    def samples(self, positions: Integers) -> tuple[Integers, Integers]:
        """Epoch and block of any positions."""
        epochs, samples, _ = self._looked_up(positions)
        return epochs, samples

    def replacement(self, epoch: int, sample: int, attempt: int) -> tuple[int, int]:
        """Another block of the same source in place of one that cannot be read, and its first token."""
        part = int(np.searchsorted(self._first_block, sample, side="right")) - 1
        other = key_of(self._seeds[part], epoch, sample, attempt) % self.blocks[part]
        start = other * self.block_size + self._offset(part, epoch)
        return int(self._first_block[part]) + other, int(self._first_token[part]) + start

    def _chunk(self, number: int) -> tuple[Integers, Integers, Integers]:
        found = self._chunks.get(number)
        if found is None:
            found = self._looked_up(np.arange(number * _CHUNK, (number + 1) * _CHUNK))
            with self._lock:  # batches are made in one thread and told of in another
                while len(self._chunks) >= _KEPT:
                    self._chunks.pop(next(iter(self._chunks)))
                self._chunks[number] = found
        return found

    def _looked_up(self, positions: Integers) -> tuple[Integers, Integers, Integers]:
        sources, numbers = self.mixture.place(positions)
        epochs, samples, starts = (np.empty_like(positions) for _ in range(3))
        for part, blocks in enumerate(self.blocks):
            mine = sources == part if len(self.blocks) > 1 else slice(None)
            passes, within = np.divmod(numbers[mine], blocks)
            found, offsets = np.empty_like(within), np.empty_like(within)
            for epoch in np.unique(passes).tolist():
                now = passes == epoch
                found[now] = self._shuffled(part, epoch, within[now])
                offsets[now] = self._offset(part, epoch)
            epochs[mine], samples[mine] = passes, found + self._first_block[part]
            starts[mine] = found * self.block_size + offsets + self._first_token[part]
        return epochs, samples, starts

    def _shuffled(self, part: int, epoch: int, within: Integers) -> Integers:
        key, size, chunk = key_of(self._seeds[part], epoch), self.blocks[part], self.parts[part].chunk
        if chunk is None:
            return permute(within, size, key)
        return permute_in_windows(within, size, key, chunk, self.parts[part].chunks_a_window)

    def _offset(self, part: int, epoch: int) -> int:
        return key_of(self._seeds[part], epoch, self.block_size) % self.block_size if epoch else 0
