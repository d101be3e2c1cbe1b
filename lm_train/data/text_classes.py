"""Texts with a class each: batches of texts of about one length, in an order that no number of processes changes."""

from __future__ import annotations

import json
import os
import sys
from abc import ABC

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from lm_train.data.batches import Batch, EvaluationBatches, Integers, SampleBatches, Samples, Split, StepBatches
from lm_train.data.classes import balanced_weights, total_weight
from lm_train.data.labelled_texts import LabelledTexts, TokenisedTexts, counts_in_words, prepare_texts
from lm_train.data.module import DataModule
from lm_train.data.order import key_of, mix64
from lm_train.data.tokenizer import padding_id, unknown_id, vocabulary_size
from lm_train.errors import DataError
from lm_train.plan import DataFacts, Plan
from lm_train.recipe import AnyModel, TextClassData
from lm_train.runs import RunFolder

WINDOW = 16
"""Global batches whose texts are sorted by length together."""


class SizedSamples(Samples, ABC):
    """Samples of different lengths."""

    lengths: Integers
    """Of each sample, (n,)."""


class TextSamples(SizedSamples):
    """The texts of one split as rows that are filled up to the longest of their micro batch.

    Args:
        texts: tokenised.
        pad_id: fills up.
        weights: of the classes, (k,), in training; None: all weigh 1.
        dropped: share of the training tokens that become `unknown`, and the seed that decides which.
        unknown: the id that they become.
    """

    def __init__(
        self,
        texts: TokenisedTexts,
        pad_id: int,
        weights: npt.NDArray[np.float64] | None = None,
        dropped: float = 0.0,
        seed: int = 0,
        unknown: int | None = None,
    ) -> None:
        self.texts, self.pad_id, self.weights = texts, pad_id, weights
        self.dropped, self.seed, self.unknown = dropped, seed, unknown
        self.lengths = texts.lengths

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, samples: Integers, epochs: Integers | None) -> Batch:
        lengths = self.lengths[samples]
        places = np.arange(lengths.max())
        filled = places < lengths[:, None]  # (B, T)
        tokens = np.full(filled.shape, self.pad_id, dtype=np.int64)
        tokens[filled] = self.texts.ids[(self.texts.starts[samples][:, None] + places)[filled]]
        labels = self.texts.labels[samples]
        batch: Batch = {"lengths": torch.from_numpy(lengths), "labels": torch.from_numpy(labels)}
        if epochs is not None:
            if self.dropped and self.unknown is not None:
                tokens[filled & self._dropped(samples, epochs, len(places))] = self.unknown
            if self.weights is not None:
                batch["weights"] = torch.from_numpy(self.weights[labels].astype(np.float32))
        return batch | {"tokens": torch.from_numpy(tokens)}

    def _dropped(self, samples: Integers, epochs: Integers, width: int) -> npt.NDArray[np.bool_]:
        """Which tokens are dropped, (B, T): decided by seed, epoch, sample and place in the text."""
        keys = np.array(
            [key_of(self.seed, int(e), int(s)) for e, s in zip(epochs, samples, strict=True)], dtype=np.uint64
        )
        drawn = mix64(keys[:, None] ^ mix64(np.arange(width, dtype=np.uint64)))
        return drawn < np.uint64(self.dropped * 2**64)

    def total(self, samples: Integers, epochs: Integers) -> float:
        if self.weights is None:
            return float(len(samples))
        return total_weight(self.weights[self.texts.labels[samples]])


