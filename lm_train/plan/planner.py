"""The resource scheduler: fills what a recipe left `auto`, each with its reason, and foretells what the run will take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lm_train.clusters import check_here, find
from lm_train.errors import UsageError
from lm_train.hardware import Machine
from lm_train.plan.choice import Priced, choose, priced, ranked, why_misfit, why_not
from lm_train.plan.forecast import Costs, hours_allowed, prediction_of
from lm_train.plan.laws import ASKED_RANGE, compute_optimum, final_loss
from lm_train.plan.layout import Layout
from lm_train.plan.length import global_batch, steps_asked
from lm_train.plan.memory import state_bytes
from lm_train.plan.nearest import nothing_fits
from lm_train.plan.network import Forecaster, Network, network_of, traced
from lm_train.plan.options import (
    Group,
    groups,
    layout_of,
    machine_problems,
    micro_batches,
    precision_for,
    recomputations,
    sizes,
)
from lm_train.plan.plan import Plan
from lm_train.plan.prediction import Interval, Prediction
from lm_train.plan.reasons import explain
from lm_train.plan.search import Misfit, Trial, explore, misfit_of
from lm_train.plan.target import Target
from lm_train.recipe import Recipe, samples_are_sequences
from lm_train.slurm import Allocation

MICRO_BATCH_TOKENS = {"gpu": 16_384, "cpu": 4_096}
MICRO_BATCH_SAMPLES = {"gpu": 2_048, "cpu": 512}
"""Largest micro batch where nothing is known of the network before it is built, in tokens of running text, or in samples of
other data. Assumptions that suit small models, not measurements."""
FIRST_GUESS = 1000
"""Steps of a run whose length the budget decides, where nothing can be foretold."""
WORKERS = "samples are read from memory, or memory-mapped files, faster than a worker can send them"


@dataclass(frozen=True)
class Schedule:
    """A plan, and what a person may want to know about it."""

    plan: Plan
    rejected: tuple[str, ...] = ()
    """The other layouts, each with its reason; first those that a person would ask for."""
    telling: int = 0
    """How many of them that are."""
    shortage: str | None = None
    """Why the budget does not pay for the whole run, if so."""
    notes: tuple[str, ...] = ()


def make_plan(
    recipe: Recipe,
    machine: Machine,
    allocation: Allocation | None = None,
    must_fit: bool = True,
    earlier: Plan | None = None,
) -> Plan:
    """Decides everything the recipe left open, for this machine and the Slurm step around this process.

    Args:
        recipe: what was asked.
        machine: what this node has; the others of an allocation have the same.
        allocation: the Slurm step around this process, if there is one.
        must_fit: refuse what does not fit into memory.
        earlier: the plan with which this run began, whose global batch stays.

    Raises:
        UsageError: with every wish of the recipe that cannot be fulfilled here, one line each.
    """
    named = find(recipe.cluster, machine, allocation)
    cluster = check_here(named, recipe.cluster, machine, allocation)
    return schedule(recipe, Target(cluster, machine, allocation), trace=False, must_fit=must_fit, earlier=earlier).plan


def schedule(
    recipe: Recipe, target: Target, trace: bool = True, must_fit: bool = True, earlier: Plan | None = None
) -> Schedule:
    """Decides everything the recipe left open.

    Args:
        recipe: what was asked; what it fixes is never overruled.
        target: where to run.
        trace: whether a network without formulas may be traced, which takes a process with torch and some seconds.
        must_fit: refuse what does not fit into memory; else a note says so.
        earlier: the plan with which this run began, whose global batch stays.

    Raises:
        UsageError: with every wish of the recipe that cannot be fulfilled there, one line each; or if no layout fits into the
            devices' memory, with the nearest one that would; a budget that does not pay for one step.
    """
    problems = machine_problems(recipe, target.machine, target.cluster.here) + _budget_problems(recipe, target)
    reasons: dict[str, str] = {}
    network = network_of(recipe)
    total = global_batch(recipe, target, reasons, earlier)
    open_sizes = sizes(recipe, total, target, problems, reasons)
    if problems:
        raise UsageError(problems)
    workers = recipe.data.num_workers
    if workers == "auto":
        workers, reasons["data.num_workers"] = 0, WORKERS
    limits = recipe.budget.limits
    steps = steps_asked(recipe, total, reasons)
    unknown = [target.cluster.device.warning] if target.cluster.device.warning else []
    forecast = Forecaster.of(recipe, network, target)
    by_rule: Layout | None = None
    if forecast is None:
        ruled: dict[str, str] = {}
        by_rule = _by_rule(recipe, target, total, open_sizes[-1], workers, ruled)
        if not target.machine.gpus:
            reasons |= ruled
        if trace or target.machine.gpus or steps is None:
            network = traced(recipe, network, by_rule, _asked_for(recipe, target, total, open_sizes))
            forecast = Forecaster.of(recipe, network, target)
    if forecast is None:
        assert by_rule is not None
        reasons = ruled | reasons
        if steps is None:
            steps, reasons["trainer.max_steps"] = FIRST_GUESS, "a first guess, which the measured speed corrects"
        return Schedule(_plan(recipe, target, network, by_rule, steps, None, reasons), notes=(*unknown, *network.notes))
    notes = [*unknown, *network.notes]
    if by_rule is not None and not target.machine.gpus:
        # without GPUs the rule's layout stands, so that training need not trace before it starts
        group = Group(by_rule.nodes, by_rule.devices, by_rule.strategy, by_rule.precision)
        memory = forecast.memory(by_rule)
        misfits: list[Misfit] = []
        trials = [Trial(group, by_rule, memory, forecast.step(by_rule))]
        if not memory.fits:
            trials, misfits = [], [misfit_of(recipe, total, group, by_rule, forecast)]
    else:
        trials, misfits = explore(recipe, target, total, open_sizes, workers, forecast)
    if not trials:
        notes.append(nothing_fits(recipe, target, total, misfits, steps, forecast))
        if must_fit:
            raise UsageError(notes[-1])
        least = min(misfits, key=lambda misfit: misfit.missing)
        trials = [Trial(least.group, least.layout, least.memory, forecast.step(least.layout))]
    every = [priced(trial, _costs(recipe, target, trial, forecast), steps, limits, target) for trial in trials]
    chosen = choose(every, recipe.budget.optimize, steps is not None)
    shortage = None if recipe.trainer.max_epochs is not None else _shortage(chosen, limits, steps)
    if chosen.steps == 0 or chosen.costs.hours(1, chosen.trial.step).low > chosen.allowed:
        raise UsageError(shortage or "the budget pays for no step")
    explain(recipe, target, chosen, every, reasons)
    prediction = _prediction(recipe, network, target, chosen, forecast)
    near, far = ranked(every, chosen)
    rejected = [why_not(one, chosen, limits, recipe.budget.optimize) for one in near]
    rejected += [why_misfit(misfit) for misfit in sorted(misfits, key=lambda misfit: misfit.missing)]
    rejected += [why_not(one, chosen, limits, recipe.budget.optimize) for one in far]
    plan = _plan(recipe, target, network, chosen.trial.layout, chosen.steps, prediction, reasons)
    if recipe.trainer.max_steps != "auto" and 2 < plan.paid_share < math.inf:
        notes.append(
            f"the budget pays for {plan.paid_share:.1f} times as much; trainer.max_steps=auto trains for as long as it lasts"
        )
    return Schedule(
        plan, tuple(rejected), len(near) + len(misfits), shortage, (*notes, *_optimum(recipe, network, plan))
    )


def _asked_for(recipe: Recipe, target: Target, total: int, sizes: list[tuple[int, int]]) -> Iterator[Layout]:
    """One layout of each kind that the search will ask for."""
    if target.machine.gpus:
        for group in groups(recipe, target, sizes):
            for recomputed in recomputations(recipe):
                micro = micro_batches(recipe, total, group.ranks)[0]
                yield layout_of(group, recipe, target, total, micro, recomputed, 1, 0)


def _budget_problems(recipe: Recipe, target: Target) -> list[str]:
    """What of the budget cannot be counted here."""
    budget, cluster = recipe.budget, target.cluster
    problems = []
    if budget.money is not None and cluster.price_per_gpu_hour is None:
        problems.append(
            f"budget.money={budget.money:g}: nobody has said what {cluster.name} costs; give "
            "cluster.price_per_gpu_hour=PRICE, or budget.gpu_hours"
        )
    if budget.currency is not None and budget.currency != cluster.currency:
        problems.append(
            f"budget.currency={budget.currency}: cluster={cluster.name} is paid in {cluster.currency}; give budget.money in "
            f"{cluster.currency}, or cluster.price_per_gpu_hour and cluster.currency={budget.currency}"
        )
    paid = hours_allowed(budget.limits, 1, cluster)
    if recipe.trainer.max_steps == "auto" and budget.limits and math.isinf(paid) and not problems:
        given = " and ".join(f"budget.{name}={value:g}" for name, value in budget.limits.items())
        problems.append(
            f"{given}: never used up on {cluster.name}, where it costs nothing; give budget.hours, or a number of steps"
        )
    if budget.kwh is not None and cluster.device.power_watts == 0:
        problems.append(
            f"budget.kwh={budget.kwh:g}: the power of {cluster.device.name} is not known; describe the cluster in a file with "
            "device.power_watts, or give budget.gpu_hours"
        )
    return problems


def _shortage(chosen: Priced, limits: dict[str, float], steps: int | None) -> str | None:
    if chosen.is_affordable:
        return None
    given = " and ".join(f"budget.{name}={value:g}" for name, value in limits.items())
    if chosen.steps == 0 or chosen.costs.hours(1, chosen.trial.step).low > chosen.allowed:
        return (
            f"{given}: start, one step, validation and the last checkpoint take {_one_step(chosen):.2g} h on "
            f"{chosen.trial.layout.ranks} devices; give more"
        )
    share = chosen.allowed / chosen.hours
    return (
        f"{given} pays for about {share:.0%} of {steps:,} steps: they take {chosen.hours:.3g} h on {chosen.trial.layout.ranks} "
        f"devices, {chosen.gpu_hours:.3g} gpu-hours; give more, or trainer.max_steps=auto to end where the budget ends"
    )


def _one_step(chosen: Priced) -> float:
    return chosen.costs.hours(1, chosen.trial.step).value


def _costs(recipe: Recipe, target: Target, trial: Trial, forecast: Forecaster) -> Costs:
    return Costs(
        start=target.cluster.start_seconds,
        validation=forecast.validation_seconds(trial.layout),
        checkpoint=forecast.checkpoint_seconds(trial.layout),
        stall=forecast.checkpoint_stall(trial.layout),
        validate_every=recipe.trainer.val_check_interval,
        save_every=recipe.checkpoint.every_n_steps,
    )


def _prediction(recipe: Recipe, network: Network, target: Target, chosen: Priced, forecast: Forecaster) -> Prediction:
    layout = chosen.trial.layout
    return prediction_of(
        chosen.steps,
        layout,
        chosen.trial.memory,
        chosen.trial.step,
        chosen.costs,
        target.cluster_for(layout.devices),
        forecast.checkpoint_bytes(layout),
        network.flops_per_sample,
        _final_loss(recipe, network, chosen.steps * layout.global_batch_size),
        chosen.allowed,
    )


def _final_loss(recipe: Recipe, network: Network, samples: int) -> Interval | None:
    """Of a decoder over subword tokens within the sizes that the law was fitted to; others have no law."""
    n_parameters = network.n_parameters
    if network.task != "causal_lm" or recipe.model.kind not in ("gpt", "llama") or n_parameters is None:
        return None
    if not ASKED_RANGE[0] <= n_parameters <= ASKED_RANGE[1]:
        return None
    return final_loss(n_parameters, samples * recipe.model.block_size)


def _optimum(recipe: Recipe, network: Network, plan: Plan) -> list[str]:
    """What the run's FLOPs would best be spent on, where the budget decides how long it is."""
    if plan.tokens_per_step is None or network.task != "causal_lm" or network.flops_per_sample is None:
        return []
    if recipe.trainer.max_steps != "auto" and recipe.budget.optimize != "best":
        return []
    flops = network.flops_per_sample * plan.max_steps * plan.global_batch_size
    best = compute_optimum(flops)
    said = f"compute-optimal for {flops:.2g} FLOPs: {best.parameters:.2g} parameters on {best.tokens:.2g} tokens"
    if not ASKED_RANGE[0] / 10 <= best.parameters <= ASKED_RANGE[1] * 10:
        return []
    if network.n_parameters is not None:
        tokens = plan.max_steps * plan.tokens_per_step
        said += f"; this run: {network.n_parameters:.2g} on {tokens:.2g}"
    return [f"{said} (Besiroglu et al. 2024, a prior)"]


