"""`dry_run=true`: build the model on the meta device, print its parameters and the plan, write nothing."""

from __future__ import annotations

from pathlib import Path

import torch

from lm_train import models
from lm_train.errors import ExitCode
from lm_train.hardware import this_machine
from lm_train.modules import parameter_table
from lm_train.plan import make_plan
from lm_train.recipe import Recipe
from lm_train.runs import DEBUG_SUFFIX

UNKNOWN_VOCABULARY = 256
"""Assumed for the count where only the corpus can tell (characters)."""


def dry_run(recipe: Recipe) -> int:
    """Prints what `train` would do.

    Raises:
        UsageError: as `train` would.
    """
    plan = make_plan(recipe, this_machine())
    with torch.device("meta"):
        net = models.build(recipe.model, plan, plan.vocab_size or UNKNOWN_VOCABULARY)
    print(f"recipe {recipe.recipe}\nplan\n{plan.table()}\nparameters")
    for name, count in parameter_table(net):
        print(f"  {name:<20} {count:>15,}")
    total = sum(p.numel() for p in net.parameters())
    assumed = "" if plan.vocab_size else f"  (with {UNKNOWN_VOCABULARY} characters; the corpus decides)"
    print(f"  {'total':<20} {total:>15,}{assumed}")
    title = f"{recipe.recipe}{DEBUG_SUFFIX if recipe.debug else ''}-N"
    run = Path(recipe.runs_dir) / (recipe.name or title)
    every = recipe.checkpoint.every_n_steps
    when = "at the end" if every is None else f"every {every} steps and at the end"
    print(
        f"would write\n  {run}/recipe.yaml, plan.json, metrics.jsonl, tokenizer.json\n"
        f"  {run}/checkpoints/step-N {when}, about {_checkpoint_bytes(recipe, total) / 1e6:,.1f} MB each"
    )
    return ExitCode.DONE


def _checkpoint_bytes(recipe: Recipe, n_parameters: int) -> int:
    """fp32 parameters and the optimizer's state of the same size."""
    match recipe.optim.kind:
        case "adam" | "adamw":
            states = 2
        case "sgd":
            states = int(recipe.optim.momentum > 0)
        case "adagrad":
            states = 1
        case "rmsprop":
            states = 1 + int(recipe.optim.momentum > 0)
    size = 2 if recipe.trainer.precision == "bf16-true" else 4
    return n_parameters * size * (1 + states)
