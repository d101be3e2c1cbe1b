"""The last optimizer step of a run: one object that schedule, data, loop, progress and checkpoints all read.

With `trainer.max_steps=auto` the plan's number is an estimate, and the measured speed corrects it on the way. Each correction
is a fact of the run: it counts after the step at which it was made, is written to `budget.jsonl` and into every checkpoint,
and a start that does those steps again makes it again at the same step, so that they have the same learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

Correction = tuple[int, int]
"""The step behind which it counts, and the last step from then on."""
ENDLESS = 1 << 40
"""Steps that no run does: the data of a run whose end may move."""


class Horizon:
    """Where the run ends.

    Args:
        max_steps: the last step as far as is known now.
        moves: whether it may still be corrected.
        recorded: corrections that an earlier start has made at steps which this one does again.
    """

    def __init__(self, max_steps: int, moves: bool = False, recorded: Iterable[Correction] = ()) -> None:
        self.max_steps, self.moves = max_steps, moves
        self._recorded = sorted(recorded)

    @property
    def furthest(self) -> int:
        """The step beyond which no data are needed, wherever the end will be."""
        return ENDLESS if self.moves else self.max_steps

    @property
    def repeats(self) -> bool:
        """Whether corrections of an earlier start are still ahead; until then no others are made."""
        return bool(self._recorded)

    def reach(self, step: int) -> bool:
        """At the boundary behind `step`: makes the correction that an earlier start has made here; whether there was one."""
        before = self.max_steps
        while self._recorded and self._recorded[0][0] <= step:
            self.max_steps = self._recorded.pop(0)[1]
        return self.max_steps != before

    def move(self, max_steps: int) -> None:
        assert self.moves, "a fixed end"
        self.max_steps = max_steps

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"max_steps": self.max_steps, "moves": self.moves}


def recorded_after(step: int, horizons: Sequence[Sequence[Correction]]) -> list[Correction]:
    """The corrections behind `step` that were in force last.

    Args:
        step: of the checkpoint from which the run goes on.
        horizons: the corrections of each start, in the order of the starts: one that went back has replaced what was behind it.
    """
    found: list[Correction] = []
    for corrections in horizons:
        if corrections:
            found = [c for c in found if c[0] < corrections[0][0]] + list(corrections)
    return [c for c in found if c[0] > step]


def steps_of_epochs(epochs: float, passes_a_step: float) -> int:
    """Steps, rounded up, that pass `epochs` times over the training split.

    Args:
        passes_a_step: the part of the split that a step uses.
    """
    return max(1, math.ceil(epochs / passes_a_step - 1e-9))


def affordable_steps(step: int, seconds: float, step_seconds: float) -> int:
    """The last step that lies within `seconds` from the boundary behind `step`; at least the next one."""
    return step + max(1, int(seconds / step_seconds))
