"""Streams, whose samples can only be read one after another: what a run that goes on later makes of them.

A data set that can say where it is and be told so, as those of the `datasets` package can (`state_dict` and `load_state_dict`;
huggingface.co/docs/datasets/stream), goes on there at once: its state stands in the checkpoint. Whether that is true is
tried on a copy before the first step: told the state behind its first batch, it must give the second one again. Any other
stream, and one that processes of a loader read, is read again up to the place.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

_REMEMBERED = 64
"""Places of the latest rounds that are kept: the loop fetches a few batches before it has taken the step of the first."""


def is_stream(loader: DataLoader[Any]) -> bool:
    """Whether its batches can only be read one after another."""
    return isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None


class Places:
    """Where a stream was after each of the latest rounds of micro batches.

    Args:
        loader: of a stream that `says_where_it_is`.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.dataset: Any = loader.dataset
        self._latest: dict[int, tuple[int, Any]] = {}

    def note(self, round_: int, epoch: int) -> None:
        """So many rounds have been read, the last one in this epoch."""
        self._latest[round_] = epoch, self.dataset.state_dict()
        self._latest.pop(round_ - _REMEMBERED, None)

    def after(self, round_: int) -> dict[str, Any] | None:
        """JSON values for `go_to`; None if it is not known any more."""
        found = self._latest.get(round_)
        return None if found is None else {"epoch": found[0], "state": found[1]}

    def go_to(self, place: dict[str, Any]) -> int:
        """The next iteration goes on there; the epoch that this place is in."""
        self.dataset.load_state_dict(place["state"])
        return int(place["epoch"])


def says_where_it_is(loader: DataLoader[Any]) -> bool:
    """Whether a stream, told a state of its own, gives the same samples again; tried on a copy with its first two batches."""
    dataset: Any = loader.dataset
    can = callable(getattr(dataset, "state_dict", None)) and callable(getattr(dataset, "load_state_dict", None))
    if not can or loader.num_workers > 0:
        return False
    try:
        first = _alike(loader)
        batches = iter(first)
        next(batches)
        state = first.dataset.state_dict()  # type: ignore[attr-defined]
        expected = next(batches)
        again = _alike(loader)
        again.dataset.load_state_dict(json.loads(json.dumps(state)))  # type: ignore[attr-defined]
        return _equal(next(iter(again)), expected)
    except Exception:  # of the user's code: it cannot, then; what is wrong with it the training will tell
        return False


def _alike(loader: DataLoader[Any]) -> DataLoader[Any]:
    return DataLoader(
        copy.deepcopy(loader.dataset),
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        drop_last=loader.drop_last,
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(np.array_equal(a, b))


def resume_in_words(dataset: Any, says_where: bool) -> str:
    """What becomes of a run on a stream that is ended and goes on later, for a person, before its first step."""
    if any(map(_is_unseeded, _generators(dataset))):
        return (
            "a stream shuffled without a seed, whose order cannot be made again: a run that goes on later repeats samples and "
            "leaves others out; give shuffle(seed=...)"
        )
    if says_where:
        return "a stream: a run that goes on later tells it its place, and takes the same samples"
    return (
        "a stream: a run that goes on later reads it again up to its place, and takes the same samples only if the stream gives "
        "the same each time"
    )


def _generators(dataset: Any) -> Iterator[np.random.Generator]:
    """Those by which a stream of the `datasets` package shuffles; none of any other stream."""
    part = getattr(dataset, "_ex_iterable", None)
    while part is not None:
        generator = getattr(part, "generator", None)
        if isinstance(generator, np.random.Generator):
            yield generator
        part = getattr(part, "ex_iterable", None)


def _is_unseeded(generator: np.random.Generator) -> bool:
    """Whether it was seeded by the system: with 128 random bits, where a person gives a small number."""
    entropy = getattr(generator.bit_generator.seed_seq, "entropy", None)
    return isinstance(entropy, int) and entropy >= 1 << 64
