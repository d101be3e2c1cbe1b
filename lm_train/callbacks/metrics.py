"""Reads loss, norms and times at logging steps only, and hands one row to every logger."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from lm_train.callbacks.ledger import Ledger
from lm_train.data import DataModule
from lm_train.loop import StepTrainer
from lm_train.modules import TrainingModule
from lm_train.plan import Plan


class Metrics(L.Callback):
    """Writes the contract's metrics: the first step, every n-th, the last, and each evaluation.

    Between logging steps nothing here touches the device. `latest` holds the newest row for the progress display.

    Args:
        plan: FLOPs, peak, ranks.
        ledger: fetches loss and norm from the device.
        flops_per_sample: forward and backward, of the built model; None where unknown.
        every: optimizer steps between two rows.
        spent: what the run has used in all its starts, by the metric's name.
    """

    def __init__(
        self,
        plan: Plan,
        ledger: Ledger,
        flops_per_sample: int | None,
        every: int,
        spent: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self.plan, self.ledger = plan, ledger
        self.flops_per_sample, self.every = flops_per_sample, every
        self.latest: dict[str, float] = {}
        self.spent = spent
        self._paused = 0.0
        self._mark: tuple[float, int, float] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_step = trainer.global_step + 1
        self._reset_clock(trainer)

    def on_train_batch_end(self, trainer: StepTrainer, pl_module: TrainingModule, *args: Any) -> None:
        step = trainer.global_step
        if not trainer.step_is_complete:
            return
        if step == self._first_step or step % self.every == 0 or step == trainer.max_steps:
            self._log_step(trainer, pl_module, step)

    def _log_step(self, trainer: StepTrainer, module: TrainingModule, step: int) -> None:
        plan, data, tokens = self.plan, trainer.datamodule, self.plan.tokens_per_step
        assert isinstance(data, DataModule)
        self.ledger.write(trainer, module)  # waits for the device
        values = self.ledger.last
        assert values is not None
        assert values.step == step
        assert self._mark is not None
        began, step_before, waited_before = self._mark
        steps = step - step_before
        seconds = (time.perf_counter() - began - self._paused) / steps
        assert data.train_loader is not None
        row: dict[str, float] = {
            "epoch": data.epoch(step),
            **({"tokens": step * tokens} if tokens is not None else {}),
            "samples": step * plan.global_batch_size,
            "train/loss": float.fromhex(values.loss),
            "train/grad_norm": float.fromhex(values.grad_norm),
            "train/learning_rate": module.step_learning_rate,
            "perf/step_seconds": seconds,
            "perf/data_wait_seconds": (data.train_loader.wait_seconds - waited_before) / steps,
            **({"perf/tokens_per_second": tokens / seconds} if tokens is not None else {}),
            "perf/samples_per_second": plan.global_batch_size / seconds,
            "memory/peak_bytes": peak_bytes(plan),
            **self.spent(),
        }
        if plan.prediction is not None:
            row["perf/predicted_step_seconds"] = plan.prediction.step.seconds
            row["memory/predicted_peak_bytes"] = plan.prediction.memory.total
        if plan.peak_flops_per_device is not None and self.flops_per_sample is not None:
            peak = plan.peak_flops_per_device * plan.world_size
            row["perf/mfu"] = row["perf/samples_per_second"] * self.flops_per_sample / peak
        row |= {name: float(value) for name, value in module.further_metrics().items()}
        self._write(trainer, row, step)
        self._reset_clock(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pause()

    def on_validation_end(self, trainer: StepTrainer, pl_module: L.LightningModule) -> None:
        if trainer.stop_code is None:
            self._log_evaluation(trainer, "val/")
        self.go_on()

    def on_test_end(self, trainer: StepTrainer, pl_module: L.LightningModule) -> None:
        if trainer.stop_code is None:
            self._log_evaluation(trainer, "test/")

    def pause(self) -> None:
        """Takes the time until `go_on` out of the step time (validation, saving); steps still under way belong to it."""
        if self.plan.accelerator == "gpu":
            torch.cuda.synchronize()
        self._pause_began = time.perf_counter()

    def go_on(self) -> None:
        self._paused += time.perf_counter() - self._pause_began

    def _log_evaluation(self, trainer: L.Trainer, prefix: str) -> None:
        row = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}
        self._write(trainer, row, trainer.global_step)

    def _write(self, trainer: L.Trainer, row: dict[str, float], step: int) -> None:
        self.latest |= row
        for logger in trainer.loggers:
            logger.log_metrics(row, step)

    def _reset_clock(self, trainer: L.Trainer) -> None:
        data = trainer.datamodule
        self._mark = (time.perf_counter(), trainer.global_step, data.train_loader.wait_seconds)
        self._paused = 0.0


def forget_peak() -> None:
    """Counts `peak_bytes` from here on, where the system can: a vocabulary that was made in this process is not training."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)


def peak_bytes(plan: Plan) -> int:
    """Most memory this rank has held: allocated on the GPU, else resident (getrusage's unit is kilobytes on Linux)."""
    if plan.accelerator == "gpu":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
