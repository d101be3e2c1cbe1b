"""Pairs of texts: what an encoder-decoder reads and writes, in batches of about one length."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from lm_train.data.batches import IGNORED, Batch, EvaluationBatches, Integers, Split, StepBatches
from lm_train.data.module import DataModule
from lm_train.data.pair_texts import Pairs, TokenisedPairs, prepare_pairs
from lm_train.data.text_classes import BucketBatches, SizedSamples
from lm_train.data.tokenizer import vocabulary_size
from lm_train.errors import DataError
from lm_train.plan import DataFacts, Plan
from lm_train.recipe import AnyModel, PairData
from lm_train.recipe.tokenizer_names import PAIR_SYMBOLS
from lm_train.runs import RunFolder

DECODED_SAMPLES = 500
"""So many samples of a split are also written out, token by token, at each evaluation."""


class PairSamples(SizedSamples):
    """The pairs of one split; sources and targets are filled up to the longest of their micro batch.

    Args:
        pairs: tokenised.
        pad, start, end: ids.
    """

    def __init__(self, pairs: TokenisedPairs, pad: int, start: int, end: int) -> None:
        self.pairs, self.pad, self.start, self.end = pairs, pad, start, end
        self.source_lengths, self.target_lengths = pairs.source_lengths, pairs.target_lengths
        self.lengths = self.source_lengths + self.target_lengths
        """By which pairs of about one length are brought together, (n,)."""

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, samples: Integers, epochs: Integers | None) -> Batch:
        """`tokens`, (B, S), with `lengths`; `target_tokens`, (B, T), the start and the target; `targets`, (B, T), the target
        and the end. In an evaluation `samples` too, (B,)."""
        lengths, wanted = self.source_lengths[samples], self.target_lengths[samples]
        tokens = np.full((len(samples), lengths.max()), self.pad, dtype=np.int64)
        read = np.full((len(samples), wanted.max() + 1), self.pad, dtype=np.int64)
        targets = np.full(read.shape, IGNORED, dtype=np.int64)
        read[:, 0] = self.start
        for i, sample in enumerate(samples.tolist()):
            source, target = self.pairs.pair(sample)
            tokens[i, : len(source)] = source
            read[i, 1 : len(target) + 1] = target
            targets[i, : len(target)], targets[i, len(target)] = target, self.end
        batch = {"tokens": tokens, "lengths": lengths, "target_tokens": read, "targets": targets}
        return {
            name: torch.from_numpy(array)
            for name, array in (batch if epochs is not None else batch | {"samples": samples}).items()
        }

    def total(self, samples: Integers, epochs: Integers) -> float:
        """Target tokens, each target's end included."""
        return float((self.target_lengths[samples] + 1).sum())


class PairEvaluationBatches(EvaluationBatches):
    """Evaluation batches that say how many tokens are to be written out for each source.

    `decode_tokens` is a plain number, the same on every rank: one more than the longest target of all ranks' samples has, or
    0 where none of them is among the first DECODED_SAMPLES.
    """

    samples: PairSamples

    def __getitem__(self, index: int) -> Batch:
        batch = super().__getitem__(index)
        size = self.plan.micro_batch_size * self.plan.world_size
        of_all_ranks = self.samples.target_lengths[index * size : (index + 1) * size]
        decodes = index * size < DECODED_SAMPLES
        return batch | {"decode_tokens": int(of_all_ranks.max()) + 1 if decodes else 0}


class PairDataModule(DataModule):
    """Serves pairs of texts.

    Args:
        section: the recipe's data section.
        plan: batch sizes, ranks, workers, steps.
        seed: decides the order of samples.
        folder: the run's, where rank 0 leaves the tokenizer.
    """

    pairs: Pairs
    pad_id: int
    start_id: int
    end_id: int

    def __init__(self, section: PairData, plan: Plan, seed: int, folder: RunFolder) -> None:
        super().__init__(plan, seed)
        self.section, self.folder = section, folder

    def prepare(self, model: AnyModel) -> None:
        block_size: Any = getattr(model, "block_size", 256)
        self.pairs = prepare_pairs(self.section, block_size)
        self.label, self.fingerprint = self.pairs.label, self.pairs.fingerprint
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.pad_id, self.start_id, self.end_id = (vocabulary[symbol] for symbol in PAIR_SYMBOLS)
        train = self.pairs.splits["train"]
        if len(train) < self.plan.global_batch_size:
            raise DataError(
                f"{self.label}: {len(train)} training pairs are fewer than one batch of "
                f"data.global_batch_size={self.plan.global_batch_size}; lower it, or add pairs"
            )
        self.facts = DataFacts(
            vocab_size=vocabulary_size(self.tokenizer),
            pad_id=self.pad_id,
            start_id=self.start_id,
            end_id=self.end_id,
            max_length=block_size,
            pair_lengths=(float(train.source_lengths.mean()), float(train.target_lengths.mean()) + 1),
        )
        asked: int | str = getattr(model, "vocab_size", "auto")
        if isinstance(asked, int) and vocabulary_size(self.tokenizer) > asked:
            raise DataError(
                f"{self.label}: the tokenizer has {self.facts.vocab_size} ids with {', '.join(PAIR_SYMBOLS)}, "
                f"model.vocab_size={asked} is smaller; set model.vocab_size=auto"
            )
        if int(os.environ.get("RANK", 0)) == 0:
            for remark in self.pairs.remarks:
                print(remark, file=sys.stderr, flush=True)

    @property
    def tokenizer(self) -> Tokenizer:
        """With the symbols for filling up, start and end."""
        return self.pairs.tokenizer

    def kept(self) -> dict[str, str]:
        return {self.folder.tokenizer.name: self.tokenizer.to_str()}

    def has(self, split: Split) -> bool:
        return split in self.pairs.splits

    def epoch(self, step: int) -> float:
        return self.passed(step) / len(self.pairs.splits["train"])

    def size_in_words(self) -> str:
        return f"{len(self.pairs.splits['train']):,} training pairs"

    def train_batches(self, rank: int) -> StepBatches:
        return BucketBatches(self.samples("train"), self.plan, rank, self.seed, self.start_step)

    def evaluation_batches(self, split: Split, rank: int) -> Dataset[Batch]:
        return PairEvaluationBatches(self.samples(split), self.plan, rank)

    def samples(self, split: Split) -> PairSamples:
        return PairSamples(self.pairs.splits[split], self.pad_id, self.start_id, self.end_id)
