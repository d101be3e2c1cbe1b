"""Streams, whose samples can only be read one after another: what a run that goes on later makes of them.

A stream of the `datasets` package can say where it is and be told so (huggingface.co/docs/datasets/stream), and so goes on at
once: its state stands in the checkpoint. It is tried on a copy before the first step: told the state behind its first batch,
it must give the second one again. The training reads a copy of its own, since streams that were made of one share what keeps
their place, and a validation would move it. Any other stream, one with a buffer to shuffle in, whose content its state does
not have, and one that processes of a loader read, is read again up to the place.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

_REMEMBERED = 4
"""Places of the latest step boundaries that are kept."""


def is_stream(loader: DataLoader[Any]) -> bool:
    """Whether its batches can only be read one after another."""
    return isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None


class Place(NamedTuple):
    """Where a stream was after so many rounds of micro batches; JSON values."""

    rounds: int
    epoch: int
    state: dict[str, Any]


class Places:
    """A stream's latest places.

    Args:
        loader: the training's own, of a stream that can say where it is.
        identity: of the stream, as long as what a place means is the same.
    """

    def __init__(self, loader: DataLoader[Any], identity: str) -> None:
        self.loader, self.identity = loader, identity
        self._dataset: Any = loader.dataset
        self._latest: list[Place] = []

    def note(self, rounds: int, epoch: int) -> None:
        """So many rounds have been read, the last one in this epoch."""
        self._latest = [*self._latest[1 - _REMEMBERED :], Place(rounds, epoch, self._dataset.state_dict())]

    def last(self, rounds: int) -> Place | None:
        """After so many rounds, or fewer, where more were read ahead; None if it is not known any more."""
        return next((place for place in reversed(self._latest) if place.rounds <= rounds), None)

    def go_to(self, state: dict[str, Any]) -> None:
        """The next iteration goes on there."""
        self._dataset.load_state_dict(state)


def places_of(loader: DataLoader[Any]) -> Places | None:
    """Of a stream that can say where it is, over a loader for the training alone; None of any other."""
    package = sys.modules.get("datasets")  # who gives such a stream has imported it
    dataset: Any = loader.dataset
    if package is None or not isinstance(dataset, package.IterableDataset) or type(loader) is not DataLoader:
        return None
    if loader.num_workers > 0 or any(_buffers(dataset)):
        return None
    try:
        trial = _alike(loader)
        batches = iter(trial)
        first = next(batches)
        state = trial.dataset.state_dict()  # type: ignore[attr-defined]
        second = next(batches)
        again = _alike(loader)
        again.dataset.load_state_dict(json.loads(json.dumps(state)))  # type: ignore[attr-defined]
        if not _equal(next(iter(again)), second):
            return None
        shards = getattr(dataset, "num_shards", getattr(dataset, "n_shards", None))
        identity = hashlib.blake2b(f"{_structure(state)} {shards} {first}".encode(), digest_size=8).hexdigest()
        return Places(_alike(loader), identity)
    except Exception:  # of the user's code: it cannot, then; what is wrong with it the training will tell
        return None


def _alike(loader: DataLoader[Any]) -> DataLoader[Any]:
    return DataLoader(
        copy.deepcopy(loader.dataset),
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        drop_last=loader.drop_last,
        pin_memory=loader.pin_memory,
    )


def _structure(state: Any) -> Any:
    """What a state is made of, without the numbers in it."""
    if isinstance(state, dict):
        return {key: value if key == "type" else _structure(value) for key, value in sorted(state.items())}
    return [_structure(value) for value in state] if isinstance(state, list) else None


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
    return (
        part.generator for part in _parts(dataset) if isinstance(getattr(part, "generator", None), np.random.Generator)
    )


def _buffers(dataset: Any) -> Iterator[int]:
    """Sizes, less one, of those in which such a stream shuffles."""
    return ((getattr(part, "buffer_size", None) or 1) - 1 for part in _parts(dataset))


def _parts(dataset: Any) -> Iterator[Any]:
    part = getattr(dataset, "_ex_iterable", None)
    while part is not None:
        yield part
        part = getattr(part, "ex_iterable", None)


def _is_unseeded(generator: np.random.Generator) -> bool:
    """Whether it was seeded by the system: with 128 random bits, where a person gives a small number."""
    entropy = getattr(generator.bit_generator.seed_seq, "entropy", None)
    return isinstance(entropy, int) and entropy >= 1 << 64