class BucketBatches(SampleBatches):
    """Training batches of texts of about one length.

    Of each window of 16 global batches of the shuffled order the texts are sorted by length and dealt out to the window's
    steps, and the steps shuffled; so that little is filled up, each text comes once in an epoch, and which text comes where
    is still a function of seed and position alone.
    """

    samples: SizedSamples

    def samples_of(self, start: int) -> tuple[Integers, Integers]:
        size = self.plan.global_batch_size
        window, place = divmod(start // size, WINDOW)
        if self._window is None or self._window[0] != window:
            self._window = window, *self._sorted(window)
        _, epochs, samples = self._window
        chosen = slice(place * size, (place + 1) * size)
        return epochs[chosen], samples[chosen]

    def micro_batch(self, start: int, part: slice) -> Batch:
        epochs, samples = self.samples_of(start)
        return self.samples.batch(samples[part], epochs[part]) | {"total": self.samples.total(samples, epochs)}

    _window: tuple[int, Integers, Integers] | None = None

    def _sorted(self, window: int) -> tuple[Integers, Integers]:
        """Epochs and samples of a window in the order in which its steps take them."""
        size = self.plan.global_batch_size
        first = window * WINDOW * size
        epochs, samples = self.order.samples(np.arange(first, first + WINDOW * size))
        by_length = np.argsort(self.samples.lengths[samples], kind="stable").reshape(WINDOW, size)
        keys = np.arange(WINDOW, dtype=np.uint64) ^ np.uint64(key_of(self.order.seed, window, WINDOW))
        dealt = by_length[np.argsort(mix64(keys), kind="stable")].reshape(-1)
        return epochs[dealt], samples[dealt]


class TextClassDataModule(DataModule):
    """Serves labelled texts.

    Args:
        section: the recipe's data section.
        plan: batch sizes, ranks, workers, steps.
        seed: decides the order of samples and the tokens that are dropped.
        folder: the run's, where rank 0 leaves the tokenizer and what else a text must go through.
    """

    texts: LabelledTexts

    def __init__(self, section: TextClassData, plan: Plan, seed: int, folder: RunFolder) -> None:
        super().__init__(plan, seed)
        self.section, self.folder = section, folder

    def prepare(self, model: AnyModel) -> None:
        self.texts = prepare_texts(self.section)
        self.label, self.fingerprint = self.texts.label, self.texts.fingerprint
        self.class_names = self.texts.class_names
        self.pad_id = padding_id(self.texts.tokenizer)
        train = self.texts.splits["train"]
        self.facts = DataFacts(
            vocab_size=vocabulary_size(self.texts.tokenizer),
            n_outputs=len(self.class_names),
            pad_id=self.pad_id,
            max_length=self.section.max_length,
            tokens_per_sample=float(train.lengths.mean()),
        )
        self._check(model)
        if int(os.environ.get("RANK", 0)) == 0:
            for remark in (*self.texts.remarks, f"classes: {counts_in_words(self.class_names, train.labels)}"):
                print(remark, file=sys.stderr, flush=True)

    def _check(self, model: AnyModel) -> None:
        n_train, wanted = len(self.texts.splits["train"]), self.plan.global_batch_size
        if n_train < wanted:
            raise DataError(
                f"{self.label}: {n_train} training texts are fewer than one batch of data.global_batch_size={wanted}; lower "
                "it, or add texts"
            )
        asked: int | str = getattr(model, "vocab_size", "auto")
        assert self.facts.vocab_size is not None
        if isinstance(asked, int) and self.facts.vocab_size > asked:
            raise DataError(
                f"{self.label}: the tokenizer has {self.facts.vocab_size} ids, model.vocab_size={asked} is smaller; set "
                "model.vocab_size=auto"
            )

    def kept(self) -> dict[str, str]:
        section = self.section
        facts = {
            "kind": section.kind,
            "class_names": self.class_names,
            "cleaning": section.cleaning,
            "max_length": section.max_length,
            "pair": section.pair_column is not None,
            "pad_id": self.pad_id,
        }
        return {
            self.folder.tokenizer.name: self.texts.tokenizer.to_str(),
            self.folder.preprocessing.name: json.dumps(facts, indent=1) + "\n",
        }

    def has(self, split: Split) -> bool:
        return split in self.texts.splits

    def epoch(self, step: int) -> float:
        return self.passed(step) / len(self.texts.splits["train"])

    def size_in_words(self) -> str:
        return f"{len(self.texts.splits['train']):,} training texts in {len(self.class_names)} classes"

    def train_batches(self, rank: int) -> StepBatches:
        train = self.texts.splits["train"]
        balanced = self.section.class_weights == "balanced"
        weights = balanced_weights(train.labels, len(self.class_names)) if balanced else None
        unknown = unknown_id(self.texts.tokenizer)
        samples = TextSamples(train, self.pad_id, weights, self.section.token_dropout, self.seed, unknown)
        return BucketBatches(samples, self.plan, rank, self.seed, self.start_step)

    def evaluation_batches(self, split: Split, rank: int) -> Dataset[Batch]:
        return EvaluationBatches(TextSamples(self.texts.splits[split], self.pad_id), self.plan, rank)
