"""Which samples a rank's micro batches hold: a pure function of the optimizer step, for every kind of data.

A batch is a dictionary of tensors by name: what the network takes (`inputs`, `tokens`, `lengths`, ...) and what it is to give.
Besides, a training batch has a plain number `total`, by which the loss of the whole global batch is divided (its targets, or
the sum of their weights): known before the backward pass, so that uneven micro batches add up to the mean of the global batch.
An evaluation batch may be filled up; `valid`, (B,), says which of its samples count.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from lm_train.data.order import SampleOrder, Skipped, first_position
from lm_train.data.readers import Split as Split
from lm_train.plan import Plan

IGNORED = -100
"""Target of a position where nothing is to be predicted (cross_entropy's ignore_index)."""
Batch = dict[str, Any]
Integers = npt.NDArray[np.int64]


class StepBatches(Dataset[Batch], ABC):
    """The micro batches of one rank from one optimizer step on.

    Step s takes the G global positions from `first_position(s)` on, s*G where nothing is skipped; within them micro batch m of
    rank r takes (m*W + r)*b on.
    """

    def __init__(self, plan: Plan, rank: int, start_step: int) -> None:
        self.plan, self.rank, self.start_step = plan, rank, start_step
        self.last_step = plan.max_steps
        self.skipped: Skipped = ()
        """Global positions that are left out; `DataModule` puts the run's own here."""

    def __len__(self) -> int:
        return (self.last_step - self.start_step) * self.plan.accumulate_grad_batches

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        plan = self.plan
        step, micro = divmod(index, plan.accumulate_grad_batches)
        start = self.first_position(self.start_step + step)
        first = (micro * plan.world_size + self.rank) * plan.micro_batch_size
        return self.micro_batch(start, slice(first, first + plan.micro_batch_size))

    def first_position(self, step: int) -> int:
        """The global position with which the step behind `step` optimizer steps begins."""
        return first_position(step, self.plan.global_batch_size, self.skipped)

    @abstractmethod
    def micro_batch(self, start: int, part: slice) -> Batch:
        """The batch of the positions start + part; its step has those from `start` to start + G."""

    def sample_ids(self, step: int) -> Integers | None:
        """Which samples the global batch of a step holds, whatever `start_step` and rank are: a pure function.

        Args:
            step: optimizer steps before it, as above; the ledger counts them from 1.

        Returns:
            Epoch and number of each sample in global order, (G, 2); None where nobody can know.
        """
        epochs, samples = self.samples_of(self.first_position(step))
        return np.stack((epochs, samples), axis=1)

    @abstractmethod
    def samples_of(self, start: int) -> tuple[Integers, Integers]:
        """Epochs and numbers of the samples of the step that begins at global position `start`, in global order, (G,) each."""


class Samples(ABC):
    """The samples of one split, held in memory or mapped from disk."""

    @abstractmethod
    def __len__(self) -> int:
        """Samples of the split."""

    @abstractmethod
    def batch(self, samples: Integers, epochs: Integers | None) -> Batch:
        """The batch of these samples.

        Args:
            samples: numbers below len(self), (B,).
            epochs: of each sample, (B,): every random choice is keyed by (seed, epoch, sample); None for an evaluation,
                which makes no random choice.
        """

    def total(self, samples: Integers, epochs: Integers) -> float:
        """What the loss of a global batch of these samples is divided by; arguments as in `batch`."""
        return float(len(samples))

    def arranged(self, samples: Integers, epochs: Integers) -> tuple[Integers, Integers]:
        """The samples of one global batch in the order in which they are dealt out to micro batches."""
        return samples, epochs


class SampleBatches(StepBatches):
    """Training batches of `Samples` in the shuffled order of `SampleOrder`, epoch after epoch."""

    def __init__(
        self, samples: Samples, plan: Plan, rank: int, seed: int, start_step: int, order: SampleOrder | None = None
    ) -> None:
        super().__init__(plan, rank, start_step)
        self.samples = samples
        self.order = order or SampleOrder(seed, len(samples))

    def samples_of(self, start: int) -> tuple[Integers, Integers]:
        return self.order.samples(np.arange(start, start + self.plan.global_batch_size))

    def micro_batch(self, start: int, part: slice) -> Batch:
        epochs, chosen = self.samples_of(start)
        total = self.samples.total(chosen, epochs)
        chosen, epochs = self.samples.arranged(chosen, epochs)
        return self.samples.batch(chosen[part], epochs[part]) | {"total": total}


class EvaluationBatches(Dataset[Batch]):
    """Micro batches of one rank that together with the other ranks' cover a split once.

    All ranks have equally many, of equal size; what is missing at the end is filled up with sample 0 and is not `valid`.
    """

    def __init__(self, samples: Samples, plan: Plan, rank: int) -> None:
        self.samples, self.plan, self.rank = samples, plan, rank

    def __len__(self) -> int:
        return -(-len(self.samples) // (self.plan.micro_batch_size * self.plan.world_size))

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        size = self.plan.micro_batch_size
        first = (index * self.plan.world_size + self.rank) * size
        positions = np.arange(first, first + size)
        valid = positions < len(self.samples)
        return self.samples.batch(np.where(valid, positions, 0), None) | {"valid": torch.from_numpy(valid)}