def _by_rule(
    recipe: Recipe, target: Target, total: int, size: tuple[int, int], workers: int, reasons: dict[str, str]
) -> Layout:
    """A layout for a network of which nothing is known before it is built: copies of it on all devices."""
    nodes, devices = size
    strategy = recipe.trainer.strategy
    if strategy == "auto":
        strategy = "single" if nodes * devices == 1 else "ddp"
        reasons["trainer.strategy"] = (
            "one process" if strategy == "single" else "nothing is known of the network's size"
        )
    precision, why = precision_for(recipe, target.machine, strategy)
    if why:
        reasons["trainer.precision"] = why
    if recipe.trainer.devices == "auto":
        reasons.setdefault("trainer.devices", f"all of {target.cluster.name}")
    micros = micro_batches(recipe, total, nodes * devices)
    accelerator = "gpu" if target.machine.gpus else "cpu"
    text = samples_are_sequences(recipe)
    size_of_sample = int(getattr(recipe.model, "block_size", 1)) if text else 1
    limit = (MICRO_BATCH_TOKENS if text else MICRO_BATCH_SAMPLES)[accelerator]
    micro = next((m for m in micros if m * size_of_sample <= limit), micros[-1])
    if len(micros) > 1:
        reasons["data.micro_batch_size"] = (
            f"largest divisor of {total // nodes // devices} with at most {limit:,} {'tokens' if text else 'samples'}"
        )
    recomputed, chunks = recipe.trainer.activation_checkpointing, recipe.trainer.cross_entropy_chunks
    return layout_of(
        Group(nodes, devices, strategy, precision),
        recipe,
        target,
        total,
        micro,
        "none" if recomputed == "auto" else recomputed,
        1 if chunks == "auto" else chunks,
        workers,
    )


