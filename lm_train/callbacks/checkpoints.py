"""When to save, what to keep: the newest, the best, and every n-th for ever. Written while the training goes on."""

from __future__ import annotations

import contextlib
import math
import os
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
from lm_train.checkpoint import HostMemory, Published, Snapshot, Writer
from lm_train.checkpoint.snapshot import bytes_of
from lm_train.clusters.machine import available_host_memory
from lm_train.errors import CheckpointError, OutputError, StopRequested, UsageError
from lm_train.heartbeat import Phase
from lm_train.loop import StepTrainer
from lm_train.modules import TrainingModule
from lm_train.recipe import CheckpointSection, Recipe
from lm_train.runs import RunFolder
from lm_train.saved import BEST, point, pointed
from lm_train.saved.publish import Keeping, remove_old
from lm_train.strategy import take_buffers_of_first_rank

MONITOR = "val/loss"
"""What early stopping looks at."""
ENOUGH_MEMORY = 2.0
"""A copy is made where so many times its bytes are free on the host, over all ranks of the node."""
LOOK_S = 1.0
"""How often a wait for a write looks whether that goes on."""
LAST_WORDS_S = 4.0
"""How long a training that has failed waits for a write under way; the supervisor ends the others a second later."""


class Checkpoints(L.Callback):
    """Saves every n steps, at every new best validation, and at the end however it came.

    A save takes a copy of the training in host memory, which a thread writes while the training goes on; the next save, and
    the end, wait for it. Where memory is short the training waits for the whole save.

    Args:
        section: how often, and what is kept.
        folder: the run's.
        ledger: which has all steps of a checkpoint on disk before it is published.
        metrics: whose clock does not count the saving.
        state: values for state.json beyond the counters.
        before: called on every rank before a save, which does not come about if it raises.
        saved: told the step of each save, the seconds for which the training stood still for it, and those until it was
            published, or None for these as long as it is under way.
    """

    def __init__(
        self,
        section: CheckpointSection,
        folder: RunFolder,
        ledger: Ledger,
        metrics: Metrics,
        state: Callable[[], dict[str, Any]],
        saved: Callable[[int, float, float | None], None],
        before: Callable[[StepTrainer, TrainingModule], None] = lambda trainer, module: None,
    ) -> None:
        self.section, self.folder, self.ledger, self.metrics = section, folder, ledger, metrics
        self.state, self.saved, self.before = state, saved, before
        self.writer, self.memory = Writer(), HostMemory()
        self._snapshot: Snapshot | None = None
        self._prepared = False
        self._saved_step: int | None = None
        self._blocked = 0.0
        self._best = math.inf

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._saved_step = trainer.global_step or None
        try:
            best = pointed(self.folder.checkpoints, BEST)
        except CheckpointError:
            best = None  # damaged: the next validation is the best again
        same = best is not None and (best.get("monitor"), best.get("mode")) == (self.section.monitor, self.section.mode)
        if best is not None and same and best["step"] <= trainer.global_step:
            self._best = self._signed(float(best["value"]))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.group = checkpoint.group_of_all()

    def on_train_batch_end(self, trainer: StepTrainer, pl_module: TrainingModule, *args: Any) -> None:
        if not trainer.step_is_complete:
            return
        self._take(self.writer.ready())
        if not self._prepared:
            self._prepare(trainer, pl_module)
        # a checkpoint knows of the validation at its step, or a run resumed from it would lose that validation; the last
        # step is saved first, since `train` makes up for a last validation that is missing
        last = trainer.global_step == trainer.max_steps
        if last or (self._is_due(trainer) and not trainer.validation_is_due):
            self._save(trainer, pl_module)

    def _prepare(self, trainer: StepTrainer, module: TrainingModule) -> None:
        """After the first step, when the optimizer has its states: memory for the copies, if there will be saves on the way."""
        self._prepared = True
        section, last = self.section, trainer.max_steps
        often = (section.every_n_steps, section.keep_every_n_steps, trainer.validate_every)
        if not any(every is not None and every < last for every in often):
            return
        views = checkpoint.views_of(module.net, trainer.optimizers[0], trainer.global_rank, trainer.world_size)
        flats = [view.flat for view in views.to_save()]
        n_bytes = sum(map(bytes_of, flats))
        if self._is_asynchronous(n_bytes):
            self.memory.prepare(n_bytes, pinned=any(flat.is_cuda for flat in flats))

    def _is_due(self, trainer: StepTrainer) -> bool:
        steps = (self.section.every_n_steps, self.section.keep_every_n_steps)
        by_number = any(n is not None and trainer.global_step % n == 0 for n in steps) and not trainer.only_final_save
        return trainer.save_is_due or by_number

    def on_validation_end(self, trainer: StepTrainer, pl_module: TrainingModule) -> None:
        if trainer.stop_code is not None:  # cut off; the end of the training saves
            return
        value = self._monitored(trainer)
        if value is not None and self._signed(value) < self._best:
            self._best = self._signed(value)
            best = {"monitor": self.section.monitor, "mode": self.section.mode, "value": value}
            if trainer.global_step != self._saved_step:
                self._save(trainer, pl_module, best)
            else:
                self._take(self._finished())
                if trainer.is_global_zero:
                    self._keep(self.folder.checkpoints / f"step-{trainer.global_step}", best)
        elif trainer.state.fn == "fit" and self._is_due(trainer):
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: StepTrainer, pl_module: TrainingModule) -> None:
        self._save(trainer, pl_module)
        with heartbeat.during(Phase.SAVE):
            self._take(self._finished())

    def on_exception(self, trainer: StepTrainer, pl_module: TrainingModule, exception: BaseException) -> None:
        # a stop that came while the loop waited for data: parameters stand as the last step left them; several ranks
        # cannot save here, since each may be at another place
        if isinstance(exception, StopRequested) and trainer.world_size == 1 and trainer.global_step > 0:
            self._save(trainer, pl_module)
            self._take(self._finished())
        else:
            with contextlib.suppress(OutputError):  # what ended the training counts
                self._take(self.writer.finish(LAST_WORDS_S))

    def _monitored(self, trainer: StepTrainer) -> float | None:
        metrics = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if not metrics:
            return None
        if self.section.monitor not in metrics:
            raise UsageError(
                f"checkpoint.monitor={self.section.monitor}: a validation of this run gives {', '.join(sorted(metrics))}"
            )
        return float(metrics[self.section.monitor])

    def _signed(self, value: float) -> float:
        """The lower the better; what is not a number is never best."""
        return value if self.section.mode == "min" else -value

    def _save(self, trainer: StepTrainer, module: TrainingModule, best: dict[str, Any] | None = None) -> None:
        if trainer.global_step != self._saved_step:
            with heartbeat.during(Phase.SAVE):
                self._write(trainer, module, best)

    def _write(self, trainer: StepTrainer, module: TrainingModule, best: dict[str, Any] | None) -> None:
        step = trainer.global_step
        began = time.monotonic()
        self.metrics.pause()  # waits for the device
        self.ledger.write(trainer, module, before_save=True)
        self.before(trainer, module)
        self._take(self._finished())
        target = self.folder.checkpoints / f"step-{step}"
        state = {"step": step, **_state_of(trainer), **self.state()}
        take_buffers_of_first_rank(module.net)
        views = checkpoint.views_of(module.net, trainer.optimizers[0], trainer.global_rank, trainer.world_size)
        every = list(views.to_save())
        memory = self.memory if self._is_asynchronous(sum(bytes_of(view.flat) for view in every)) else None
        snapshot = self._snapshot = Snapshot(views, state, memory, every)

        def write() -> Published:
            self.ledger.sync()
            return checkpoint.write(snapshot, target, self.group, lambda folder: self._keep(folder, best))

        self.writer.begin(write)
        self._saved_step = step
        trainer.save_is_due = False
        published = None if memory is not None else self._finished()
        self._blocked = time.monotonic() - began
        self.metrics.go_on()
        self.saved(step, self._blocked, None)
        self._take(published)

    def _finished(self) -> tuple[Published, float] | None:
        """What was under way, once it is done; a large write is no hang as long as it goes on."""
        written, seen = None, -1
        while self.writer.is_busy and written is None:
            written = self.writer.finish(LOOK_S)
            if self._snapshot is not None and self._snapshot.n_given != seen:
                seen = self._snapshot.n_given
                heartbeat.alive()
        return written

    def _take(self, written: tuple[Published, float] | None) -> None:
        if written is not None:
            self._snapshot = None  # it holds on to the tensors themselves
            published, seconds = written
            self.saved(int(published.folder.name.removeprefix("step-")), self._blocked, seconds)

    def _is_asynchronous(self, n_bytes: int) -> bool:
        if self.section.asynchronous != "auto":
            return self.section.asynchronous
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return self.memory.n_bytes >= n_bytes or available_host_memory() > ENOUGH_MEMORY * n_bytes * ranks

    def _keep(self, newest: Path, best: dict[str, Any] | None) -> None:
        """On rank 0: what `newest` is besides, and what goes for it."""
        if best is not None:
            point(self.folder.checkpoints, BEST, newest, **best)
        remove_old(newest, Keeping(self.section.keep_last, self.section.keep_every_n_steps))


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


def has_stopped_early(state: dict[str, Any], recipe: Recipe) -> bool:
    """Whether a saved run had come to its end by `early_stopping_patience`: what was killed after that does not train on."""
    patience, saved = recipe.trainer.early_stopping_patience, state.get("early_stopping")
    return patience is not None and saved is not None and saved["wait_count"] >= patience
