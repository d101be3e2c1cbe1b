"""What the start under way uses: it appends to `budget.jsonl` and knows what is left.

The supervisor opens it, writes that time goes by, and its end; rank 0, on the same machine, writes what the training does.
Each row is one write to the end of the file, so that neither tears the other's.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lm_train.budget.account import Account, Tariff, amounts_in_words, period
from lm_train.errors import OutputError
from lm_train.plan import Plan
from lm_train.runs import RunFolder
from lm_train.slurm import Allocation

VARIABLE = "LM_TRAIN_SPENDING"
"""`NUMBER:SINCE:RESERVE` of the start, for its ranks."""
LONGEST_BEGINNING_S = 15.0
"""What a command takes before it comes here, on a busy machine: Python's start, reading the recipe."""
LAST_RESORT_S, LONGEST_RESORT_S = 0.3, 3.0
"""So long before the budget is used up, at the least and at the most, a start that still goes on is ended by force."""
_counted_until = 0.0


def held_since(allocation: Allocation | None) -> float:
    """Since when, on the monotonic clock, this process holds devices for the run that it is about to start.

    That is since the process began; the second of several runs, since the first one's end. On a plain machine a process that
    is old already has done something else before: `launch/train.sh` an installation, a program of one's own its work.
    """
    age = _process_seconds()
    if allocation is None and age > LONGEST_BEGINNING_S:
        age = 0.0
    return max(_counted_until, time.monotonic() - age)


def _process_seconds() -> float:
    """Age of this process, the shell script before it included; 0 where the system does not tell (proc(5))."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0]) - began)
    except (OSError, ValueError, IndexError):
        return 0.0


class Spending:
    """The start under way, on the side that writes.

    Args:
        folder: of the run.
        plan: devices, price, power, limits.
        number: of this start, from 1.
        since: when it began to hold its devices, on `clock`.
        clock: seconds; the same one for all processes of a machine.
        reserve: seconds that the supervisor needs for its own end.
    """

    def __init__(
        self,
        folder: RunFolder,
        plan: Plan,
        number: int,
        since: float,
        clock: Callable[[], float] = time.monotonic,
        reserve: float = LAST_RESORT_S,
    ) -> None:
        self.file, self.plan, self.number, self.since, self.clock = folder.budget, plan, number, since, clock
        self.tariff = Tariff.of(plan)
        self.account = Account.read(folder, before=number)
        self.before = self.account.used(self.tariff)
        self.end, self.limit = self.account.seconds_left(plan)
        """After so many seconds of this start the budget is used up, by this limit."""
        self.reserve = reserve
        self._last_row = 0.0

    @classmethod
    def begin(
        cls, folder: RunFolder, plan: Plan, since: float, clock: Callable[[], float] = time.monotonic
    ) -> Spending:
        """Opens the account of a start and writes its first row.

        Raises:
            OutputError: if the file cannot be written.
        """
        last = Account.read(folder).last
        # a machine on which Python takes long to begin takes long to end it
        reserve = min(max(LAST_RESORT_S, 0.5 * (clock() - since)), LONGEST_RESORT_S)
        spending = cls(folder, plan, 1 if last is None else last.number + 1, since, clock, reserve)
        _mend(folder.budget)
        spending.note(
            "began",
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            devices=spending.tariff.devices,
            price_per_gpu_hour=spending.tariff.price_per_gpu_hour,
            currency=spending.tariff.currency,
            power_watts=spending.tariff.power_watts,
            limits=plan.limits,
        )
        return spending

    @classmethod
    def joined(cls, folder: RunFolder, plan: Plan, environ: Mapping[str, str] = os.environ) -> Spending | None:
        """In a rank: what its supervisor has begun; None without one."""
        if VARIABLE not in environ:
            return None
        number, since, reserve = environ[VARIABLE].split(":")
        return cls(folder, plan, int(number), float(since), reserve=float(reserve))

    @property
    def variable(self) -> dict[str, str]:
        """For the ranks' environment."""
        return {VARIABLE: f"{self.number}:{self.since!r}:{self.reserve!r}"}

    @property
    def seconds(self) -> float:
        """For which this start has held its devices."""
        return self.clock() - self.since

    def used(self) -> dict[str, float]:
        """Amounts of all starts so far."""
        now = self.tariff.amounts(self.seconds)
        return {name: self.before[name] + now[name] for name in now}

    def used_fraction(self, used: dict[str, float] | None = None) -> float | None:
        """Of the limit that ends the run; None without one.

        Args:
            used: by all starts; None: so far.
        """
        if not self.plan.limits:
            return None
        used = used or self.used()
        return max(used.get(name, 0.0) / limit for name, limit in self.plan.limits.items())

    def left(self) -> float | None:
        """Of the limit that ends the run, in its unit."""
        return self.plan.limits[self.limit] - self.used()[self.limit] if self.limit else None

    def told(self) -> str:
        """`0.0297 of 0.03 h`, for each limit."""
        return amounts_in_words(self.used(), self.plan.limits, self.tariff)

    @property
    def is_over(self) -> bool:
        """Whether this is the last moment to end inside the budget."""
        return self.seconds >= self.end - self.reserve

    def note(self, event: str, **values: Any) -> None:
        """Appends a row.

        Raises:
            OutputError: if the file cannot be written.
        """
        seconds = self.seconds
        row = {"start": self.number, "event": event, "seconds": round(seconds, 3), **values}
        try:
            descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, (json.dumps(row) + "\n").encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise OutputError(f"{self.file}: {error.strerror}") from None
        self._last_row = seconds

    def tick(self) -> None:
        """Writes that time goes by, once in a period."""
        if self.seconds - self._last_row >= period(self._last_row):
            with contextlib.suppress(OutputError):  # the count goes on; the ranks find out what is wrong with the disk
                self.note("held")

    def finish(self, code: int | None = None) -> None:
        """Writes the end of the start; what follows of this process is another start's.

        Args:
            code: what the run ended with, where that is known here.
        """
        global _counted_until
        used = {name: round(value, 9) for name, value in self.used().items()}
        self.note("ended", exit_code=None if code is None else int(code), used=used)
        _counted_until = self.clock()


@contextlib.contextmanager
def rank_spending(folder: RunFolder, plan: Plan, rank: int) -> Iterator[Spending | None]:
    """For rank 0 what its supervisor has begun, or without one an account of its own until the end of the block; else None."""
    if rank != 0:
        yield None
        return
    joined = Spending.joined(folder, plan)
    if joined is not None:
        yield joined
        return
    own = Spending.begin(folder, plan, time.monotonic())
    try:
        yield own
    finally:
        own.finish()


def _mend(file: Path) -> None:
    """Ends a row that a kill has torn, so that the next one stands on a line of its own."""
    try:
        with file.open("rb+") as opened:
            if opened.seek(0, os.SEEK_END) > 0:
                opened.seek(-1, os.SEEK_END)
                if opened.read(1) != b"\n":
                    opened.write(b"\n")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OutputError(f"{file}: {error.strerror}") from None
