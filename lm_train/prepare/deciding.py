"""Which documents stay, once all units are done: the first of equal and of nearly equal ones, in the corpus' order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lm_train import signals
from lm_train.data.cache import writing
from lm_train.data.readers import Split
from lm_train.prepare.duplicates import BANDS, Duplicate, Keys, Signatures, equal, nearly_equal
from lm_train.prepare.rules import EXAMPLES, Removed
from lm_train.prepare.units import DoneFile
from lm_train.prepare.work import ShardTask, Task
from lm_train.recipe import PrepareSection


@dataclass
class Decided:
    """All documents in order: the splits after one another, in each its units."""

    task: Task
    units: Mapping[Split, int]
    """How many each split has."""
    tokens: npt.NDArray[np.int64]
    characters: npt.NDArray[np.int64]
    stays: npt.NDArray[np.bool_]
    starts: list[int]
    """First document of each unit, and the number of documents at the end."""
    removed: dict[str, Removed] = field(default_factory=dict)
    """By rules and as duplicates."""
    read: dict[str, int] = field(default_factory=dict)

    def ranges(self, split: Split) -> Iterator[tuple[int, int, int]]:
        """Unit, first document and the one after the last, of each unit of the split."""
        before = 0
        for name, count in self.units.items():
            if name == split:
                for number in range(count):
                    yield number, self.starts[before + number], self.starts[before + number + 1]
            before += count

    def shard_tasks(self, split: Split, shard_tokens: int) -> Iterator[ShardTask]:
        """The documents that stay, in shards; a shard ends with the document that brings it to `shard_tokens`."""
        parts: list[tuple[int, tuple[int, ...]]] = []
        number, size = 0, 0
        for unit, first, end in self.ranges(split):
            chosen = np.flatnonzero(self.stays[first:end])
            while len(chosen):
                sizes = size + np.cumsum(self.tokens[first + chosen])
                here = int(np.searchsorted(sizes, shard_tokens)) + 1
                parts.append((unit, tuple(chosen[:here].tolist())))
                size = int(sizes[min(here, len(sizes)) - 1])
                chosen = chosen[here:]
                if size >= shard_tokens:
                    yield ShardTask(split, number, tuple(parts))
                    parts, number, size = [], number + 1, 0
        if parts:
            yield ShardTask(split, number, tuple(parts))


def decide(task: Task, units: Mapping[Split, int], section: PrepareSection) -> Decided:
    """Reads what the units' files say of their documents, and decides.

    Memory: about 60 bytes a document of the whole corpus, more only for documents that look alike (`nearly_equal`).

    Raises:
        DataError: if a file is missing or damaged.
        OutputError: if the disk has no room for the keys of near duplicates, 128 bytes a document.
    """
    keys, tokens, characters, starts = [], [], [], [0]
    removed: dict[str, Removed] = {rule: Removed() for rule in (*section.cleaning, "empty")}
    read = {"documents": 0, "characters": 0}
    near = section.dedup == "near"
    with ExitStack() as stack:
        with writing(task.folder):
            bands = [stack.enter_context(_band(task.folder, i).open("wb")) for i in range(BANDS if near else 0)]
        for _, file in _files(task, units):
            counted, own_keys, own_bands, length, facts = file.read("tokens", "keys", "bands", "characters", "facts")
            tokens.append(counted)
            keys.append(own_keys)
            characters.append(length)
            starts.append(starts[-1] + len(counted))
            with writing(task.folder):
                for i, out in enumerate(bands):
                    out.write(np.ascontiguousarray(own_bands[:, i]).tobytes())
            for rule, values in facts["removed"].items():
                removed[rule].add(Removed(**values))
            for name in read:
                read[name] += facts["read"][name]
    decided = Decided(
        task, units, np.concatenate(tokens), np.concatenate(characters), np.empty(0, dtype=bool), starts, removed, read
    )
    decided.stays = decided.tokens >= 0
    if section.dedup != "none":
        _drop(decided, "duplicates", equal(np.concatenate(keys), decided.stays))
    if near:
        _drop(decided, "near_duplicates", _nearly_equal(decided, section.near_threshold))
        for i in range(BANDS):
            _band(task.folder, i).unlink()
    return decided


def _nearly_equal(decided: Decided, threshold: float) -> list[Duplicate]:
    held: tuple[int, Signatures] | None = None

    def signature_at(number: int) -> Signatures:
        nonlocal held
        place = int(np.searchsorted(decided.starts, number, side="right")) - 1
        if held is None or held[0] != place:
            signals.check()
            held = place, _file(decided, place).read("signatures")[0]
        return held[1][number - decided.starts[place]]

    def band(i: int) -> Keys:
        signals.check()
        return np.fromfile(_band(decided.task.folder, i), dtype=np.uint64)

    return nearly_equal(band, signature_at, decided.stays, threshold)


def _drop(decided: Decided, rule: str, duplicates: list[Duplicate]) -> None:
    going = np.array([duplicate.number for duplicate in duplicates], dtype=np.int64)
    decided.stays[going] = False
    examples = [
        {"where": _where(decided, number), "equals": _where(decided, first)} for number, first in duplicates[:EXAMPLES]
    ]
    characters = int(decided.characters[going].sum())
    decided.removed[rule] = Removed(len(going), len(going), characters, examples=examples)


def _where(decided: Decided, number: int) -> str:
    place = int(np.searchsorted(decided.starts, number, side="right")) - 1
    facts, rows = _file(decided, place).read("facts", "rows")
    document = number - decided.starts[place]
    return f"{facts['sources'][facts['source'][document]]} at {rows[document]}"


def _file(decided: Decided, place: int) -> DoneFile:
    """The file of a unit by its place in the whole order."""
    for split, count in decided.units.items():
        if place < count:
            return DoneFile(decided.task.file_of(split, place))
        place -= count
    raise AssertionError(place)


def _files(task: Task, units: Mapping[Split, int]) -> Iterator[tuple[Split, DoneFile]]:
    for split, count in units.items():
        for number in range(count):
            signals.check()
            yield split, DoneFile(task.file_of(split, number))


def _band(folder: Path, number: int) -> Path:
    return folder / f"band-{number:02}.bin"


def summary(decided: Decided) -> dict[str, Any]:
    """The manifest's counts: what was read, what each rule removed, what stays."""
    return {
        "read": decided.read,
        "removed": {rule: removed.as_json() for rule, removed in decided.removed.items()},
        "kept": {
            "documents": int(decided.stays.sum()),
            "characters": int(decided.characters[decided.stays].sum()),
        },
    }
