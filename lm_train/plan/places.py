"""How many ranks run where: from the recipe, the machine and the Slurm step to nodes, ranks a node, ranks a task."""

from __future__ import annotations

import math
from typing import NamedTuple

from lm_train.errors import UsageError
from lm_train.hardware import Machine
from lm_train.plan.plan import Plan
from lm_train.recipe import Recipe
from lm_train.slurm import Allocation, tasks_see_their_own_gpus


class Place(NamedTuple):
    """Where one rank runs."""

    rank: int
    node_rank: int
    local_rank: int
    """Its number among the ranks that see the same GPUs, which is also the number of its GPU."""
    local_world_size: int
    """Ranks that see the same GPUs: those of the node, or where Slurm shows each task its own, those of the task."""


def places(plan: Plan, machine: Machine, allocation: Allocation | None) -> list[Place]:
    """The ranks that this supervisor starts.

    Raises:
        UsageError: if this node has fewer GPUs than the plan, made on the first node, counts on.
    """
    if allocation is None:
        return [Place(rank, 0, rank, plan.devices) for rank in range(plan.devices)]
    each = plan.devices // allocation.tasks_per_node
    own = tasks_see_their_own_gpus(machine, allocation)
    needed = each if own else plan.devices
    if plan.accelerator == "gpu" and len(machine.gpus) < needed:
        raise UsageError(
            f"{allocation.node_name} shows {len(machine.gpus)} GPUs, the plan made on the first node needs {needed}; leave the "
            f"node out (srun --exclude={allocation.node_name}), or ask for equal nodes"
        )
    first = allocation.local_task * each
    return [
        Place(
            allocation.node_rank * plan.devices + first + number,
            allocation.node_rank,
            number if own else first + number,
            needed,
        )
        for number in range(each)
    ]


def choose_nodes(recipe: Recipe, allocation: Allocation | None, problems: list[str]) -> int:
    """Nodes of the run: those of the Slurm step, else one."""
    asked, nodes = recipe.trainer.num_nodes, allocation.nodes if allocation is not None else 1
    if asked != "auto" and asked != nodes:
        have = "there is no Slurm step around it" if allocation is None else f"this Slurm step has {nodes}"
        problems.append(
            f"trainer.num_nodes: {asked} asked, {have}; try srun --nodes={asked} --ntasks-per-node="
            f"{allocation.tasks_per_node if allocation is not None else 1}, or trainer.num_nodes=auto"
        )
    return nodes


def choose_devices(
    recipe: Recipe,
    total: int,
    machine: Machine,
    allocation: Allocation | None,
    problems: list[str],
    reasons: dict[str, str],
) -> int:
    """Ranks on each node: its GPUs, or without a GPU its tasks."""
    asked = recipe.trainer.devices
    tasks = allocation.tasks_per_node if allocation is not None else 1
    nodes = allocation.nodes if allocation is not None else 1
    where = "this machine" if allocation is None else f"each node of {allocation}"
    key = "trainer.devices"
    if allocation is not None and (recipe.debug or recipe.trainer.strategy == "single") and allocation.tasks > 1:
        what = "debug=true" if recipe.debug else "trainer.strategy=single"
        problems.append(
            f"{what} is one process, {allocation} has {allocation.tasks} tasks; try srun --nodes=1 --ntasks=1"
        )
        return 1
    gpus = len(machine.gpus)
    if allocation is not None and tasks_see_their_own_gpus(machine, allocation):
        gpus *= tasks
    elif allocation is not None and tasks > 1 and 0 < gpus < (allocation.gpus_on_node or 0) and allocation.binds_gpus:
        problems.append(
            f"{tasks} tasks on each node see {gpus} of its {allocation.gpus_on_node} GPUs each, some of them the same; try srun "
            f"--ntasks-per-node={allocation.gpus_on_node} --gpus-per-task=1, or no --gpu-bind"
        )
        return tasks
    if asked != "auto":
        if machine.gpus and asked > gpus:
            flags = "" if allocation is None else f", or srun --gpus-per-node={asked}"
            problems.append(f"{key}: {asked} asked, {where} has {gpus} GPUs; try trainer.devices={gpus}{flags}")
        elif asked % tasks:
            problems.append(
                f"{key}: {asked} ranks on each node do not divide over its {tasks} tasks; try srun "
                f"--ntasks-per-node={asked}, or --ntasks-per-node=1"
            )
        elif tasks > 1 and asked != tasks:
            reasons[key] = f"{allocation} has {tasks} tasks on each node: {asked // tasks} processes each"
        return asked
    if recipe.trainer.strategy == "single":
        reasons[key] = "trainer.strategy=single is one process"
        return 1
    if not gpus:
        reasons[key] = (
            "no GPU: one CPU process" if allocation is None else f"{allocation}, no GPU: one CPU process a task"
        )
        return tasks
    if tasks > 1:
        if gpus % tasks:
            problems.append(
                f"{tasks} tasks and {gpus} GPUs on each node; try srun --ntasks-per-node={gpus} --gpus-per-node={gpus}, or "
                f"--ntasks-per-node=1"
            )
            return tasks
        reasons[key] = f"{allocation}: all GPUs of each node"
        return gpus
    # micro batch and accumulation that the recipe fixes must divide what each GPU gets, too
    fixed = [v for v in (recipe.data.micro_batch_size, recipe.trainer.accumulate_grad_batches) if v != "auto"]
    unit = math.prod(fixed) * nodes
    usable = [n for n in range(1, gpus + 1) if total % (n * unit) == 0 and (len(fixed) < 2 or total == n * unit)]
    devices = max(usable, default=1)
    reasons[key] = f"all GPUs of {where}"
    if devices < gpus:
        reasons[key] = f"of {gpus} GPUs the most that divide data.global_batch_size={total}"
    return devices


