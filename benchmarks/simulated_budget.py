"""Runs on a simulated clock that are held to a budget: the real account, the real guard, and a training that only takes time.

A run is drawn from its seed: step times with log-normal noise, stalls and a slow drift; saves of uneven length; several limits
at once; one rank, or several that agree about once a second; kills, and stops by a scheduler, after each of which it is
started again until the budget is spent. What the simulation knows and the account does not is when a killed start really ended.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

from lm_train.budget import Account, Guard, Rounds, Spending, Wish
from lm_train.budget.account import PERIOD_S
from lm_train.plan import Plan
from lm_train.runs import RunFolder

WAY_OUT_S = 1.0
"""What the guard assumes of the way out before it has seen one."""


class Killed(Exception):
    pass


@dataclass
class Outcome:
    """What came of one simulated run."""

    seed: int
    limits: dict[str, float]
    large: bool
    """Of ten saves and 150 steps or more; at least two minutes."""
    seconds: float
    """That the tightest limit pays for."""
    budget_in_saves: float
    budget_in_steps: float
    ranks: int
    starts: int
    kills: int
    forced: int
    """Starts that the supervisor had to end by force, at the last moment."""
    used: float
    """Share of the tightest limit, as it really was."""
    counted: float
    """The same share as the account has it."""
    steps: int
    saved_steps: int
    refused: bool
    """The last start was killed or stopped, and what was left paid for no other."""


class Clock:
    """Time that passes when it is told to; the supervisor looks on, and a kill may come at any moment."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.kill_at = math.inf
        self.spending: Spending | None = None

    def __call__(self) -> float:
        return self.now

    def take(self, seconds: float) -> None:
        """Lets time pass; ends with `Killed` where a kill, or the supervisor at the last moment, cuts it off."""
        spending = self.spending
        assert spending is not None
        until = self.now + seconds
        last_moment = spending.since + spending.end - spending.reserve
        cut = min(self.kill_at, last_moment)
        while self.now < min(until, cut):
            self.now = min(self.now + PERIOD_S, until, cut)
            spending.tick()
        if until > cut:
            raise Killed("forced" if cut == last_moment else "killed")


