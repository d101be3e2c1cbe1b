"""What is counted of a classification, batch after batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

MOST_CLASSES = 2000
"""Up to so many classes every pair of true and predicted class is counted (32 MB); beyond, each class alone."""


class ClassCounts(Metric):
    """How many samples of each true class were predicted as each class.

    Every metric of a classification (accuracy, precision, recall, F1, the confusion matrix) follows from these counts, and
    the counts of several ranks add up. They are whole numbers, exact whatever the precision of the network: no strategy and
    no precision casts integers. Counting never waits for the device. Nothing here talks to other ranks; who wants the counts
    of all sums up `cells`.

    Args:
        n_classes: C.
    """

    full_state_update = False
    cells: Tensor
    """Whole numbers: with up to MOST_CLASSES classes (C * C + 1,), the confusion matrix (true class, predicted class) row
    by row; with more (3 * C + 1,), of each class the hits, the predictions and the samples. The last one counts the samples
    that only fill up a batch."""

    def __init__(self, n_classes: int) -> None:
        super().__init__(sync_on_compute=False)
        self.n_classes = n_classes
        self.whole = n_classes <= MOST_CLASSES
        cells = n_classes * (n_classes if self.whole else 3) + 1
        self.add_state("cells", torch.zeros(cells, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, valid: Tensor | None = None) -> None:
        """Counts a batch; the predicted class is the one with the highest logit, the first of equal ones.

        Args:
            logits: (B, C).
            labels: true classes, (B,).
            valid: which samples count, (B,) bool; None: all.
        """
        predicted = logits.argmax(dim=-1)  # (B,)
        nowhere = self.cells.numel() - 1
        if self.whole:
            places = [labels * self.n_classes + predicted]
        else:
            hits = torch.where(predicted == labels, labels, nowhere)
            places = [hits, self.n_classes + predicted, 2 * self.n_classes + labels]
        for place in places:
            place = place if valid is None else torch.where(valid, place, nowhere)
            self.cells.index_add_(0, place, torch.ones_like(place))

    def compute(self) -> Tensor:
        """The cells that count, of this rank: (C, C), or (3, C) with more than MOST_CLASSES classes."""
        return self.cells[:-1].view(-1, self.n_classes)
