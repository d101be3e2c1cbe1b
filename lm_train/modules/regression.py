"""Numbers for each sample, with the mean squared error."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.regression import MeanSquaredError, R2Score

from lm_train.data import Batch
from lm_train.data.batches import Split
from lm_train.modules.base import TrainingModule
from lm_train.plan import Plan
from lm_train.recipe import AnyOptim


class Regression(TrainingModule):
    """`net` maps the inputs of a batch to (B, values); `targets` are (B, values), each of mean 0 and deviation 1.

    Metrics: `mse` in the squared unit of the data, the mean over the values of a sample; `r2`, the share of each value's
    variance that is explained, likewise.

    Args:
        target_scale: one unit of each target in units of the data, (values,).
    """

    def __init__(self, net: nn.Module, optim: AnyOptim, plan: Plan, seed: int, target_scale: tuple[float, ...]) -> None:
        super().__init__(net, optim, plan, seed)
        self.target_scale = target_scale
        self.mse = MeanSquaredError(num_outputs=len(target_scale))
        self.r2 = R2Score(multioutput="uniform_average")

    def loss(self, batch: Batch) -> Tensor:
        """Mean over a sample's values of the squared errors, summed over the batch, ()."""
        return self._errors(self.predictions(batch), batch).sum()

    def predictions(self, batch: Batch) -> Tensor:  # -> (B, values)
        return self.net(**self.inputs(batch)).float()

    def _errors(self, predictions: Tensor, batch: Batch) -> Tensor:  # -> (B,)
        return (predictions - batch["targets"]).square().mean(dim=-1)

    def start_evaluation(self) -> None:
        for metric in (self.mse, self.r2):
            # R2 is the difference of large sums; here, since a 16-bit precision casts the states with the module
            metric.set_dtype(torch.float64).reset()
        self._totals = torch.zeros(2, dtype=torch.float64, device=self.device)

    def evaluate(self, batch: Batch) -> None:
        valid, predictions = batch["valid"], self.predictions(batch)
        losses = self._errors(predictions, batch) * valid
        self._totals += torch.stack((losses.double().sum(), valid.double().sum()))
        for metric in (self.mse, self.r2):
            metric.update(predictions[valid].double(), batch["targets"][valid].double())

    def evaluation(self, split: Split) -> dict[str, Tensor]:
        total, count = self.summed(self._totals)
        mse = self.mse.compute() * torch.tensor(self.target_scale, dtype=torch.float64, device=self.device).square()
        found = {"loss": total / count, "mse": mse.mean()}
        return found if count < 2 else found | {"r2": self.r2.compute()}  # one sample has no variance to explain
