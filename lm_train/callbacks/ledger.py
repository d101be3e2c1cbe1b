"""Loss, gradient norm and what became of the update wait on the device, and reach `ledger.jsonl` many steps at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch import Tensor

from lm_train import ledger
from lm_train.errors import OutputError
from lm_train.ledger import WITHHELD, Row
from lm_train.loop import StepTrainer
from lm_train.modules import TrainingModule
from lm_train.runs import RunFolder

ROOM = 1024
"""Steps that may wait at most: where logging steps and saves lie further apart, they are written when the room is full."""
LOSS, NORM, WITHHELD_FOR, N_VALUES = 0, 1, 2, 3


Hearer = Callable[[Sequence[Row], Mapping[int, Sequence[int]]], None]


class Ledger(L.Callback):
    """Writes the run's ledger; see `lm_train.ledger` for what a line says.

    A step copies its numbers into a ring on the device and leaves them there: no host waits, no rank talks. `write` fetches
    what has gathered, in one collective for all steps together. It is called at logging steps, before every save, and so at
    the end and before every stop. It must stand before all callbacks that call it.

    The ranks' numbers are gathered and added up on the host in the order of the ranks, not reduced on the way: in which
    order a reduction adds depends on the length of what is reduced, and so on how many steps have gathered.

    Args:
        folder: of the run.
        heard: told the rows of each writing, when they are in the file, and by step the ranks whose own loss was not finite;
            on every rank, `samples` is None on ranks other than 0.
    """

    def __init__(self, folder: RunFolder, heard: Sequence[Hearer] = ()) -> None:
        self.file = folder.ledger
        self.heard = list(heard)
        self.last: Row | None = None
        """The newest row that `write` has fetched."""
        self._unwritten: list[Row] = []
        """Fetched, but a full disk has not taken them; on rank 0."""
        self._synced = True
        """Whether this rank has written nothing since `sync`."""
        self._steps: list[tuple[int, float]] = []
        """Step and learning rate of what waits in the ring."""
        self._ring: Tensor | None = None
        self._slots: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ring = torch.zeros(ROOM, N_VALUES, device=pl_module.device)
        self._slots = [row.unbind() for row in self._ring.unbind()]  # type: ignore[misc]
        self._steps.clear()
        if trainer.is_global_zero:
            ledger.cut(self.file, trainer.global_step)

    def on_train_batch_end(self, trainer: StepTrainer, pl_module: TrainingModule, *args: object) -> None:
        if not trainer.step_is_complete:
            return
        if len(self._steps) == ROOM:
            self.write(trainer, pl_module)
        loss, norm, withheld = self._slots[len(self._steps)]
        loss.copy_(pl_module.step_loss)
        _put(norm, pl_module.own_grad_norm.value)
        _put(withheld, pl_module.step_withheld)
        self._steps.append((trainer.global_step, pl_module.step_learning_rate))

    def write(self, trainer: L.Trainer, module: TrainingModule, before_save: bool = False) -> None:
        """Writes what has gathered; every rank calls it at the same step boundary.

        Args:
            trainer, module: at the boundary.
            before_save: all lines so far must be in the file; else a full disk may still take them another time.

        Raises:
            OutputError: on rank 0, before a save, if they are not.
        """
        self._not_finite: dict[int, list[int]] = {}
        rows = self._rows(trainer, module) if self._steps else []
        self._steps.clear()
        if trainer.is_global_zero and (rows or self._unwritten):
            self._unwritten += rows
            try:
                ledger.append(self.file, self._unwritten)
            except OutputError:
                if before_save:
                    raise
            else:
                self._unwritten.clear()
                self._synced = False
        if rows:
            self.last = rows[-1]
            for hear in self.heard:
                hear(rows, self._not_finite)

    def sync(self) -> None:
        """What is in the file is on disk when this returns; for the thread that is about to publish a checkpoint.

        Raises:
            OutputError: if the disk does not take it.
        """
        if not self._synced:
            self._synced = True  # before: what the training writes meanwhile is for the next time
            ledger.sync(self.file)

    def _rows(self, trainer: L.Trainer, module: TrainingModule) -> list[Row]:
        assert self._ring is not None
        own, world = self._ring[: len(self._steps)], trainer.world_size
        if world > 1:
            gathered = [torch.empty_like(own) for _ in range(world)]
            dist.all_gather(gathered, own.contiguous())
            ranks = torch.stack(gathered).tolist()  # waits for the device
        else:
            ranks = [own.tolist()]
        is_part = module.own_grad_norm.is_part
        rows = []
        for i, (step, learning_rate) in enumerate(self._steps):
            values = [rank[i] for rank in ranks]
            loss = sum(v[LOSS] for v in values) / world
            if not math.isfinite(loss):
                self._not_finite[step] = [rank for rank, v in enumerate(values) if not math.isfinite(v[LOSS])]
            norm = math.sqrt(sum(v[NORM] ** 2 for v in values)) if is_part else values[0][NORM]
            withheld = WITHHELD[int(max(v[WITHHELD_FOR] for v in values))]
            samples = None
            if trainer.is_global_zero:
                ids = trainer.datamodule.sample_ids(step - 1)
                samples = None if ids is None else ledger.hash_of_samples(ids.astype("<i8", copy=False).tobytes())
            rows.append(Row.of(step, samples, loss, norm, learning_rate, withheld))
        return rows


def _put(slot: Tensor, value: Tensor | float) -> None:
    if isinstance(value, Tensor):
        slot.copy_(value)
    else:
        slot.fill_(value)
