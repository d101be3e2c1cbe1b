"""What every start of a run has used, read from `budget.jsonl` of its folder. Nothing in that file is ever taken back.

    {"start": 1, "event": "began", "seconds": 0.4, "time": "...", "devices": 2, "price_per_gpu_hour": 2.5, ...}
    {"start": 1, "event": "held", "seconds": 5.4}                             every few seconds, by the supervisor
    {"start": 1, "event": "training", "seconds": 7.1}                         the first step is done
    {"start": 1, "event": "saved", "seconds": 9.9, "step": 100, "took": 0.3}
    {"start": 1, "event": "horizon", "seconds": 10.2, "step": 120, "max_steps": 912}
    {"start": 1, "event": "stopped", "seconds": 98.7, "step": 890, ...}       the budget leaves no room for another step
    {"start": 1, "event": "ended", "seconds": 99.4, "exit_code": 0, ...}

`seconds` is how long the start has held its devices, by a clock that nobody sets: from the supervisor's start, under Slurm
from the step's, to the supervisor's end. A start without an end was killed, or its node was lost: it counts until its last
row and one period between rows more, the longest it can have gone on in silence.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_train.errors import UsageError
from lm_train.plan import Interval, Plan
from lm_train.runs import RunFolder, read_jsonl

PERIOD_S, LONGEST_PERIOD_S = 5.0, 60.0
"""Between two rows of a start that goes on: the first, and after hours the second."""
FEW_STEPS = 5
"""A start that could not do so many is not worth its beginning."""
UNITS = {"gpu_hours": "GPU-hours", "hours": "h", "kwh": "kWh"}
"""How a person is told an amount; money is told in its currency."""


def period(seconds: float) -> float:
    """Between two rows of a start that has gone on for so long: a month's file can still be read in a moment."""
    return min(max(PERIOD_S, seconds / 500), LONGEST_PERIOD_S)


@dataclass(frozen=True)
class Tariff:
    """What holding a plan's devices uses."""

    devices: int
    """Ranks: GPUs, or CPU processes."""
    price_per_gpu_hour: float | None
    currency: str
    power_watts: float
    """Of one device."""

    @classmethod
    def of(cls, plan: Plan) -> Tariff:
        return cls(plan.world_size, plan.price_per_gpu_hour, plan.currency, plan.power_watts)

    def amounts(self, seconds: float) -> dict[str, float]:
        """What so many seconds use, by the budget's names; no money where nobody has said the price."""
        hours = seconds / 3600
        gpu_hours = self.devices * hours
        amounts = {"gpu_hours": gpu_hours, "hours": hours, "kwh": self.power_watts * gpu_hours / 1000}
        if self.price_per_gpu_hour is not None:
            amounts["money"] = self.price_per_gpu_hour * gpu_hours
        return amounts

    def unit(self, name: str) -> str:
        return UNITS.get(name, self.currency)


@dataclass
class Start:
    """One start of a run, as its rows tell."""

    number: int
    tariff: Tariff
    limits: dict[str, float]
    seconds: float = 0.0
    """Held, as the newest row has it."""
    ended: bool = False
    exit_code: int | None = None
    began_training: float | None = None
    """`seconds` at the end of the first step."""
    left_training: float | None = None
    """`seconds` when everything was saved and only the way out remained."""
    saves: list[float] = field(default_factory=list)
    """Seconds of each save."""
    stopped: dict[str, Any] | None = None
    """The row by which the budget ended it."""
    done: bool = False
    """Its work was done."""
    warned: bool = False
    """A person has been told that most of the budget is used."""
    horizons: list[tuple[int, int]] = field(default_factory=list)
    """Each correction of the run's last step: the step after which it counts, and the new last step."""
    step_seconds: float | None = None
    """Of a step at the end of the training."""

    def take(self, row: dict[str, Any]) -> None:
        """Learns what a row tells."""
        self.seconds = max(self.seconds, float(row["seconds"]))
        match row["event"]:
            case "training":
                self.began_training = float(row["seconds"])
            case "saved":
                self.saves.append(float(row["took"]))
            case "horizon":
                self.horizons.append((int(row["step"]), int(row["max_steps"])))
            case "warned":
                self.warned = True
            case "stopped":
                self.stopped = (self.stopped or {}) | row
            case "left":
                self.left_training = float(row["seconds"])
                self.step_seconds = row.get("step_seconds")
                self.done = bool(row.get("done"))
            case "ended":
                self.ended, self.exit_code = True, row["exit_code"]

    @property
    def held_seconds(self) -> float:
        """What counts: with the silence before its end, if nobody has seen that."""
        return self.seconds if self.ended else self.seconds + period(self.seconds)

    @property
    def shutdown_seconds(self) -> float | None:
        """From the last save to the end, of a start that was stopped: one that is done has more to say."""
        if not self.ended or self.left_training is None or self.done:
            return None
        return self.seconds - self.left_training


