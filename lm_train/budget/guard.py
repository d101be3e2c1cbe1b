"""Whether another step still leaves room for the final checkpoint and the way out: a decision from numbers alone.

Time is the seconds for which the start has held its devices. At a step boundary the run may go on by n boundaries where

    now + n m + max(w - m, 3 s sqrt(n)) + u + saves x c + d <= end

with m, s mean and standard deviation of the latest gaps between boundaries, w the worst gap, c an upper estimate of a save
until it is published, u what is left of one under way, d of the way out. A gap is what lies between two boundaries without
that for which saves hold up the training; gaps between steps, between batches of a validation, and from the one to the
other, are kept apart.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["train", "val", "test"]
RECENT = 64
"""Gaps whose mean, deviation and worst count."""
SPEED_STEPS = 256
"""Steps over which the speed is averaged by which the rest of a run is planned."""
RARE_SHARE = 0.02
"""A gap longer than all recent ones is provided for as well, up to this share of the budget."""
UNKNOWN_SAVE_SHARE = 0.05
"""What a save is taken for before one was measured or predicted, as a share of the budget."""
FIRST_SAVE_AT = 0.5
"""Share of the budget after which a start that has not saved yet does: it is safe then, and the save's time is known."""
MOST_OF_FIRST_SAVE = 0.1
"""That save may take so much of what is left to this start, where earlier starts have shown how long one takes."""
SURELY = 1 << 40
"""Boundaries of a run without a limit."""


@dataclass(frozen=True)
class Wish:
    """What the budget asks for at a boundary."""

    stop: bool = False
    save: bool = False
    hold: bool = False
    """From now on only the final save, no more by number."""
    soon: int = 0
    """At the latest after so many boundaries the ranks must ask again; 0: whenever they do."""
    max_steps: int = 0
    """The run's new last step; 0: as it is."""


class Rounds:
    """At which boundaries several ranks ask one another, and at which they act on the answer: the same ones on all ranks.

    What is asked at a boundary is answered at the next, so that the question travels while the step computes.

    Args:
        period_s: seconds between an answer and the next question, about.
    """

    def __init__(self, period_s: float) -> None:
        self.period_s = period_s
        self._count, self._next, self._asked = 0, 1, False

    def boundary(self) -> Literal["ask", "act", "pass"]:
        """What is to be done here."""
        self._count += 1
        if self._asked:
            self._asked = False
            return "act"
        self._asked = self._count >= self._next
        return "ask" if self._asked else "pass"

    def answered(self, seconds: float, soon: int = 0) -> None:
        """Sets the next question, after `act`.

        Args:
            seconds: from boundary to boundary, as all ranks agree.
            soon: see `Wish`; as all ranks agree.
        """
        every = max(1, round(self.period_s / max(seconds, 1e-6)))
        self._next = self._count + (min(every, soon) if soon else every)


