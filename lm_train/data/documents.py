"""Where documents begin among the tokens of a split, so that no sample mixes two of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from lm_train.data.batches import IGNORED, Integers
from lm_train.data.shard_files import Folder
from lm_train.data.shards import Shard, parse_index


class DocumentStarts:
    """First tokens of documents; positions count the tokens of all shards.

    Args:
        shards: each with the folder it lies in; a shard's first token begins a document.
        firsts: first token of each.
    """

    def __init__(self, shards: Sequence[tuple[Folder, Shard]], firsts: Sequence[int]) -> None:
        self.shards, self.firsts = shards, firsts
        self._starts: dict[int, Integers] = {}

    def between(self, after: int, last: int) -> Integers:
        """Positions p at which a document begins, after < p <= last, in ascending order."""
        found = []
        for number in range(bisect_right(self.firsts, after) - 1, bisect_right(self.firsts, last)):
            starts = self._of(number)
            found.append(starts[np.searchsorted(starts, after, "right") : np.searchsorted(starts, last, "right")])
        return np.concatenate(found)

    def count(self, after: Integers, length: int) -> int:
        """Documents that begin at p, after < p <= after + length, over all of `after`."""
        numbers = np.searchsorted(self.firsts, after, "right") - 1
        inside = numbers == np.searchsorted(self.firsts, after + length, "right") - 1
        total = sum(len(self.between(each, each + length)) for each in after[~inside].tolist())
        for number in np.unique(numbers[inside]).tolist():
            mine, starts = after[inside & (numbers == number)], self._of(number)
            ends = np.searchsorted(starts, mine + length, "right")
            total += int((ends - np.searchsorted(starts, mine, "right")).sum())
        return total

    def mark(self, starts: Integers, targets: Integers) -> Integers:
        """Which document of its row each token belongs to, (B, T), counted from 0; a target that stands in the next
        document is not to be predicted.

        Args:
            starts: first token of each row, (B,).
            targets: (B, T), changed in place.
        """
        documents = np.zeros_like(targets)
        size = targets.shape[1]
        for row, start in enumerate(starts.tolist()):
            begins = self.between(start, start + size) - start  # 1 to T
            targets[row, begins - 1] = IGNORED
            documents[row, begins[begins < size]] = 1
        return documents.cumsum(axis=1)

    def _of(self, number: int) -> Integers:
        if number not in self._starts:
            folder, shard = self.shards[number]
            index = parse_index(folder.read(shard.index_name), shard, f"{folder.label}/{shard.index_name}")
            self._starts[number] = np.unique(index[:-1][index[:-1] < shard.tokens]) + self.firsts[number]
        return self._starts[number]
