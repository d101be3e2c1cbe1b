"""What went wrong in a run's steps and what was done about it: `anomalies.jsonl` of the run folder. Free of torch.

    {"step":12,"what":"nonfinite","loss":"nan","grad_norm":"nan","ranks":[1],"samples":[[0,7],[0,3]]}
    {"step":14,"what":"rollback","reason":"nonfinite","first":12,"skipped":[[88,112]]}

    what     "nonfinite" or "spike": the update of the step was withheld; "rollback": after several of them in a row, from
             step `first` to `step`, the run went back to its newest checkpoint
    ranks    whose own loss was not finite; none where only the gradient was
    samples  epoch and id of each sample of the global batch, those of `ranks` alone where there are some
    skipped  the global positions of those steps' batches, which the run leaves out from then on; see `data.order.Skipped`

A start drops the rows of steps that it does again, but for the rollbacks: they hold for every start from before them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_train.errors import OutputError
from lm_train.runs import read_jsonl, write_atomically

AGAIN_STEPS = 100
"""A run that must go back again within so many steps behind the ones it has left out is not helped by leaving out data."""


class RollBackRow(NamedTuple):
    """One return to a checkpoint."""

    reason: str
    first: int
    """The first step of those withheld in a row."""
    step: int
    """The last of them."""
    skipped: tuple[tuple[int, int], ...]
    """Global positions."""

    def row(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "what": "rollback",
            "reason": self.reason,
            "first": self.first,
            "skipped": self.skipped,
        }


def append(file: Path, row: dict[str, Any]) -> None:
    """Adds a row, on disk when this returns.

    Raises:
        OutputError: if it cannot be written.
    """
    try:
        with file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(row, separators=(",", ":")) + "\n")
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as error:
        raise OutputError(f"{file}: {error.strerror}") from None


def cut(file: Path, step: int) -> None:
    """Drops the rows of withheld updates behind optimizer step `step`, which are about to be made again."""
    if file.exists():
        kept = [row for row in read_jsonl(file) if row.get("what") == "rollback" or row.get("step", 0) <= step]
        write_atomically(file, "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in kept))


def rollbacks(file: Path) -> list[RollBackRow]:
    """In the order in which they came."""
    rows = [row for row in read_jsonl(file) if row.get("what") == "rollback"]
    return [
        RollBackRow(row["reason"], row["first"], row["step"], tuple((a, b) for a, b in row["skipped"])) for row in rows
    ]


def ahead(rows: Sequence[RollBackRow], position: int) -> list[tuple[int, int]]:
    """What those rows say is left out from a global position on."""
    ranges = [(max(start, position), stop) for row in rows for start, stop in row.skipped]
    return [(start, stop) for start, stop in ranges if start < stop]


class Streak(NamedTuple):
    """Updates withheld in a row, up to now."""

    first: int
    """The first step of them."""
    in_all: int
    nonfinite: int
    """How many of them for a value that was not finite."""

    @classmethod
    def of(cls, state: dict[str, int] | None) -> Streak | None:
        return None if state is None else cls(state["first"], state["in_all"], state["nonfinite"])

    def patience_is_over(self, nonfinite_patience: int | None, spike_patience: int | None) -> bool:
        over_nonfinite = nonfinite_patience is not None and self.nonfinite >= nonfinite_patience
        return over_nonfinite or (spike_patience is not None and self.in_all >= spike_patience)
