"""All ranks stop at the same step: a signal sets a flag on some of them, a small host-side reduction makes it known."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist

from lm_train import signals
from lm_train.errors import ExitCode
from lm_train.loop import StepTrainer

PERIOD_S = 1.0
"""About how often the ranks ask one another."""


class StopAgreement(L.Callback):
    """Stops the run at a step boundary, or between two batches of a validation, once any rank was told to.

    A reduction (MAX) of two numbers, the exit code asked for and the seconds from boundary to boundary, starts about once a
    second and is read at the next boundary, so that it travels while the step computes. The reduced time also decides,
    equally on all ranks, at which boundary the next one starts. A single process just looks at its flag.
    """

    def __init__(self, period_s: float = PERIOD_S) -> None:
        self.period_s = period_s
        self._group: Any = None
        self._work: Any = None
        self._message = torch.zeros(2)
        self._count = self._next = 0
        self._since: tuple[float, int] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._work, self._since = None, None
        self._count, self._next = 0, 1
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")

    def on_train_batch_end(self, trainer: StepTrainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.step_is_complete:
            self._boundary(trainer)

    def on_validation_batch_end(self, trainer: StepTrainer, pl_module: L.LightningModule, *args: Any) -> None:
        """A stop ends a validation too; what it has seen so far is not a result and is dropped."""
        if trainer.state.fn == "fit":
            self._boundary(trainer)
            if trainer.stop_code is not None:
                raise StopIteration  # how Lightning's evaluation loop is told that its data have ended

    def _boundary(self, trainer: StepTrainer) -> None:
        """A place that all ranks pass equally often."""
        if trainer.world_size == 1:
            self._stop(trainer, signals.requested())
            return
        self._count += 1
        if self._work is not None:
            self._work.wait()
            self._work = None
            code, seconds = int(self._message[0]), float(self._message[1])
            self._stop(trainer, ExitCode(code) if code else None)
            self._next = self._count + max(1, round(self.period_s / max(seconds, 1e-6)))
        elif self._count >= self._next:
            self._message = torch.tensor([float(signals.requested() or 0), self._seconds()])
            self._work = dist.all_reduce(self._message, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None

    def _seconds(self) -> float:
        """Mean wall time between two boundaries since the last question."""
        now = time.monotonic()
        before, self._since = self._since, (now, self._count)
        return (now - before[0]) / (self._count - before[1]) if before else self.period_s

    @staticmethod
    def _stop(trainer: StepTrainer, code: ExitCode | None) -> None:
        if code is not None:
            trainer.stop_code = code
            trainer.should_stop = True
