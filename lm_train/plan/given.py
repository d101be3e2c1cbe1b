"""The plan that a start follows: a new one, or exactly the one of a file that was made elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lm_train.clusters import device_of
from lm_train.errors import UsageError
from lm_train.hardware import Machine
from lm_train.plan.places import threads_per_rank
from lm_train.plan.plan import Plan
from lm_train.plan.planner import make_plan
from lm_train.recipe import Recipe, flat
from lm_train.slurm import Allocation, tasks_see_their_own_gpus

_DECIDING = ("model", "data", "optim", "trainer", "checkpoint", "budget")
"""Sections that a plan depends on; where the run is tracked, and which seed it has, changes nothing."""
_NOT_DECIDING = ("data.fold", "data.folds", "data.path")
"""Keys that do not: the folds are alike, and a path may be written otherwise."""
_SAME_MEMORY = 0.97
"""Two cards of one sort differ by less, as drivers keep more or less for themselves."""


def plan_for(
    recipe: Recipe,
    machine: Machine,
    allocation: Allocation | None,
    must_fit: bool = True,
    earlier: Plan | None = None,
) -> Plan:
    """The plan of `plan=FILE`, else a new one.

    Raises:
        UsageError: if the recipe cannot be fulfilled here, or the file's plan is for another recipe or machine.
    """
    if recipe.plan is None:
        return make_plan(recipe, machine, allocation, must_fit, earlier)
    plan = _read(Path(recipe.plan))
    problem = _other_recipe(plan, recipe) or _other_machine(plan, machine, allocation)
    if problem:
        raise UsageError(f"plan={recipe.plan}: {problem}")
    here = threads_per_rank(machine, allocation, plan.devices)
    return plan.model_copy(update={"threads_per_rank": min(plan.threads_per_rank, here)})


def made_for(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe a plan depends on, by key, for `Plan.made_for`."""
    values = flat(recipe.model_dump(mode="json", include=set(_DECIDING)))
    return {key: value for key, value in values.items() if key not in _NOT_DECIDING}


def _read(file: Path) -> Plan:
    try:
        return Plan.read(file)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(
            f"plan={file}: no plan of this version of lm-train ({where}: {first['msg']}); make it anew with lm-train plan"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UsageError(f"plan={file}: cannot read: {reason}") from None


def _other_recipe(plan: Plan, recipe: Recipe) -> str | None:
    """Which keys of the recipe are not those that the plan was made for."""
    if not plan.made_for:
        return "it does not say for which recipe it was made; write it with lm-train plan recipe=... sbatch=JOBFILE"
    now = made_for(recipe)
    keys = [key for key in sorted(plan.made_for.keys() | now.keys()) if plan.made_for.get(key) != now.get(key)]
    if not keys:
        return None
    shown = ", ".join(f"{key} was {plan.made_for.get(key)}, now {now.get(key)}" for key in keys[:3])
    more = f", and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"made for another recipe: {shown}{more}; plan again, or give the words that it was planned with"


def _other_machine(plan: Plan, machine: Machine, allocation: Allocation | None) -> str | None:
    """What this machine or step lacks for the plan."""
    nodes = allocation.nodes if allocation is not None else 1
    tasks = allocation.tasks_per_node if allocation is not None else 1
    where = "this machine" if allocation is None else str(allocation)
    start = f"srun --nodes={plan.nodes} --ntasks-per-node=1"
    if plan.accelerator == "gpu":
        start += f" --gpus-per-node={plan.devices}"
    if plan.nodes != nodes:
        return f"made for {_counted(plan.nodes, 'node')}, {where} has {nodes}; start it with sbatch, or {start}"
    if plan.accelerator == "gpu":
        gpus = len(machine.gpus)
        if allocation is not None and tasks_see_their_own_gpus(machine, allocation):
            gpus *= tasks
        if gpus < plan.devices:
            has = _counted(gpus, "GPU") if gpus else "no GPU"
            return f"made for {_counted(plan.devices, 'GPU')} on each node, {where} has {has}; start it with {start}"
        memory = min(device_of(gpu).memory_bytes for gpu in machine.gpus)
        wanted = plan.prediction.memory.capacity if plan.prediction is not None else 0
        if memory and memory < wanted * _SAME_MEMORY:
            name = machine.gpus[0].name
            return f"made for GPUs of {wanted / 1e9:.0f} GB, {where} has {name} with {memory / 1e9:.0f} GB; plan for it anew"
    elif machine.gpus:
        return f"made for the CPU, {where} has {machine.gpus[0].name}; plan anew, or hide it with CUDA_VISIBLE_DEVICES="
    if plan.devices % tasks:
        return f"made for {plan.devices} ranks on each node, {where} has {tasks} tasks there; start it with {start}"
    return None


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
