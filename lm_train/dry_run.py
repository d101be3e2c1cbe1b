"""`dry_run=true`: build the model on the meta device, print its parameters and the plan, write nothing."""

from __future__ import annotations

from pathlib import Path

import torch

from lm_train import models, plugins
from lm_train.errors import ExitCode
from lm_train.folds import fold_name, number_of_folds
from lm_train.hardware import this_machine
from lm_train.modules import parameter_table
from lm_train.plan import (
    Plan,
    checkpoint_bytes,
    known_facts,
    plan_for,
    plan_table,
    size_of,
    with_assumptions,
)
from lm_train.recipe import LabelledData, Recipe
from lm_train.runs import DEBUG_SUFFIX, run_name
from lm_train.slurm import current_allocation


def dry_run(recipe: Recipe) -> int:
    """Prints what `train` would do.

    Raises:
        UsageError: as `train` would.
    """
    allocation = current_allocation()
    plugins.allow(recipe.plugins)
    plugins.check(recipe)
    plan = plan_for(recipe, this_machine(), allocation, must_fit=False)
    if allocation is not None and not allocation.is_primary:
        return ExitCode.DONE
    facts, assumed = with_assumptions(recipe, known_facts(recipe))
    said = f"  (with {assumed}; the data decide)" if assumed else ""
    with torch.device("meta"):
        net = models.build(recipe.model, plan, facts)
    print(f"recipe {recipe.recipe}\nplan\n{plan_table(plan)}\nparameters")
    for name, count in parameter_table(net):
        print(f"  {name:<20} {count:>15,}")
    total = sum(p.numel() for p in net.parameters())
    print(f"  {'total':<20} {total:>15,}{said}")
    title = f"{recipe.recipe}{DEBUG_SUFFIX if recipe.debug else ''}-N"
    run = Path(recipe.runs_dir) / (run_name(recipe, allocation) or title)
    folds = number_of_folds(recipe)
    if folds is not None:
        run = run.with_name(fold_name(run.name, 1))
        print(f"{folds} runs, one for each fold; the first of them")
    every = recipe.checkpoint.every_n_steps
    when = "at the end" if every is None else f"every {every} steps and at the end"
    shapes = [(name, tuple(p.shape)) for name, p in net.named_parameters()]
    saved = checkpoint_bytes(shapes, plan.strategy, plan.precision, recipe.optim)
    print(
        f"would write\n  {run}/{', '.join(_files(recipe, plan))}\n"
        f"  {run}/checkpoints/step-N {when}, about {size_of(saved)} each"
    )
    return ExitCode.DONE


def _files(recipe: Recipe, plan: Plan) -> list[str]:
    """What comes into the run folder beside the checkpoints, for this kind of data and task."""
    files = ["recipe.yaml", "plan.json", "metrics.jsonl"]
    files += ["tokenizer.json"] if "tokenizer" in type(recipe.data).model_fields else []
    files += ["preprocessing.json"] if isinstance(recipe.data, LabelledData) else []
    return files + (["evaluation/"] if plan.task == "classification" else [])
