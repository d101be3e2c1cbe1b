"""When to save, what to keep: the newest, the best, and every n-th on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from lm_train import checkpoint
from lm_train.callbacks.metrics import Metrics
from lm_train.loop import StepTrainer
from lm_train.recipe import CheckpointSection
from lm_train.runs import RunFolder, write_atomically

MONITOR = "val/loss"
"""The metric of which the lowest value is best."""


class Checkpoints(L.Callback):
    """Saves every n steps, at every new best validation, and at the end however it came.

    Args:
        section: how often, and how many are kept.
        folder: the run's.
        metrics: whose clock does not count the saving.
        state: values for state.json beyond the counters.
    """

    def __init__(
        self, section: CheckpointSection, folder: RunFolder, metrics: Metrics, state: Callable[[], dict[str, Any]]
    ) -> None:
        self.section, self.folder, self.metrics, self.state = section, folder, metrics, state
        self._saved_step: int | None = None
        self._best = float("inf")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_step = trainer.global_step or None
        best = _read(self.folder.checkpoints / "best")
        if best and best["step"] <= trainer.global_step:
            self._best = best[MONITOR]

    def on_train_batch_end(self, trainer: StepTrainer, pl_module: L.LightningModule, *args: Any) -> None:
        every = self.section.every_n_steps
        if every is not None and trainer.step_is_complete and trainer.global_step % every == 0:
            self._save(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
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

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer, pl_module)

    def _save(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if step == self._saved_step:
            return
        self.metrics.pause()
        target = self.folder.checkpoints / f"step-{step}"
        state = {"step": step, "callbacks": _callback_states(trainer), **self.state()}
        net, optimizer = module.net, trainer.optimizers[0]
        checkpoint.save(target, net, optimizer, state, trainer.global_rank, trainer.world_size)
        if trainer.is_global_zero:
            write_atomically(
                self.folder.checkpoints / "latest", json.dumps({"checkpoint": target.name, "step": step}) + "\n"
            )
            self._remove_old()
        self._saved_step = step
        self.metrics.go_on()

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


def restore_callbacks(trainer: L.Trainer, states: dict[str, Any]) -> None:
    """Gives Lightning's own callbacks (early stopping) the state they were saved with."""
    for callback in trainer.callbacks:
        if callback.state_key in states:
            callback.load_state_dict(states[callback.state_key])


def _callback_states(trainer: L.Trainer) -> dict[str, Any]:
    states = {c.state_key: c.state_dict() for c in trainer.callbacks}
    return {key: {k: _plain(v) for k, v in state.items()} for key, state in states.items() if state}


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
