"""Where a run ends, and what it leaves out on the way: what the plan could not know, from data, checkpoint and run folder."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from lm_train import anomalies
from lm_train.anomalies import RollBackRow
from lm_train.budget import Account
from lm_train.checkpoint import CheckpointReader
from lm_train.data import DataModule
from lm_train.data.batches import Split
from lm_train.data.order import Skipped, first_position, joined
from lm_train.errors import UsageError
from lm_train.horizon import Correction, Horizon, affordable_steps, recorded_after, steps_of_epochs
from lm_train.plan import Plan
from lm_train.recipe import Recipe
from lm_train.runs import RunFolder


def find_horizon(
    recipe: Recipe, plan: Plan, data: DataModule, checkpoint: CheckpointReader | None, folder: RunFolder
) -> Horizon:
    """The run's last step, the same on all ranks.

    Args:
        recipe: steps, tokens or epochs.
        plan: whose number counts where the recipe gives steps or tokens, and is the first estimate otherwise.
        data: prepared.
        checkpoint: from which the run goes on.
        folder: of the run.

    Raises:
        UsageError: if the epochs cannot be counted, or the checkpoint is beyond them.
    """
    trainer = recipe.trainer
    step = 0 if checkpoint is None else int(checkpoint.state["step"])
    if trainer.max_epochs is not None:
        return Horizon(_epochs(trainer.max_epochs, data, step))
    if trainer.max_steps != "auto" or trainer.max_tokens is not None:
        return Horizon(plan.max_steps)
    found: list[Any] = [_movable(plan, checkpoint, folder, step)]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(found, src=0)  # rank 0's reading counts: a file server may show others an older file
    max_steps, recorded = found[0]
    return Horizon(max_steps, moves=True, recorded=recorded)


def find_skipped(
    plan: Plan, checkpoint: CheckpointReader | None, folder: RunFolder
) -> tuple[Skipped, list[RollBackRow], bool]:
    """The global positions that this start leaves out, the same on all ranks.

    Args:
        plan: of this start.
        checkpoint: from which the run goes on.
        folder: of the run.

    Returns:
        The positions; the run's earlier rollbacks; and whether any of them leaves out more than the checkpoint knew of.
    """
    known = joined(() if checkpoint is None else checkpoint.state.get("skipped", ()))
    found: list[Any] = [anomalies.rollbacks(folder.anomalies)]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(found, src=0)  # rank 0's reading counts: a file server may show others an older file
    rows: list[RollBackRow] = found[0]
    step = 0 if checkpoint is None else int(checkpoint.state["step"])
    new = anomalies.ahead(rows, first_position(step, plan.global_batch_size, known))
    skipped = joined((*known, *new))
    return skipped, rows, skipped != known


def _epochs(epochs: float, data: DataModule, step: int) -> int:
    passes = data.epoch(1)
    if passes <= 0:
        raise UsageError(
            f"trainer.max_epochs={epochs:g}: how many samples {data.label} has is known only when all are read; give "
            "trainer.max_steps"
        )
    steps = steps_of_epochs(epochs, passes)
    if step > steps:
        raise UsageError(
            f"trainer.max_epochs={epochs:g} are {steps} steps, and the run is at step {step} already; give more, or start a new "
            "run with another name="
        )
    return steps


def _movable(
    plan: Plan, checkpoint: CheckpointReader | None, folder: RunFolder, step: int
) -> tuple[int, list[Correction]]:
    """The last step as it was, and its recorded corrections; after a change of the budget, a new estimate without any."""
    account = Account.read(folder)
    horizons = [start.horizons for start in account.starts]
    if checkpoint is None:  # an earlier start, killed before its first checkpoint, may have made some
        unchanged = all(start.limits == plan.limits for start in account.starts)
        return plan.max_steps, recorded_after(0, horizons) if unchanged else []
    saved = checkpoint.state.get("horizon", {})
    own = checkpoint.folder.resolve().parent == folder.checkpoints.resolve()
    if own and saved.get("moves") and saved["limits"] == plan.limits:
        return int(saved["max_steps"]), recorded_after(step, horizons)
    speed = next((s.step_seconds for s in reversed(account.starts) if s.step_seconds is not None), None)
    if own and speed is not None:
        left = account.seconds_left(plan)[0] - account.needed_seconds()
        return affordable_steps(step, max(0.0, left), speed), []
    return (max(plan.max_steps, step + 1) if own else step + plan.max_steps), []


def closing_batches(data: DataModule, recipe: Recipe, rank: int) -> tuple[int, int]:
    """Batches of a rank in the validation and in the test that follow the last step; 0 where nobody can tell before."""
    return (
        _batches(data, "val", recipe.trainer.limit_val_batches, rank),
        _batches(data, "test", recipe.trainer.limit_test_batches, rank),
    )


def _batches(data: DataModule, split: Split, limit: int | None, rank: int) -> int:
    if limit == 0 or not data.has(split):
        return 0
    count = data.count_batches(split, rank)
    return count if limit is None else min(count, limit)
