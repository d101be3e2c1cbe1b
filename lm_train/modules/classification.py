"""One of several classes for each sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lm_train.data import Batch
from lm_train.data.batches import Split
from lm_train.modules.base import TrainingModule
from lm_train.plan import Plan
from lm_train.recipe import AnyOptim


class Classification(TrainingModule):
    """`net` maps the inputs of a batch to logits, (B, classes).

    Args:
        class_names: in the order of the logits.
        label_smoothing: share of each target that is spread over all classes.
    """

    def __init__(
        self,
        net: nn.Module,
        optim: AnyOptim,
        plan: Plan,
        seed: int,
        class_names: tuple[str, ...],
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(net, optim, plan, seed)
        self.class_names, self.label_smoothing = class_names, label_smoothing
        self.metrics = MetricCollection({"accuracy": MulticlassAccuracy(len(class_names), average="micro")})

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy with the targets `labels`, (B,) classes or (B, classes) shares; `weights`, (B,), where there are."""
        return self._losses(self.logits(batch), batch).sum()

    def logits(self, batch: Batch) -> Tensor:
        return self.net(**self.inputs(batch))

    def _losses(self, logits: Tensor, batch: Batch) -> Tensor:
        losses = F.cross_entropy(
            logits.float(),
            batch["labels"],
            reduction="none",
            label_smoothing=self.label_smoothing if self.training else 0,
        )
        return losses * batch["weights"] if "weights" in batch else losses

    def start_evaluation(self) -> None:
        self.metrics.reset()
        self._totals = torch.zeros(2, dtype=torch.float64, device=self.device)

    def evaluate(self, batch: Batch) -> None:
        valid = batch["valid"]
        logits = self.logits(batch)
        losses = self._losses(logits, batch) * valid
        self._totals += torch.stack((losses.double().sum(), valid.double().sum()))
        self.metrics.update(logits[valid], batch["labels"][valid])

    def evaluation(self, split: Split) -> dict[str, Tensor]:
        total, count = self.summed(self._totals)
        return {"loss": total / count, **self.metrics.compute()}
