"""What every LightningDataModule of ours is to the training: facts for the network, batches for the loop, words for a person."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning.pytorch as L
from torch.utils.data import DataLoader, Dataset

from lm_train.data.batches import Batch, Split
from lm_train.data.loading import TimedLoader, make_loader
from lm_train.plan import DataFacts, Plan
from lm_train.recipe import AnyModel


class DataModule(L.LightningDataModule, ABC):
    """Serves micro batches of finished tensors, by optimizer step.

    Args:
        plan: batch sizes, ranks, workers, steps.
        seed: decides the order of samples and every random choice.
    """

    facts: DataFacts
    """For the network; there after `prepare`, as is what follows."""
    label: str
    """What a person calls the data."""
    fingerprint: str
    """Of everything that decides which samples there are; a checkpoint goes on with the same data only."""

    class_names: tuple[str, ...] = ()
    """Of a classification, in the order of the labels."""
    target_scale: tuple[float, ...] = ()
    """Of a regression: one unit of each value, as the network learns it, in units of the data."""

    def __init__(self, plan: Plan, seed: int) -> None:
        super().__init__()
        self.plan, self.seed = plan, seed
        self.start_step = 0
        """Optimizer step from which on `train_dataloader` serves."""
        self.train_loader: TimedLoader | None = None

    @abstractmethod
    def prepare(self, model: AnyModel) -> None:
        """Reads what must be read before the first batch, and checks that data, batch and model fit each other.

        Any number of processes may call this at once.

        Raises:
            DataError: naming file and row.
        """

    @abstractmethod
    def has(self, split: Split) -> bool:
        """Whether there is such a split."""

    @abstractmethod
    def epoch(self, step: int) -> float:
        """Passes over the training split after `step` optimizer steps."""

    @abstractmethod
    def size_in_words(self) -> str:
        """`60,000 training images`."""

    @abstractmethod
    def train_batches(self, rank: int) -> Dataset[Batch]:
        """Micro batches of a rank from `start_step` to the last step."""

    @abstractmethod
    def evaluation_batches(self, split: Split, rank: int) -> Dataset[Batch]:
        """Micro batches of a rank that with the other ranks' cover the split once; equally many on each rank."""

    @property
    def may_wait(self) -> bool:
        """Whether a batch may take long to come."""
        return False

    def train_dataloader(self) -> TimedLoader:
        batches = self.train_batches(self._rank())
        workers = self.plan.num_workers
        # not where batches are copied for a GPU: a thread starts out on the first one, whichever the rank's is
        ahead = workers == 0 and not self.may_wait and self.plan.accelerator == "cpu"
        self.train_loader = TimedLoader(make_loader(batches, self.plan, workers, self.may_wait), ahead)
        return self.train_loader

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader[Batch] | list[Any]:
        return self._evaluation("test")

    def _evaluation(self, split: Split) -> DataLoader[Batch] | list[Any]:
        if not self.has(split):
            return []
        return make_loader(self.evaluation_batches(split, self._rank()), self.plan, 0)

    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0
