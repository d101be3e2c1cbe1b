"""The beats that the training loop gives its supervisor; see `lm_train.heartbeat`."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L

from lm_train import heartbeat
from lm_train.heartbeat import Phase
from lm_train.loop import StepTrainer


class Heartbeats(L.Callback):
    """Marks every micro batch and every batch of an evaluation; it must stand before whatever takes time at these places.

    Args:
        compiles: whether the network is compiled, which happens inside of steps and takes minutes.
    """

    def __init__(self, compiles: bool = False) -> None:
        if compiles:
            _mark_compilations()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        heartbeat.mark(Phase.DATA, trainer.global_step)

    def on_train_batch_start(self, *args: Any) -> None:
        heartbeat.mark(Phase.STEP)

    def on_train_batch_end(self, trainer: StepTrainer, *args: Any) -> None:
        heartbeat.mark(Phase.BOUNDARY, trainer.global_step)

    def on_validation_start(self, *args: Any) -> None:
        heartbeat.mark(Phase.VALIDATION)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        last = args[2] + 1 == trainer.num_val_batches[0]
        heartbeat.mark(Phase.EVALUATE if last else Phase.VALIDATION)

    def on_validation_end(self, *args: Any) -> None:
        heartbeat.mark(Phase.BOUNDARY)

    def on_test_start(self, *args: Any) -> None:
        heartbeat.mark(Phase.TEST)

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        last = args[2] + 1 == trainer.num_test_batches[0]
        heartbeat.mark(Phase.EVALUATE if last else Phase.TEST)

    def on_test_end(self, *args: Any) -> None:
        heartbeat.mark(Phase.FINISH)

    def on_train_end(self, *args: Any) -> None:
        heartbeat.mark(Phase.FINISH)


def _mark_compilations() -> None:
    """torch.compile works inside a forward or backward pass, again wherever a shape is new."""
    from torch._dynamo.callback import on_compile_end, on_compile_start  # seconds of imports that few runs need

    compiling = heartbeat.during(Phase.COMPILE)

    def start(_: Any) -> None:
        nonlocal compiling
        compiling = heartbeat.during(Phase.COMPILE)
        compiling.__enter__()

    def end(_: Any) -> None:
        compiling.__exit__(None, None, None)

    on_compile_start(start)
    on_compile_end(end)