class Account:
    """What a run has used so far. Making one writes nothing.

    Args:
        starts: in their order, each over or killed.
    """

    def __init__(self, starts: list[Start]) -> None:
        self.starts = starts

    @classmethod
    def read(cls, folder: RunFolder, before: int | None = None) -> Account:
        """From `budget.jsonl`; empty where there is none. A torn row is left out, as are rows of nobody's start.

        Args:
            before: only the starts before that number, for one that is under way.
        """
        starts: dict[int, Start] = {}
        for row in _rows(folder.budget):
            number = row["start"]
            with contextlib.suppress(KeyError, TypeError, ValueError):  # not as this program writes them
                if row["event"] == "began":
                    starts[number] = Start(number, _tariff(row), dict(row.get("limits", {})))
                if number in starts:
                    starts[number].take(row)
        return cls([start for number, start in sorted(starts.items()) if before is None or number < before])

    @property
    def last(self) -> Start | None:
        return self.starts[-1] if self.starts else None

    def used(self, tariff: Tariff) -> dict[str, float]:
        """Amounts of all starts together, each at its own price; at the present one where its own was not known.

        Args:
            tariff: the present one; without a price the money is left out.
        """
        total = tariff.amounts(0.0)
        for start in self.starts:
            amounts = start.tariff.amounts(start.held_seconds)
            if "money" in total and "money" not in amounts:
                amounts["money"] = amounts["gpu_hours"] * (tariff.price_per_gpu_hour or 0.0)
            for name in total:
                total[name] += amounts[name]
        return total

    def seconds_left(self, plan: Plan) -> tuple[float, str]:
        """How long the plan's devices can be held yet, and the limit that ends it; infinitely long without limits."""
        tariff = Tariff.of(plan)
        used, rates = self.used(tariff), tariff.amounts(1.0)
        left = [
            ((plan.limits[name] - used[name]) / rates[name], name)
            for name in plan.limits
            if rates.get(name, 0.0) > 0  # at no price, money lasts for ever
        ]
        return min(left, default=(float("inf"), ""))

    @property
    def save_seconds(self) -> list[float]:
        """Of the latest saves, over all starts."""
        return [seconds for start in self.starts for seconds in start.saves][-20:]

    def upper_shutdown_seconds(self, otherwise: float) -> float:
        """What the way out takes at the most, going by the slowest so far; `otherwise` before there was one."""
        seen = [s.shutdown_seconds for s in self.starts if s.shutdown_seconds is not None]
        return 1.3 * max(seen) + 0.1 if seen else otherwise

    @property
    def start_seconds(self) -> float:
        """What a start needs before its first step is done, going by those so far; 0 where nobody knows."""
        trained = [s.began_training for s in self.starts if s.began_training is not None]
        return max(trained) if trained else max((s.seconds for s in self.starts), default=0.0)

    @property
    def stopped_by_budget(self) -> bool:
        """Whether the budget ended the last start before its work was done."""
        return self.last is not None and self.last.stopped is not None and not self.last.done

    def needed_seconds(self) -> float:
        """What a start takes that does a few steps and saves them, as far as the earlier ones tell."""
        step = next((s.step_seconds for s in reversed(self.starts) if s.step_seconds is not None), 0.0)
        save = max(self.save_seconds, default=0.0)
        return 1.2 * (self.start_seconds + save) + FEW_STEPS * step + self.upper_shutdown_seconds(0.0)

    def is_spent(self, plan: Plan) -> bool:
        """Whether what is left does not pay for another start."""
        return bool(self.starts) and self.seconds_left(plan)[0] <= self.needed_seconds()

    def enough_for(self, plan: Plan, max_steps: int | None) -> str:
        """`budget.hours=0.061`: limits that let the run go on to `max_steps`; twice the present ones where nobody can tell.

        Args:
            plan: the present limits.
            max_steps: the last step; None where it moves with the budget.
        """
        tariff, last = Tariff.of(plan), self.last
        step = None if last is None or last.stopped is None else last.stopped.get("step")
        words, used = [], self.used(tariff)
        for name, limit in plan.limits.items():
            expected: Interval | None = None if plan.prediction is None else getattr(plan.prediction, name)
            start = tariff.amounts(2 * self.needed_seconds()).get(name, 0.0)
            more = limit if expected is None or max_steps is None else expected.high
            enough = used[name] + max(more, start)
            if step is not None and max_steps is not None and last is not None and last.step_seconds is not None:
                rest = (max_steps - step) * last.step_seconds
                # the way to the first step and out again, and a validation and a test of unknown length
                enough = used[name] + tariff.amounts(1.15 * rest + 2 * self.needed_seconds()).get(name, 0.0)
            if enough > limit:
                words.append(f"budget.{name}={rounded_up(enough):g}")
        return " ".join(words)

    def told(self, plan: Plan) -> str:
        """`0.0297 of 0.03 h` for each limit."""
        tariff = Tariff.of(plan)
        return amounts_in_words(self.used(tariff), plan.limits, tariff)


def rounded_up(value: float) -> float:
    """To two digits."""
    size = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(math.ceil(value / size - 1e-9) * size, 12)


def amounts_in_words(used: dict[str, float], limits: dict[str, float], tariff: Tariff) -> str:
    """`0.0297 of 0.03 h, 1.9 of 2 USD`; without limits what was used."""
    if not limits:
        return f"{used['gpu_hours']:.3g} GPU-hours"
    return ", ".join(f"{used[name]:.3g} of {limit:.4g} {tariff.unit(name)}" for name, limit in limits.items())


def check_currency(plan: Plan, account: Account) -> None:
    """That the money of earlier starts can be added to this one's.

    Raises:
        UsageError: if they were paid in another currency.
    """
    if "money" not in plan.limits:
        return
    priced = (start.tariff for start in account.starts if start.tariff.price_per_gpu_hour is not None)
    other = next((tariff.currency for tariff in priced if tariff.currency != plan.currency), None)
    if other is not None:
        raise UsageError(
            f"budget.money: earlier starts of this run were paid in {other}, this one is in {plan.currency}; give "
            f"cluster.price_per_gpu_hour in {other} and cluster.currency={other}, or take another name="
        )


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Rows that can be counted."""
    for row in read_jsonl(file):
        if isinstance(row.get("start"), int) and isinstance(row.get("seconds"), int | float) and "event" in row:
            yield row


def _tariff(row: dict[str, Any]) -> Tariff:
    return Tariff(row["devices"], row["price_per_gpu_hour"], row["currency"], row["power_watts"])