def check_batch(
    recipe: Recipe, total: int, nodes: int, devices: int, allocation: Allocation | None, problems: list[str]
) -> bool:
    """Whether the global batch divides over the ranks, and over the micro batch or accumulation that the recipe fixes."""
    world = nodes * devices
    given = {
        "data.micro_batch_size": recipe.data.micro_batch_size,
        "trainer.accumulate_grad_batches": recipe.trainer.accumulate_grad_batches,
    }
    fixed = {key: value for key, value in given.items() if value != "auto"}
    unit = math.prod(fixed.values())
    fits = total == world * unit if len(fixed) == 2 else total % (world * unit) == 0
    if fits:
        return True
    ways = [f"data.global_batch_size={_nearest(total, world * unit, exactly=len(fixed) == 2)}"]
    smaller = [
        (n * d, n, d)
        for n in range(1, nodes + 1)
        for d in range(1, devices + 1)
        if (total == n * d * unit if len(fixed) == 2 else total % (n * d * unit) == 0)
    ]
    if allocation is not None and smaller:
        _, n, d = max(smaller)
        tasks = d if allocation.tasks_per_node > 1 or d == 1 else 1
        ways.append(
            f"srun --nodes={n} --ntasks-per-node={tasks}" + (f" with trainer.devices={d}" if tasks != d else "")
        )
    if len(fixed) == 2:
        ways.append("one of data.micro_batch_size and trainer.accumulate_grad_batches auto")
    if len(fixed) == 2:
        micro, accumulate = fixed.values()
        what = f"is not {micro} micro x {accumulate} accumulated x {world} ranks"
    else:
        what = f"is not a multiple of {world} ranks" + "".join(f" x {key}={value}" for key, value in fixed.items())
    problems.append(f"data.global_batch_size: {total} {what}; try {', or '.join(ways)}")
    return False


def _nearest(total: int, unit: int, exactly: bool) -> int:
    return unit if exactly else max(unit, round(total / unit) * unit)


def threads_per_rank(machine: Machine, allocation: Allocation | None, devices: int) -> int:
    """CPU threads of each rank: an equal share of the cores, counting only those that Slurm gave to the task."""
    cores, ranks = machine.cpu_cores, devices
    if allocation is not None:
        ranks = max(1, devices // allocation.tasks_per_node)
        if allocation.cpus_on_node is not None:
            cores = min(cores, allocation.cpus_on_node // allocation.tasks_per_node)
    return max(1, cores // ranks)
