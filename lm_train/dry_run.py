"""`dry_run=true`: build the model on the meta device, print its parameters and the plan, write nothing."""

from __future__ import annotations

from pathlib import Path

import torch

from lm_train import models
from lm_train.errors import ExitCode
from lm_train.hardware import this_machine
from lm_train.modules import parameter_table
from lm_train.plan import checkpoint_bytes, make_plan, size_of
from lm_train.recipe import Recipe
from lm_train.runs import DEBUG_SUFFIX, run_name
from lm_train.slurm import current_allocation

UNKNOWN_VOCABULARY = 256
"""Assumed for the count where only the corpus can tell (characters)."""


def dry_run(recipe: Recipe) -> int:
    """Prints what `train` would do.

    Raises:
        UsageError: as `train` would.
    """
    allocation = current_allocation()
    plan = make_plan(recipe, this_machine(), allocation)
    if allocation is not None and not allocation.is_primary:
        return ExitCode.DONE
    with torch.device("meta"):
        net = models.build(recipe.model, plan, plan.vocab_size or UNKNOWN_VOCABULARY)
    print(f"recipe {recipe.recipe}\nplan\n{plan.table()}\nparameters")
    for name, count in parameter_table(net):
        print(f"  {name:<20} {count:>15,}")
    total = sum(p.numel() for p in net.parameters())
    assumed = "" if plan.vocab_size else f"  (with {UNKNOWN_VOCABULARY} characters; the corpus decides)"
    print(f"  {'total':<20} {total:>15,}{assumed}")
    title = f"{recipe.recipe}{DEBUG_SUFFIX if recipe.debug else ''}-N"
    run = Path(recipe.runs_dir) / (run_name(recipe, allocation) or title)
    every = recipe.checkpoint.every_n_steps
    when = "at the end" if every is None else f"every {every} steps and at the end"
    shapes = [(name, tuple(p.shape)) for name, p in net.named_parameters()]
    saved = checkpoint_bytes(shapes, plan.strategy, plan.precision, recipe.optim)
    print(
        f"would write\n  {run}/recipe.yaml, plan.json, metrics.jsonl, tokenizer.json\n"
        f"  {run}/checkpoints/step-N {when}, about {size_of(saved)} each"
    )
    return ExitCode.DONE
