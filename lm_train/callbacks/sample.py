"""A sample of what the trained model does at the end of the run."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as L
from torch import nn

from lm_train import heartbeat
from lm_train.heartbeat import Phase
from lm_train.loop import StepTrainer
from lm_train.strategy import is_sharded


class Sample(L.Callback):
    """Draws text once the last step is done, while the network still stands as it was trained.

    Where parameters are sharded each forward pass needs every rank, and all of them draw the same text.

    Args:
        text_of: what a network has to say; see `lm_train.generate`.
    """

    def __init__(self, text_of: Callable[[nn.Module], str]) -> None:
        self.text_of = text_of
        self.text: str | None = None

    def on_train_end(self, trainer: StepTrainer, pl_module: L.LightningModule) -> None:
        if trainer.stop_code is None and (trainer.is_global_zero or is_sharded(trainer.strategy)):
            self.draw(pl_module.net)

    def draw(self, net: nn.Module) -> None:
        with heartbeat.during(Phase.SAMPLE):
            self.text = self.text_of(net)
