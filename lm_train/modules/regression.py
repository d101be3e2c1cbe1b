"""Numbers for each sample, with the mean squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_train.data import Batch
from lm_train.data.batches import Split
from lm_train.modules.base import TrainingModule


class Regression(TrainingModule):
    """`net` maps `inputs` to (B, values); `targets` are (B, values)."""

    def loss(self, batch: Batch) -> Tensor:
        return self._errors(batch).sum()

    def _errors(self, batch: Batch) -> Tensor:  # -> (B,), mean of the squared errors of each sample's values
        return (self.net(**self.inputs(batch)).float() - batch["targets"]).square().mean(dim=-1)

    def start_evaluation(self) -> None:
        self._totals = torch.zeros(2, dtype=torch.float64, device=self.device)

    def evaluate(self, batch: Batch) -> None:
        valid = batch["valid"]
        self._totals += torch.stack(((self._errors(batch) * valid).double().sum(), valid.double().sum()))

    def evaluation(self, split: Split) -> dict[str, Tensor]:
        total, count = self.summed(self._totals)
        return {"loss": total / count, "mse": total / count}