def simulate(seed: int, plan: Plan, folder: Path) -> Outcome:
    """One run to the end of its budget.

    Args:
        seed: draws everything.
        plan: of any run; its devices, price and limits are replaced.
        folder: empty.
    """
    draw = random.Random(seed)
    small = draw.random() < 0.15
    kills_a_run = draw.choice((0.0, 0.0, 1.0, 3.0))
    if small:  # only that it is never overrun is asked of these
        seconds, in_steps, in_saves = draw.uniform(5, 60), draw.uniform(0, 100), draw.uniform(0.5, 9)
        startup = seconds * draw.uniform(0.1, 1.2)
    else:
        seconds, in_steps = 10 ** draw.uniform(3.2 if kills_a_run else 2.08, 3.6), 10 ** draw.uniform(2.2, 3.2)
        in_saves = 10 ** draw.uniform(1, 2.5)
        # what is left at a kill may be too little for another start; where there are kills, starts are a small part
        startup = seconds * draw.uniform(0.002, 0.012 if kills_a_run else 0.3)
    step, save = seconds / max(1.0, in_steps), seconds / in_saves
    noise = draw.choice((0.02, 0.1, 0.3))
    stall_chance, stall_steps = draw.choice(((0.0, 0.0), (0.002, 5.0), (0.005, 3.0)))
    drift = draw.uniform(-0.2, 0.2)
    save_noise = draw.choice((0.02, 0.05, 0.1))
    every = draw.choice((None, 50, 200, 500))
    way_out = draw.uniform(0.05, 0.4)
    ranks = draw.choice((1, 1, 2, 8))
    predicted = save * draw.uniform(0.5, 2) if draw.random() < 0.5 else None

    price, watts = draw.uniform(0.5, 5), draw.uniform(50, 700)
    hours = seconds / 3600
    amounts = {
        "gpu_hours": ranks * hours,
        "money": price * ranks * hours,
        "hours": hours,
        "kwh": ranks * hours * watts / 1000,
    }
    names = draw.sample(sorted(amounts), draw.randint(1, 4))
    limits = {name: amounts[name] * (1.0 if i == 0 else draw.uniform(1, 2)) for i, name in enumerate(names)}
    plan = plan.model_copy(
        update={"nodes": 1, "devices": ranks, "price_per_gpu_hour": price, "power_watts": watts, "limits": limits}
    )

    run, clock = RunFolder(folder), Clock()
    kill_rate = kills_a_run / seconds
    took_all = 0.0
    kills = forced = starts = done = saved = 0

    def store(step_number: int, guard: Guard, spending: Spending) -> None:
        nonlocal saved
        took = save * math.exp(draw.gauss(0, save_noise))
        clock.take(took)
        guard.began_save(spending.seconds, blocked=took)
        guard.saved(took)
        spending.note("saved", step=step_number, took=took)
        saved = step_number

    while starts < 60:
        account = Account.read(run)
        if account.is_spent(plan):
            break
        starts += 1
        clock.now += draw.uniform(0, 1000)
        began = clock.now
        clock.kill_at = clock.now + draw.expovariate(kill_rate) if kill_rate else math.inf
        spending = Spending.begin(run, plan, began, clock)
        clock.spending = spending
        guard = Guard(
            spending.end - spending.reserve,
            shutdown=spending.account.upper_shutdown_seconds(WAY_OUT_S),
            saves=spending.account.save_seconds,
            predicted_save=predicted,
        )
        rounds, asked = Rounds(1.0), Wish()
        done, held = saved, False
        preempted_at = clock.now + draw.expovariate(kill_rate) if kill_rate else math.inf

        try:
            clock.take(startup * math.exp(draw.gauss(0, 0.1)))
            guard.start("train", spending.seconds)
            first = True
            while True:
                took = step * math.exp(draw.gauss(0, noise)) * (1 + drift * (clock.now - began) / seconds)
                took *= 1 + (draw.uniform(1, stall_steps) if draw.random() < stall_chance else 0.0)
                clock.take(took)
                done += 1
                if first:
                    spending.note("training")
                    first = False
                due = every is not None and done % every == 0
                guard.passed("train", spending.seconds)
                wish = guard.wish(
                    spending.seconds,
                    "train",
                    alone=ranks == 1,
                    next_save=None if every is None or held else -done % every,
                )
                if ranks > 1:
                    wish, asked = _agreed(rounds, wish, asked, step)
                if wish.stop or clock.now > preempted_at:
                    if wish.stop:
                        spending.note("stopped", step=done)
                    break
                held = held or wish.hold
                if (due and not held) or wish.save:
                    store(done, guard, spending)
            if saved != done:
                store(done, guard, spending)
            spending.note("left", step_seconds=guard.step_seconds())
            clock.take(way_out * math.exp(draw.gauss(0, 0.2)))
            spending.finish(0)
        except Killed as cut:
            kills += str(cut) == "killed"
            if str(cut) == "forced":
                forced += 1
                clock.now += 0.05  # to kill, and to write it down
                spending.finish(0)
        took_all += clock.now - began
    last = Account.read(run).last
    return Outcome(
        seed, limits, not small, seconds, in_saves, in_steps, ranks, starts, kills, forced,
        used=took_all / seconds, counted=max(Account.read(run).used(spending.tariff)[n] / limits[n] for n in limits),
        steps=done, saved_steps=saved, refused=last is None or last.stopped is None or (not last.ended and kills > 0),
    )  # fmt: skip


def _agreed(rounds: Rounds, wish: Wish, asked: Wish, step_seconds: float) -> tuple[Wish, Wish]:
    """What several ranks do at this boundary, and what they have asked for last."""
    match rounds.boundary():
        case "ask":
            return Wish(), wish
        case "act":
            rounds.answered(step_seconds, asked.soon)
            return asked, Wish()
    return Wish(), asked