def _plan(
    recipe: Recipe,
    target: Target,
    network: Network,
    layout: Layout,
    steps: int,
    prediction: Prediction | None,
    reasons: dict[str, str],
) -> Plan:
    shapes = network.shapes if network.known else None
    state = None
    if shapes is not None:
        state = state_bytes(shapes, layout.strategy, layout.precision, recipe.optim, layout.ranks)
    machine, cluster = target.machine, target.cluster_for(layout.devices)
    return Plan(
        task=network.task,
        accelerator=layout.accelerator,
        device_name=machine.gpus[0].name if machine.gpus else f"{machine.cpu_cores} cores",
        nodes=layout.nodes,
        devices=layout.devices,
        strategy=layout.strategy,
        precision=layout.precision,
        global_batch_size=layout.global_batch_size,
        micro_batch_size=layout.micro_batch_size,
        accumulate_grad_batches=layout.accumulate_grad_batches,
        num_workers=layout.num_workers,
        max_steps=steps,
        activation_checkpointing=layout.activation_checkpointing,
        cross_entropy_chunks=layout.cross_entropy_chunks,
        compile=layout.compile,
        threads_per_rank=layout.threads_per_rank,
        vocab_size=network.facts.vocab_size,
        n_parameters=network.n_parameters,
        flops_per_sample=network.flops_per_sample if network.known else None,
        parameter_bytes=None if state is None else state.parameters,
        gradient_bytes=None if state is None else state.gradients,
        optimizer_bytes=None if state is None else state.optimizer,
        block_size=getattr(recipe.model, "block_size", None) if samples_are_sequences(recipe) else None,
        peak_flops_per_device=cluster.device.peak_flops.get("bf16") if machine.gpus and cluster.device.known else None,
        cluster=cluster.name,
        price_per_gpu_hour=cluster.price_per_gpu_hour,
        currency=cluster.currency,
        power_watts=cluster.device.power_watts,
        limits=recipe.budget.limits,
        steps_known=recipe.trainer.max_epochs is None,
        prediction=prediction,
        reasons=reasons,
    )
