"""Which of the layouts that fit serves the budget's aim best, and why the others do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lm_train.plan.forecast import Costs, hours_allowed
from lm_train.plan.options import SHARDED
from lm_train.plan.search import Misfit, Trial
from lm_train.plan.target import Target

Aim = Literal["soonest", "cheapest", "best"]
NEARLY = 0.03
"""Layouts that differ by less than this share, which no forecast tells apart, count as equally good: the plainest is taken."""
ENOUGH = 0.9
"""With as many steps as the budget pays for, `soonest` takes the earliest end among layouts that reach this share of the most
steps that any of them pays for."""


@dataclass(frozen=True)
class Priced:
    """A layout with what the whole run takes under it."""

    trial: Trial
    costs: Costs
    steps: int
    hours: float
    allowed: float
    """Hours that the budget allows so many devices."""

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.trial.layout.ranks

    @property
    def is_affordable(self) -> bool:
        return self.hours <= self.allowed and self.steps > 0

    @property
    def plainness(self) -> tuple[int, int]:
        """Fewer devices before more, simpler strategies before others."""
        strategy = self.trial.layout.strategy
        return self.trial.layout.ranks, SHARDED.index(strategy) if strategy in SHARDED else -1


def priced(trial: Trial, costs: Costs, steps: int | None, limits: dict[str, float], target: Target) -> Priced:
    """What a run of `steps` steps takes; None: of as many as the budget pays for."""
    allowed = hours_allowed(limits, trial.layout.ranks, target.cluster_for(trial.layout.devices))
    if steps is None:
        steps = costs.steps_within(allowed, trial.step)
    return Priced(trial, costs, steps, costs.hours(steps, trial.step).value, allowed)


def choose(every: Sequence[Priced], aim: Aim, fixed_steps: bool) -> Priced:
    """The best of the affordable ones; of several that are nearly as good the plainest. If none is affordable, the one that
    gets furthest."""
    affordable = [one for one in every if one.is_affordable]
    if not affordable:
        return min(every, key=lambda one: (one.hours / one.allowed if one.steps else math.inf, one.plainness))
    if not fixed_steps:
        most = max(one.steps for one in affordable)
        enough = ENOUGH if aim == "soonest" else 1 - NEARLY
        affordable = [one for one in affordable if one.steps >= enough * most]

    def cost(one: Priced) -> float:
        if aim == "cheapest" or (aim == "best" and not fixed_steps):
            return one.gpu_hours
        return one.hours

    least = min(map(cost, affordable))
    return min((one for one in affordable if cost(one) <= least * (1 + NEARLY)), key=lambda one: one.plainness)


def ranked(every: Sequence[Priced], chosen: Priced) -> tuple[list[Priced], list[Priced]]:
    """The others, best ones first: those on as many devices and the best on each other number of them; and the rest."""
    others = sorted((one for one in every if one is not chosen), key=lambda one: (not one.is_affordable, one.hours))
    near = [one for one in others if one.trial.layout.ranks == chosen.trial.layout.ranks]
    seen = {chosen.trial.layout.ranks}
    for one in others:
        if one.trial.layout.ranks not in seen:
            seen.add(one.trial.layout.ranks)
            near.append(one)
    return near, [one for one in others if all(one is not other for other in near)]


def why_not(one: Priced, chosen: Priced, limits: dict[str, float], aim: Aim) -> str:
    """Why a layout that fits was not taken."""
    name = str(one.trial.group)
    if one.steps == 0:
        return f"{name}: the budget does not pay for one step beside start and end"
    if not one.is_affordable:
        worst = " or ".join(f"{limit}={value:g}" for limit, value in limits.items())
        return f"{name}: {one.hours:.3g} h, {one.gpu_hours:.3g} gpu-hours, beyond the budget of {worst}"
    share = one.steps / chosen.steps - 1
    if abs(share) > NEARLY:
        return f"{name}: {abs(share):.0%} {'fewer' if share < 0 else 'more'} steps for the budget, in {one.hours:.3g} h"
    times = one.hours / chosen.hours
    spends = one.gpu_hours / chosen.gpu_hours
    if aim == "cheapest" and spends > 1 + NEARLY:
        return f"{name}: {spends - 1:.0%} more gpu-hours ({one.gpu_hours:.3g})"
    if times > 1 + NEARLY:
        return f"{name}: {_longer(times)} ({one.hours:.3g} h)"
    more = one.trial.layout.ranks > chosen.trial.layout.ranks
    return f"{name}: no faster ({one.hours:.3g} h), and {'takes more devices' if more else 'less plain'}"


def _longer(times: float) -> str:
    return f"{times:.1f} times as long" if times >= 1.5 else f"{times - 1:.0%} longer"


def why_misfit(misfit: Misfit) -> str:
    """What an unfit kind of layout lacks, and the smallest change that would make it fit."""
    which = " of host memory" if misfit.memory.missing_on_host == misfit.missing else ""
    over = f"{misfit.missing / 1e9:.1f} GB{which} over at micro batch {misfit.layout.micro_batch_size}"
    return f"{misfit.group}: {over}" + (f"; fits with {misfit.fix}" if misfit.fix else "")
