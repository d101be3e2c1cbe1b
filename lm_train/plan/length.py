"""How much a run takes in: its global batch and its steps, where the recipe leaves them open."""

from __future__ import annotations

import math

from lm_train.clusters import Numbers
from lm_train.plan.counts import flops_per_sample, parameter_count, parameter_shapes
from lm_train.plan.facts import known_facts, with_assumptions
from lm_train.plan.forecast import hours_allowed
from lm_train.plan.laws import batch_tokens, batch_tokens_of_steps
from lm_train.plan.plan import Plan
from lm_train.plan.target import Target
from lm_train.recipe import Recipe, task_of


def global_batch(recipe: Recipe, target: Target, reasons: dict[str, str], earlier: Plan | None = None) -> int:
    """The recipe's, or where it leaves it open the batch that suits so much text, as a number of sequences that every layout
    divides."""
    asked = recipe.data.global_batch_size
    if asked != "auto":
        return asked
    if earlier is not None:
        reasons["data.global_batch_size"] = "as the run began with it"
        return earlier.global_batch_size
    block, trainer = int(getattr(recipe.model, "block_size", 1)), recipe.trainer
    if trainer.max_tokens is not None:
        tokens, over = batch_tokens(trainer.max_tokens), f"{trainer.max_tokens:,} tokens"
    elif isinstance(trainer.max_steps, int):
        tokens, over = batch_tokens_of_steps(trainer.max_steps), f"{trainer.max_steps:,} steps"
    else:
        pays_for = _tokens_paid(recipe, target)
        tokens, over = batch_tokens(pays_for), f"the {pays_for:.2g} tokens that the budget about pays for"
    fixed = (recipe.data.micro_batch_size, trainer.accumulate_grad_batches)
    unit = math.prod(_most_ranks(recipe, target)) * math.prod(value for value in fixed if value != "auto")
    sequences = max(unit, 2 ** round(math.log2(max(1.0, tokens / block))))
    sequences = -(-sequences // unit) * unit
    reasons["data.global_batch_size"] = (
        f"0.58 D^0.571 tokens (Step Law, arXiv:2503.04715) over {over} are {tokens:,.0f}, {tokens / block:.0f} sequences"
    )
    return sequences


def _most_ranks(recipe: Recipe, target: Target) -> tuple[int, int]:
    """Nodes and ranks a node of the largest layout that is open."""
    nodes, devices, allocation = recipe.trainer.num_nodes, recipe.trainer.devices, target.allocation
    if nodes == "auto":
        nodes = target.cluster.nodes if allocation is None else allocation.nodes
    if devices == "auto":
        tasks = 1 if allocation is None else allocation.tasks_per_node
        devices = target.cluster.devices_per_node if target.machine.gpus else tasks
    return (1, 1) if recipe.trainer.strategy == "single" or recipe.debug else (nodes, devices)


def _tokens_paid(recipe: Recipe, target: Target) -> float:
    """Tokens that the budget pays for, from the FLOPs of a token and what the devices achieve; good to a factor of two, which
    moves the batch by half."""
    task, facts = task_of(recipe), with_assumptions(recipe, known_facts(recipe))[0]
    shapes = parameter_shapes(recipe.model, task, facts)
    each = None if shapes is None else flops_per_sample(recipe.model, task, facts, parameter_count(shapes))
    if each is None:
        return 1e9
    device, most = target.cluster.device, target.cluster.nodes * target.cluster.devices_per_node
    number: Numbers = "bf16" if "bf16" in device.peak_flops else "fp32"
    rate = device.peak_flops[number] * device.achievable.get(number, 0.5) * 0.6
    hours = hours_allowed(recipe.budget.limits, most, target.cluster)
    return hours * 3600 * rate * most / each * int(getattr(recipe.model, "block_size", 1))


def steps_asked(recipe: Recipe, total: int, reasons: dict[str, str]) -> int | None:
    """Optimizer steps of the run; None where the budget decides."""
    trainer = recipe.trainer
    if trainer.max_tokens is not None:
        steps = math.ceil(trainer.max_tokens / (total * int(getattr(recipe.model, "block_size", 1))))
        reasons["trainer.max_steps"] = f"{trainer.max_tokens:,} tokens"
        return steps
    if trainer.max_epochs is not None:
        reasons["trainer.max_steps"] = f"stands for {trainer.max_epochs:g} epochs until the data are read"
        return trainer.max_steps if isinstance(trainer.max_steps, int) else 1000
    if trainer.max_steps == "auto":
        reasons["trainer.max_steps"] = "what the budget pays for; the measured speed corrects it on the way"
        return None
    return trainer.max_steps
