"""Folders of small runs on any data, as the supervisor would make them."""

from __future__ import annotations

from pathlib import Path

import torch

from lm_train import checkpoint, runs
from lm_train.hardware import Machine
from lm_train.plan import make_plan
from lm_train.recipe import load
from lm_train.runs import RunFolder

SMALL = {
    "optim": "{kind: adamw, learning_rate: 1e-3, schedule: constant}",
    "trainer.max_steps": "12",
    "trainer.log_every_n_steps": "1",
    "trainer.val_check_interval": "null",
    "checkpoint.every_n_steps": "null",
    "tracking.wandb": "disabled",
}


def small_run(runs_dir: Path, recipe: str, *words: str, name: str = "run") -> RunFolder:
    """A dozen steps of a recipe; `words` come last, and win."""
    given = SMALL | dict(word.split("=", 1) for word in words)
    asked = load([f"recipe={recipe}", *(f"{k}={v}" for k, v in given.items()), f"name={name}", f"runs_dir={runs_dir}"])
    return runs.create(asked, make_plan(asked, Machine(cpu_cores=2, gpus=())))


def save_something(run: RunFolder) -> None:
    """A good checkpoint of step 1 of some network, so that the run has one."""
    checkpoint.save(run.checkpoints / "step-1", checkpoint.views_of(torch.nn.Linear(2, 2), None, 0, 1), {"step": 1})
