"""When to save, what to keep: the newest, the best, and every n-th on the way."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EarlyStopping

from lm_train import checkpoint, heartbeat
from lm_train.callbacks.ledger import Ledger
from lm_train.callbacks.metrics import Metrics
from lm_train.errors import StopRequested
from lm_train.heartbeat import Phase
from lm_train.loop import StepTrainer
from lm_train.modules import TrainingModule
from lm_train.recipe import CheckpointSection
from lm_train.runs import RunFolder, write_atomically
from lm_train.strategy import take_buffers_of_first_rank

MONITOR = "val/loss"
"""The metric of which the lowest value is best."""


class Checkpoints(L.Callback):
    """Saves every n steps, at every new best validation, and at the end however it came.

    Args:
        section: how often, and how many are kept.
        folder: the run's.
        ledger: which has all steps of a checkpoint on disk before it is published.
        metrics: whose clock does not count the saving.
        state: values for state.json beyond the counters.
        saved: told the step and the seconds of each save.
    """

    def __init__(
        self,
        section: CheckpointSection,
        folder: RunFolder,
        ledger: Ledger,
        metrics: Metrics,
        state: Callable[[], dict[str, Any]],
        saved: Callable[[int, float], None],
    ) -> None:
        self.section, self.folder, self.ledger, self.metrics = section, folder, ledger, metrics
        self.state, self.saved = state, saved
        self._saved_step: int | None = None
        self._best = float("inf")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._saved_step = trainer.global_step or None
        best = _read(self.folder.checkpoints / "best")
        if best and best["step"] <= trainer.global_step:
            self._best = best[MONITOR]

    def on_train_batch_end(self, trainer: StepTrainer, pl_module: TrainingModule, *args: Any) -> None:
        # a checkpoint knows of the validation at its step, or a run resumed from it would lose that validation; the last
        # step is saved first, since `train` makes up for a last validation that is missing
        last = trainer.global_step == trainer.max_steps
        if trainer.step_is_complete and (last or (self._is_due(trainer) and not trainer.validation_is_due)):
            self._save(trainer, pl_module)

    def _is_due(self, trainer: StepTrainer) -> bool:
        every = self.section.every_n_steps
        by_number = every is not None and trainer.global_step % every == 0 and not trainer.only_final_save
        return trainer.save_is_due or by_number

    def on_validation_end(self, trainer: StepTrainer, pl_module: TrainingModule) -> None:
        if trainer.stop_code is not None:  # cut off; the end of the training saves
            return
        value = trainer.callback_metrics.get(MONITOR)
        if value is not None and float(value) < self._best:
            self._best = float(value)
            self._save(trainer, pl_module)
            if trainer.is_global_zero:
                content = {
                    "checkpoint": f"step-{trainer.global_step}",
                    "step": trainer.global_step,
                    MONITOR: self._best,
                }
                write_atomically(self.folder.checkpoints / "best", json.dumps(content) + "\n")
                self._remove_old()
        elif self._is_due(trainer):
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: StepTrainer, pl_module: TrainingModule) -> None:
        self._save(trainer, pl_module)

    def on_exception(self, trainer: StepTrainer, pl_module: TrainingModule, exception: BaseException) -> None:
        # a stop that came while the loop waited for data: parameters stand as the last step left them; several ranks
        # cannot save here, since each may be at another place
        if isinstance(exception, StopRequested) and trainer.world_size == 1 and trainer.global_step > 0:
            self._save(trainer, pl_module)

    def _save(self, trainer: StepTrainer, module: TrainingModule) -> None:
        if trainer.global_step != self._saved_step:
            with heartbeat.during(Phase.SAVE):
                self._write(trainer, module)

    def _write(self, trainer: StepTrainer, module: TrainingModule) -> None:
        step = trainer.global_step
        began = time.monotonic()
        self.metrics.pause()  # waits for the device
        self.ledger.write(trainer, module, durable=True)
        target = self.folder.checkpoints / f"step-{step}"
        state = {"step": step, **_state_of(trainer), **self.state()}
        take_buffers_of_first_rank(module.net)
        views = checkpoint.views_of(module.net, trainer.optimizers[0], trainer.global_rank, trainer.world_size)
        checkpoint.save(target, views, state)
        if trainer.is_global_zero:
            write_atomically(
                self.folder.checkpoints / "latest", json.dumps({"checkpoint": target.name, "step": step}) + "\n"
            )
            self._remove_old()
        self._saved_step = step
        trainer.save_is_due = False
        self.metrics.go_on()
        self.saved(step, time.monotonic() - began)

    def _remove_old(self) -> None:
        """Keeps the newest `keep_last` and the best; also clears what a killed save has left."""
        pointers = (_read(self.folder.checkpoints / name) or {} for name in ("best", "latest"))
        wanted = {pointer.get("checkpoint") for pointer in pointers}
        saved = sorted(self.folder.checkpoints.glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
        for old in saved[: -self.section.keep_last]:
            if old.name not in wanted:
                shutil.rmtree(old)
        for torn in self.folder.checkpoints.glob(".step-*.partial"):
            shutil.rmtree(torn, ignore_errors=True)


def _state_of(trainer: L.Trainer) -> dict[str, Any]:
    """What Lightning's parts must remember: early stopping's count, fp16's gradient scale."""
    state: dict[str, Any] = {"precision": trainer.precision_plugin.state_dict()}
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping):
            state["early_stopping"] = {"wait_count": callback.wait_count, "best_score": float(callback.best_score)}
    return state


def restore_state(trainer: L.Trainer, state: dict[str, Any]) -> None:
    """Gives Lightning's parts what `state.json` remembers of them; settings such as patience stay the recipe's."""
    # torch's and DeepSpeed's gradient scalers have other states: from one to the other the scale starts anew
    if state["precision"].keys() == trainer.precision_plugin.state_dict().keys():
        trainer.precision_plugin.load_state_dict(state["precision"])
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping) and "early_stopping" in state:
            callback.wait_count = state["early_stopping"]["wait_count"]
            callback.best_score = torch.tensor(state["early_stopping"]["best_score"])


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
