"""When nothing fits: the nearest layout that would, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lm_train.plan.forecast import Costs
from lm_train.plan.layout import Layout
from lm_train.plan.network import Forecaster
from lm_train.plan.options import Group, chunkings, layout_of, precision_for, recomputations, sizes, with_open_choices
from lm_train.plan.search import Misfit, Trial, explore
from lm_train.plan.target import Target
from lm_train.recipe import Recipe, strategy_problem, task_of

MOST_NODES = 128
"""How many nodes of the same kind are thought of."""


def nothing_fits(
    recipe: Recipe, target: Target, total: int, misfits: Sequence[Misfit], steps: int | None, forecast: Forecaster
) -> str:
    """One line: what lacks least and how much, what would make it fit, or how many more devices would, with their cost."""
    least = min(misfits, key=lambda misfit: misfit.missing)
    device, memory = target.cluster.device, least.memory
    where = f"a process here, which has {_gb(memory.capacity)}" if device.accelerator == "cpu" else device.name
    on_host = memory.missing_on_host == least.missing
    needs = f"{_gb(memory.high)} of {_gb(memory.capacity)}"
    if on_host:
        needs = f"{_gb(memory.host)} of host memory, where its share of the node is {_gb(memory.host_capacity)}"
    said = f"nothing fits into {where}: {least.group} with micro batch {least.layout.micro_batch_size} needs {needs}"
    fixable = next((misfit for misfit in sorted(misfits, key=lambda m: m.missing) if misfit.fix), None)
    elsewhere = _under_other_strategies(recipe, target, total, forecast)
    if fixable is not None:
        return f"{said}; {fixable.group} fits with {fixable.fix}"
    if elsewhere is not None:
        return f"{said}; {elsewhere.group} would fit ({_words(recipe, elsewhere)})"
    larger = _larger(recipe, target, total, forecast)
    if larger is None:
        return f"{said}; a smaller model (model.n_layer, model.n_embd, model.block_size), or devices with more memory, would"
    # nobody has said what would connect several nodes, where the description has one
    cost = _cost(recipe, target, larger, steps, forecast) if target.cluster.inter_node is not None else ""
    return f"{said}; {larger.strategy} on {larger.nodes} nodes of {larger.devices} would fit{cost}"


def _under_other_strategies(recipe: Recipe, target: Target, total: int, forecast: Forecaster) -> Trial | None:
    """The fastest layout on the same machines that fits where the recipe does not fix strategy and devices."""
    if not target.machine.gpus or (recipe.trainer.strategy == "auto" and recipe.trainer.devices == "auto"):
        return None
    opened = {"strategy": "auto", "devices": "auto", "num_nodes": "auto"}
    free = with_open_choices(recipe)
    free = free.model_copy(update={"trainer": free.trainer.model_copy(update=opened)})
    problems: list[str] = []
    open_sizes = sizes(free, total, target, problems, {})
    trials = [] if problems else explore(free, target, total, open_sizes, 0, forecast)[0]
    return min(trials, key=lambda trial: trial.step.seconds, default=None)


def _words(recipe: Recipe, trial: Trial) -> str:
    """What of the recipe must be said otherwise for a layout."""
    group, trainer = trial.group, recipe.trainer
    pairs = (
        ("strategy", trainer.strategy, group.strategy),
        ("devices", trainer.devices, group.devices),
        ("num_nodes", trainer.num_nodes, group.nodes),
    )
    return " ".join(f"trainer.{key}={to}" for key, fixed, to in pairs if fixed not in ("auto", to))


def _larger(recipe: Recipe, target: Target, total: int, forecast: Forecaster) -> Layout | None:
    """The smallest number of such nodes on which the most frugal layout fits."""
    free = with_open_choices(recipe)
    devices = target.cluster.devices_per_node
    recomputed, chunks = recomputations(free)[-1], chunkings(free, task_of(recipe))[-1]
    nodes = target.cluster.nodes
    while target.machine.gpus and nodes < MOST_NODES:
        nodes *= 2
        batch = math.ceil(total / (nodes * devices)) * nodes * devices
        for strategy in ("fsdp", "zero3"):
            precision, _ = precision_for(recipe, target.machine, strategy)
            if strategy_problem(recipe, strategy, precision) is None:
                group = Group(nodes, devices, strategy, precision)
                layout = layout_of(group, free, target, batch, 1, recomputed, chunks, 0)
                if forecast.memory(layout).fits:
                    return layout
    return None


def _cost(recipe: Recipe, target: Target, layout: Layout, steps: int | None, forecast: Forecaster) -> str:
    if steps is None:
        return ""
    step = forecast.step(layout)
    save = forecast.checkpoint_seconds(layout)
    costs = Costs(target.cluster.start_seconds, 0.0, save, save, None, None)
    hours = costs.hours(steps, step).value
    spent, price = hours * layout.ranks, target.cluster.price_per_gpu_hour
    money = "" if price is None else f", {spent * price:,.0f} {target.cluster.currency}"
    return f" and take {hours:,.3g} h, {spent:,.0f} gpu-hours{money}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
