"""What every LightningDataModule of ours is to the training: facts for the network, batches for the loop, words for a person."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from torch.utils.data import DataLoader, Dataset

from lm_train.data.batches import Batch, EvaluationBatches, Integers, SampleBatches, Samples, Split, StepBatches
from lm_train.data.cache import write_text
from lm_train.data.loading import PATIENCE_S, TimedLoader, make_loader
from lm_train.data.order import Skipped, first_position
from lm_train.errors import CheckpointError
from lm_train.horizon import Horizon
from lm_train.plan import DataFacts, Plan
from lm_train.recipe import AnyModel
from lm_train.runs import RunFolder, latest_checkpoint


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
        self.skipped: Skipped = ()
        """Global positions that the training leaves out; `train` puts the run's own here."""
        self.horizon = Horizon(plan.max_steps)
        """The last step; `train` puts the run's own here."""
        self.train_loader: TimedLoader | None = None
        self._identities: StepBatches | None = None

    @abstractmethod
    def prepare(self, model: AnyModel) -> None:
        """Reads what must be read before the first batch, and checks that data, batch and model fit each other.

        Any number of processes may call this at once. Nothing is written into the run folder: whether the run may go on with
        these data is not known yet.

        Raises:
            DataError: naming file and row.
        """

    def kept(self) -> dict[str, str]:
        """What a later use of the model needs of the data: the JSON text of each file of the run folder, by its name."""
        return {}

    def leave(self, folder: RunFolder) -> None:
        """Writes what `kept` gives into the run folder, once the data are known to be those of the run.

        Every rank may call this; rank 0 writes. What a start left that was ended before its first checkpoint is overwritten;
        a run with checkpoints must find what it began with.

        Raises:
            CheckpointError: naming the file that says otherwise.
            OutputError: if the folder cannot be written to.
        """
        for name, text in self.kept().items():
            file = folder.root / name
            if _says_so(file, text):
                continue
            if file.exists() and latest_checkpoint(folder) is not None:
                raise CheckpointError(
                    f"{file}: the run began with other data, or treated them otherwise; give the data and the settings it was "
                    "trained with, or start a new run with another name="
                )
            if int(os.environ.get("RANK", 0)) == 0:
                write_text(file, text)

    @abstractmethod
    def has(self, split: Split) -> bool:
        """Whether there is such a split."""

    @abstractmethod
    def epoch(self, step: int) -> float:
        """Passes over the training split after `step` optimizer steps; what was skipped counts as passed."""

    def saved_state(self, step: int) -> dict[str, Any]:
        """JSON values that a checkpoint of optimizer step `step` keeps for `restore_state`, if that number does not say all."""
        return {}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Gives back what `saved_state` gave, after `start_step` is set."""

    def passed(self, step: int) -> int:
        """Samples of the order that lie behind the run after `step` optimizer steps, the skipped ones included."""
        return first_position(step, self.plan.global_batch_size, self.skipped)

    @abstractmethod
    def size_in_words(self) -> str:
        """`60,000 training images`."""

    @abstractmethod
    def train_batches(self, rank: int) -> StepBatches:
        """Micro batches of a rank from `start_step` to the last step."""

    def sample_ids(self, step: int) -> Integers | None:
        """Which samples the global batch of a step holds; see `StepBatches.sample_ids`."""
        if self._identities is None:
            self._identities = self.train_batches(0)  # not the loader's own, with which another thread may be at work
        self._identities.skipped = self.skipped
        return self._identities.sample_ids(step)

    @abstractmethod
    def evaluation_batches(self, split: Split, rank: int) -> Dataset[Batch]:
        """Micro batches of a rank that with the other ranks' cover the split once; equally many on each rank."""

    def count_batches(self, split: Split, rank: int) -> int:
        """Micro batches of a rank in an evaluation; 0 where nobody can tell before."""
        return len(self.evaluation_batches(split, rank))  # type: ignore[arg-type]

    @property
    def may_wait(self) -> bool:
        """Whether a batch may take long to come."""
        return False

    @property
    def may_replace(self) -> bool:
        """Whether other samples stand in the place of damaged ones."""
        return False

    def train_dataloader(self) -> TimedLoader:
        batches = self.train_batches(self._rank())
        batches.last_step = self.horizon.furthest
        batches.skipped = self.skipped
        workers = self.plan.num_workers
        # not where batches are copied for a GPU: a thread starts out on the first one, whichever the rank's is
        ahead = workers == 0 and not self.may_wait and self.plan.accelerator == "cpu"
        patience = None if self.may_wait else PATIENCE_S
        self.train_loader = TimedLoader(make_loader(batches, self.plan, workers), ahead, patience)
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


def _says_so(file: Path, text: str) -> bool:
    """Whether a JSON file says what the text says."""
    try:
        return _alike(json.loads(file.read_text(encoding="utf-8")), json.loads(text))
    except (FileNotFoundError, ValueError):
        return False


def _alike(one: Any, other: Any) -> bool:
    """The same but for the last digits of numbers, which another processor may sum up in another order."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
    return bool(one == other)


class SampleDataModule(DataModule):
    """Serves samples that are held, each by itself: in shuffled order for the training, in their own for an evaluation."""

    samples: Mapping[Split, Samples]
    """By split; there after `prepare`."""

    def has(self, split: Split) -> bool:
        return split in self.samples

    def epoch(self, step: int) -> float:
        return self.passed(step) / len(self.samples["train"])

    def train_batches(self, rank: int) -> StepBatches:
        return SampleBatches(self.samples["train"], self.plan, rank, self.seed, self.start_step)

    def evaluation_batches(self, split: Split, rank: int) -> Dataset[Batch]:
        return EvaluationBatches(self.samples[split], self.plan, rank)
