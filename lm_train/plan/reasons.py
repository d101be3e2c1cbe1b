"""Why each `auto` of a recipe became what it is, in words."""

from __future__ import annotations

from lm_train.plan.choice import NEARLY, Priced
from lm_train.plan.options import precision_for
from lm_train.plan.target import Target
from lm_train.recipe import Recipe


def explain(recipe: Recipe, target: Target, chosen: Priced, every: list[Priced], reasons: dict[str, str]) -> None:
    """Why each `auto` became what it is."""
    layout, trainer = chosen.trial.layout, recipe.trainer
    if trainer.precision == "auto":
        reasons["trainer.precision"] = precision_for(recipe, target.machine, layout.strategy)[1]
    others = [one for one in every if one is not chosen]
    if trainer.devices == "auto" and "trainer.devices" not in reasons:
        sizes_tried = [one for one in others if one.trial.layout.ranks != layout.ranks]
        best = min(sizes_tried, key=lambda one: one.hours, default=None)
        aim = recipe.budget.optimize
        there = target.cluster.nodes * target.cluster.devices_per_node
        if best is not None:
            reasons["trainer.devices"] = (
                f"{aim}: {chosen.hours:.3g} h, {chosen.gpu_hours:.3g} gpu-hours; on {best.trial.layout.ranks} "
                f"{best.hours:.3g} h, {best.gpu_hours:.3g}"
            )
        elif layout.ranks < there:
            reasons["trainer.devices"] = (
                f"of {there} the most that divide data.global_batch_size={layout.global_batch_size}"
            )
        else:
            reasons["trainer.devices"] = f"all of {target.cluster.name}"
    if trainer.strategy == "auto":
        same = [one for one in others if one.trial.layout.ranks == layout.ranks]
        best = min(same, key=lambda one: one.hours, default=None)
        reasons["trainer.strategy"] = (
            "one process"
            if layout.ranks == 1 and layout.strategy == "single"
            else "the only one that fits"
            if best is None
            else f"next best: {best.trial.group}, {best.hours / chosen.hours:.2f} times as long"
            if best.hours > chosen.hours * (1 + NEARLY)
            else f"as fast as {best.trial.group}, and plainer"
        )
    if recipe.data.micro_batch_size == "auto" and trainer.accumulate_grad_batches == "auto":
        share = layout.micro_batch_size * layout.accumulate_grad_batches
        largest = layout.micro_batch_size == share
        reasons["data.micro_batch_size"] = (
            f"the whole share of {'the process' if layout.ranks == 1 else 'each process'}"
            if largest
            else f"fastest of the divisors of {share} that fit, or as fast with less memory"
        )
    memory = chosen.trial.memory
    if trainer.activation_checkpointing == "auto":
        reasons["trainer.activation_checkpointing"] = (
            "all activations fit" if layout.activation_checkpointing == "none" else "recomputed to fit into memory"
        )
    if trainer.cross_entropy_chunks == "auto":
        reasons["trainer.cross_entropy_chunks"] = (
            "the logits fit"
            if layout.cross_entropy_chunks == 1
            else f"so that logits take {memory.logits / 1e9:.1f} GB"
        )
