"""All ranks do the same at the same step: a signal sets a flag on some of them, the budget is rank 0's to judge, and a small
host-side reduction makes both known."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist

from lm_train import signals
from lm_train.budget import Rounds, Wish
from lm_train.budget.guard import Kind
from lm_train.callbacks.budget import BudgetGuard
from lm_train.errors import ExitCode
from lm_train.loop import StepTrainer

PERIOD_S = 1.0
"""About how often the ranks ask one another."""


class StopAgreement(L.Callback):
    """Stops the run at a step boundary, or between two batches of an evaluation, once any rank was told to or the budget ends.

    A reduction (MAX) of a few numbers, the exit code asked for, the seconds from boundary to boundary and the budget's wishes,
    starts about once a second and is read at the next boundary, so that it travels while the step computes. The reduced time
    also decides, equally on all ranks, at which boundary the next one starts. A single process just looks.

    Args:
        budget: what rank 0 wishes for the budget's sake.
    """

    def __init__(self, budget: BudgetGuard, period_s: float = PERIOD_S) -> None:
        self.budget, self.period_s = budget, period_s
        self._group: Any = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._rounds = Rounds(self.period_s)
        self._work: Any = None
        self._message = torch.zeros(7)
        self._count = 0
        self._since: tuple[float, int] | None = None

    def _begin(self, trainer: L.Trainer) -> None:
        self._begin_anew()
        if trainer.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._begin(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer)

    def on_train_batch_end(self, trainer: StepTrainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.step_is_complete:
            self._boundary(trainer, "train")

    def on_validation_batch_end(self, trainer: StepTrainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._evaluation_boundary(trainer, "val", trainer.num_val_batches[0] - args[2] - 1)

    def on_test_batch_end(self, trainer: StepTrainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._evaluation_boundary(trainer, "test", trainer.num_test_batches[0] - args[2] - 1)

    def _evaluation_boundary(self, trainer: StepTrainer, kind: Kind, batches_left: float) -> None:
        """A stop ends an evaluation too; what it has seen so far is not a result and is dropped."""
        self._boundary(trainer, kind, batches_left)
        if trainer.stop_code is not None and batches_left > 0:
            raise StopIteration  # how Lightning's evaluation loop is told that its data have ended

    def _boundary(self, trainer: StepTrainer, kind: Kind, batches_left: float = 0) -> None:
        """A place that all ranks pass equally often."""
        wish = self.budget.wish(trainer, kind, batches_left)
        if trainer.world_size == 1:
            self._act(trainer, signals.requested(), wish)
            return
        self._count += 1
        match self._rounds.boundary():
            case "ask":
                asked = (float(signals.requested() or 0), self._seconds())
                self._message = torch.tensor(
                    [*asked, wish.stop, wish.save, wish.hold, wish.soon, wish.max_steps], dtype=torch.float64
                )
                self._work = dist.all_reduce(self._message, dist.ReduceOp.MAX, group=self._group, async_op=True)
            case "act":
                self._work.wait()
                self._work = None
                code, seconds, stop, save, hold, soon, max_steps = self._message.tolist()
                agreed = Wish(bool(stop), bool(save), bool(hold), int(soon), int(max_steps))
                self._act(trainer, ExitCode(int(code)) if code else None, agreed)
                self._rounds.answered(seconds, int(soon))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._end()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    def _end(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None

    def _seconds(self) -> float:
        """Mean wall time between two boundaries since the last question."""
        now = time.monotonic()
        before, self._since = self._since, (now, self._count)
        return (now - before[0]) / (self._count - before[1]) if before else self.period_s

    def _act(self, trainer: StepTrainer, code: ExitCode | None, wish: Wish) -> None:
        """What all ranks have agreed on; a signal comes before the budget, whose stop ends with success."""
        if code is not None or wish.stop:
            trainer.stop_code = ExitCode.DONE if code is None else code
            trainer.should_stop = True
            if code is None:
                self.budget.stopped(trainer)
            return
        if wish.max_steps:
            self.budget.move_end(trainer, wish.max_steps)
        trainer.save_is_due |= wish.save
        trainer.only_final_save |= wish.hold
