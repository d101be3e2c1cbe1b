"""Tries every layout, keeps those that fit, and takes the one that serves the budget's aim best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lm_train.plan.layout import Layout
from lm_train.plan.network import Forecaster
from lm_train.plan.options import (
    Group,
    chunkings,
    divisors,
    groups,
    layout_of,
    micro_batches,
    recomputations,
    with_open_choices,
)
from lm_train.plan.prediction import MemoryPrediction, TimePrediction
from lm_train.plan.target import Target
from lm_train.recipe import Recipe, task_of

NEARLY = 0.01
"""Micro batches whose times differ by less than this share count as equally fast: the smaller one is taken."""
ROOMY = 0.7
"""Share of the memory up to which a larger micro batch is taken without need."""
TRIED = 6
"""Micro batches that are timed of each kind of layout, from the largest that fits downwards."""


@dataclass(frozen=True)
class Trial:
    """A layout with what is expected of it."""

    group: Group
    layout: Layout
    memory: MemoryPrediction
    step: TimePrediction


@dataclass(frozen=True)
class Misfit:
    """A kind of layout none of which fits into memory."""

    group: Group
    layout: Layout
    """The one that lacks least."""
    memory: MemoryPrediction
    fix: str | None
    """The smallest change of what the recipe fixes that would make it fit."""

    @property
    def missing(self) -> int:
        """Bytes."""
        return self.memory.missing


def explore(
    recipe: Recipe, target: Target, total: int, sizes: Sequence[tuple[int, int]], workers: int, forecast: Forecaster
) -> tuple[list[Trial], list[Misfit]]:
    """The best layout of each strategy and number of ranks, and the strategies that do not fit.

    Args:
        recipe: what it fixes stays as it is.
        target: where.
        total: the global batch.
        sizes: numbers of nodes and of ranks on each.
        workers: loader processes of each rank.
        forecast: what is expected of a layout.
    """
    trials: list[Trial] = []
    misfits: list[Misfit] = []
    for group in groups(recipe, target, list(sizes)):
        found = list(_fitting(recipe, target, total, group, workers, forecast))
        if found:
            trials.append(_best(found))
        else:
            misfits.append(_misfit(recipe, target, total, group, workers, forecast))
    return trials, misfits


def _fitting(
    recipe: Recipe, target: Target, total: int, group: Group, workers: int, forecast: Forecaster
) -> Iterator[Trial]:
    """Layouts of a group that fit; recomputation and chunks only where they let a larger micro batch in."""
    micros = micro_batches(recipe, total, group.ranks)
    largest = 0
    task = task_of(recipe)
    for recomputed in recomputations(recipe):
        for chunks in chunkings(recipe, task):
            if largest == micros[0]:
                return
            layouts = [layout_of(group, recipe, target, total, micro, recomputed, chunks, workers) for micro in micros]
            first = _first_that_fits(layouts, forecast)
            if first is None or micros[first] <= largest:
                continue  # what is slower for each sample must at least admit more of them
            largest = micros[first]
            for layout in layouts[first : first + TRIED]:
                yield Trial(group, layout, forecast.memory(layout), forecast.step(layout))


def _first_that_fits(layouts: Sequence[Layout], forecast: Forecaster) -> int | None:
    """Of layouts with ever smaller micro batches, which need ever less memory, the first one that fits."""
    if forecast.memory(layouts[0]).fits:
        return 0
    if not forecast.memory(layouts[-1]).fits:
        return None
    too_large, fits = 0, len(layouts) - 1
    while fits - too_large > 1:
        middle = (too_large + fits) // 2
        if forecast.memory(layouts[middle]).fits:
            fits = middle
        else:
            too_large = middle
    return fits


def _best(trials: Sequence[Trial]) -> Trial:
    """The fastest; of those that are nearly as fast the largest that leaves room, else the one that needs least memory."""
    fastest = min(trial.step.seconds for trial in trials)
    near = [trial for trial in trials if trial.step.seconds <= fastest * (1 + NEARLY)]
    roomy = [trial for trial in near if trial.memory.high <= ROOMY * trial.memory.capacity or not trial.memory.capacity]
    if roomy:
        return max(roomy, key=lambda trial: (trial.layout.micro_batch_size, -trial.step.seconds))
    return min(near, key=lambda trial: (trial.memory.total, trial.step.seconds))


def _misfit(recipe: Recipe, target: Target, total: int, group: Group, workers: int, forecast: Forecaster) -> Misfit:
    """The most frugal layout that the recipe allows, and what it would have to give up for it to fit."""
    micro = micro_batches(recipe, total, group.ranks)[-1]
    recomputed, chunks = recomputations(recipe)[-1], chunkings(recipe, task_of(recipe))[-1]
    layout = layout_of(group, recipe, target, total, micro, recomputed, chunks, workers)
    return misfit_of(recipe, total, group, layout, forecast)


def misfit_of(recipe: Recipe, total: int, group: Group, layout: Layout, forecast: Forecaster) -> Misfit:
    """A layout that does not fit, with what would make it fit."""
    return Misfit(group, layout, forecast.memory(layout), _fix(recipe, total, layout, group, forecast))


def _fix(recipe: Recipe, total: int, layout: Layout, group: Group, forecast: Forecaster) -> str | None:
    """The least that must change, in words: a smaller micro batch, recomputation, chunks, all of them."""
    share = total // group.ranks
    free = with_open_choices(recipe)
    chunkiest = chunkings(free, task_of(recipe))[-1]
    smaller = [micro for micro in divisors(share) if micro < layout.micro_batch_size]
    changes = [(f"micro batch {micro}", _with_micro(layout, share, micro)) for micro in smaller]
    if layout.cross_entropy_chunks != chunkiest:
        changes.append((f"trainer.cross_entropy_chunks={chunkiest}", replace(layout, cross_entropy_chunks=chunkiest)))
    changes += [
        (f"trainer.activation_checkpointing={recomputed}", replace(layout, activation_checkpointing=recomputed))
        for recomputed in recomputations(free)[1:]
        if recomputed != layout.activation_checkpointing
    ]
    frugal = replace(
        _with_micro(layout, share, 1),
        activation_checkpointing=recomputations(free)[-1],
        cross_entropy_chunks=chunkiest,
    )
    changes.append(("micro batch 1 with every block recomputed and the loss in chunks", frugal))
    return next((said for said, changed in changes if forecast.memory(changed).fits), None)


def _with_micro(layout: Layout, share: int, micro: int) -> Layout:
    return replace(layout, micro_batch_size=micro, accumulate_grad_batches=share // micro)
