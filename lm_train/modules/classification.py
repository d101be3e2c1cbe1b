"""One of several classes for each sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_train.data import Batch
from lm_train.data.batches import Split
from lm_train.metrics import ClassCounts, ClassScores
from lm_train.modules.base import TrainingModule
from lm_train.plan import Plan
from lm_train.recipe import AnyOptim


class Classification(TrainingModule):
    """`net` maps the inputs of a batch to logits, (B, classes).

    What is trained may be weighted, smoothed and mixed; an evaluation's loss is the plain mean cross-entropy over the
    samples, so that it means the same whatever the training does.

    Args:
        class_names: in the order of the logits.
        label_smoothing: share of each target that is spread over all classes.
    """

    scores: ClassScores | None = None
    """Of the last evaluation that ended, over all ranks."""
    _losses: Tensor

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
        self.counts = ClassCounts(len(class_names))

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy with the targets `labels`, (B,) classes or (B, classes) shares; `weights`, (B,), where there are."""
        logits = self.logits(batch).float()
        smoothing = self.label_smoothing if self.net.training else 0.0
        losses = F.cross_entropy(logits, batch["labels"], reduction="none", label_smoothing=smoothing)
        return (losses * batch["weights"]).sum() if "weights" in batch else losses.sum()

    def logits(self, batch: Batch) -> Tensor:
        return self.net(**self.inputs(batch))

    def start_evaluation(self) -> None:
        self.counts.to(self.device).reset()
        self._losses = torch.zeros(1, dtype=torch.float64, device=self.device)

    def evaluate(self, batch: Batch) -> None:
        logits, labels, valid = self.logits(batch), batch["labels"], batch["valid"]
        losses = F.cross_entropy(logits.float(), labels, reduction="none").double()
        self._losses += torch.where(valid, losses, 0.0).sum()  # a sample that does not count may be infinite
        self.counts.update(logits, labels, valid)

    def evaluation(self, split: Split) -> dict[str, Tensor]:
        """One sum over the ranks for all metrics; fp64 holds the counts exactly, up to 2^53."""
        totals = self.summed(torch.cat((self._losses, self.counts.compute().flatten().double()))).cpu()
        counted = totals[1:].to(torch.int64).view(-1, len(self.class_names))
        self.scores = ClassScores.of(self.class_names, counted.numpy())
        metrics = {"loss": float(totals[0]) / max(1, int(self.scores.samples.sum())), **self.scores.metrics()}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
