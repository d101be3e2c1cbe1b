"""A data module of scikit-learn's digits as rows of 64 numbers, for what is tested around the data."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from lm_train.data import Batch
from lm_train.data.batches import Integers, Samples
from lm_train.data.module import SampleDataModule
from lm_train.plan import DataFacts


class _Rows(Samples):
    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, samples: Integers, epochs: Integers | None) -> Batch:
        return {"inputs": self.inputs[samples], "labels": self.labels[samples]}


class DigitsData(SampleDataModule):
    """Three parts of the set, none of a size that a batch divides."""

    label, fingerprint = "digits", "of the digits"
    class_names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    facts = DataFacts(input_shape=(64,), n_outputs=10)

    def prepare(self, model: Any) -> None:
        inputs, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
        parts = ("train", slice(400, None)), ("val", slice(197)), ("test", slice(197, 400))
        self.samples = {split: _Rows(inputs[part].float() / 16, labels[part].long()) for split, part in parts}

    def size_in_words(self) -> str:
        return f"{len(self.samples['train']):,} training images"