class _Gaps:
    """The latest gaps of one kind: kept so that a look at them costs a training loop nothing to speak of."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque()
        self.worst = 0.0
        """Of all, not only the recent ones."""
        self._sum = self._squares = 0.0
        self.count = 0
        self.slow_mean = 0.0
        """Over about `SPEED_STEPS`, all of them weighing the same until there are so many."""

    def add(self, seconds: float) -> None:
        if len(self.recent) == RECENT:
            old = self.recent.popleft()
            self._sum -= old
            self._squares -= old * old
        self.recent.append(seconds)
        self._sum += seconds
        self._squares += seconds * seconds
        self.worst = max(self.worst, seconds)

        self.count += 1
        weight = max(1 / self.count, 1 / SPEED_STEPS)
        self.slow_mean += weight * (seconds - self.slow_mean)

    @property
    def mean(self) -> float:
        return self._sum / len(self.recent)

    @property
    def deviation(self) -> float:
        return math.sqrt(max(0.0, self._squares / len(self.recent) - self.mean**2))


class Guard:
    """Judges step boundaries.

    Args:
        end: seconds of this start after which everything must be over; infinite without a limit.
        shutdown: seconds from the last save to the end of the process, at the most.
        saves: seconds of saves of earlier starts.
        predicted_save: upper end of what a save is predicted to take; counts until one was measured.
    """

    def __init__(
        self, end: float, *, shutdown: float, saves: Sequence[float] = (), predicted_save: float | None = None
    ) -> None:
        self.end, self.shutdown, self.predicted_save = end, shutdown, predicted_save
        self.saves = deque(saves, maxlen=20)
        self.blocked: deque[float] = deque(maxlen=20)
        """Seconds for which the training stood still for each of the latest saves."""
        self.has_saved = False
        self._writing_since: float | None = None
        self._gaps: dict[tuple[Kind, Kind], _Gaps] = {}
        self._last: tuple[Kind, float] | None = None
        self._excluded = 0.0

    def start(self, kind: Kind, now: float) -> None:
        """From here on gaps are measured."""
        self._last, self._excluded = (kind, now), 0.0

    def passed(self, kind: Kind, now: float) -> None:
        """A boundary at the end of a step, or of a batch of an evaluation."""
        if self._last is not None:
            before, since = self._last
            self._gaps.setdefault((before, kind), _Gaps()).add(max(0.0, now - since - self._excluded))
        self.start(kind, now)

    def began_save(self, now: float, blocked: float) -> None:
        """A save between two boundaries, for which the training stood still; it is written from now on.

        Args:
            now: seconds of this start.
            blocked: for which the training stood still.
        """
        self.has_saved = True
        self._excluded += blocked
        self.blocked.append(blocked)
        self._writing_since = now - blocked

    def saved(self, seconds: float) -> None:
        """The save under way is published, so long after it began."""
        self.saves.append(seconds)
        self._writing_since = None

    def still_writing(self, now: float) -> float:
        """Seconds at the most until the save under way is published."""
        return 0.0 if self._writing_since is None else max(0.0, self.save_seconds - (now - self._writing_since))

    @property
    def save_seconds(self) -> float:
        """Upper estimate of a save: the fewer were seen, the more above the longest of them."""
        if not self.saves:
            guess = UNKNOWN_SAVE_SHARE * self.end if math.isfinite(self.end) else 0.0
            return guess if self.predicted_save is None else self.predicted_save
        seen, longest = len(self.saves), max(self.saves)
        spread = 4 * statistics.stdev(self.saves) if seen >= 4 else 0.0
        allowance = 0.3 if seen == 1 else 0.2 if seen < 4 else 0.1
        return max(longest * (1 + allowance), statistics.fmean(self.saves) + spread) + 0.02

    def step_seconds(self, kind: Kind = "train") -> float | None:
        """Mean of the latest gaps of one kind; None before there is one."""
        gaps = self._gaps.get((kind, kind))
        return gaps.mean if gaps else None

    def speed(self) -> float | None:
        """Seconds of a step, over more of them than `step_seconds`."""
        gaps = self._gaps.get(("train", "train"))
        return gaps.slow_mean if gaps else None

    @property
    def mean_blocked_seconds(self) -> float:
        """Of the training, by a save on the way."""
        if self.blocked:
            return statistics.fmean(self.blocked)
        return statistics.fmean(self.saves) if self.saves else self.predicted_save or 0.0

    def boundaries_left(self, now: float, following: Kind = "train", saves: int = 1) -> int:
        """How many boundaries of the kind that follows surely lie inside the budget, with room for the end behind them.

        Args:
            now: seconds of this start.
            following: what the run would do next.
            saves: those that have to be made, the final one included.
        """
        if math.isinf(self.end):
            return SURELY
        mean, deviation, worst = self._gap(following)
        # what is under way must end as well, before the next save or the way out
        room = self.end - now - self.still_writing(now) - saves * self.save_seconds - self.shutdown
        if room <= 0:
            return 0
        if mean <= 0:
            return SURELY
        margin = max(worst - mean, 3 * deviation * math.sqrt(max(1.0, room / mean)))
        if room - margin < mean:  # for one boundary the exact form
            return int(room >= max(worst, mean + 3 * deviation))
        return int((room - margin) / mean)

    def wants_save(self, now: float) -> bool:
        """Whether this start should save now, to be safe and to know how long it takes."""
        if self.has_saved or math.isinf(self.end) or now < FIRST_SAVE_AT * self.end:
            return False
        if self.saves and self.save_seconds > MOST_OF_FIRST_SAVE * self.end:
            return False
        return self.boundaries_left(now, saves=2) >= 1

    def wish(
        self,
        now: float,
        following: Kind,
        *,
        alone: bool,
        saves: int = 1,
        next_save: int | None = None,
        next_validation: int | None = None,
    ) -> Wish:
        """What is to be done at this boundary, or what to ask the other ranks for.

        What several ranks ask here they do at the next boundary, and what they ask next time at least two later.

        Args:
            now: seconds of this start.
            following: what the run would do next.
            alone: one rank, which does at once what it wishes.
            saves: those that the end needs: 0 where the last step is saved already.
            next_save: boundaries until a save that is due by its number; 0: right behind this one.
            next_validation: the same for a validation, behind which a new best is saved.
        """
        least, hold = 1 if alone else 3, False
        left = self.boundaries_left(now, following, saves)
        for due, can_wait in ((next_save, True), (next_validation, False)):
            if due is None or due >= left:
                continue
            # up to that save the room is as it is; beyond, it must be there as well
            with_it = self.boundaries_left(now, following, saves + 1)
            if due >= least:
                left = max(with_it, due)
            elif with_it >= least or not can_wait:
                left = with_it
            else:  # rather a few steps more than two saves one after the other
                hold = left >= least
        soon = 0 if alone or left == SURELY else max(1, left - 2)
        return Wish(stop=left < least, save=self.wants_save(now), hold=hold, soon=soon)

    def _gap(self, following: Kind) -> tuple[float, float, float]:
        """Mean, deviation and worst of the gaps that lead from the last boundary to the kind that follows."""
        before = self._last[0] if self._last is not None else following
        gaps = self._gaps.get((before, following))
        if gaps is None:  # the first of its kind: as long as the longest that another one took
            longest = max((kind.worst for kind in self._gaps.values()), default=0.0)
            return longest, 0.0, longest
        return gaps.mean, gaps.deviation, max(*gaps.recent, min(gaps.worst, RARE_SHARE * self.end), 0.0)
