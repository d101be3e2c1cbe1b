"""Text for language models: packed blocks of tokens in a global order that no number of processes changes."""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from lm_train.data.batches import IGNORED, Batch, Integers, StepBatches
from lm_train.data.corpus import Corpus, TokenFile, prepare_corpus, wait_for_tokens
from lm_train.data.module import DataModule
from lm_train.data.order import SampleOrder, key_of
from lm_train.data.source import Split
from lm_train.data.tokenizer import vocabulary_size
from lm_train.errors import DataError
from lm_train.plan import DataFacts, Plan
from lm_train.recipe import AnyModel, EmbeddedData, TextData
from lm_train.runs import RunFolder

STREAM_WINDOW = 2048
"""Blocks that are shuffled together while a stream is still being tokenised."""


class TrainBatches(StepBatches):
    """The micro batches of one rank from one optimizer step on.

    Sample p (a global position) is block `order(p)` of the corpus: tokens [start, start + T] for inputs and, one further,
    targets.
    """

    def __init__(self, tokens: TokenFile, plan: Plan, rank: int, seed: int, start_step: int, streaming: bool) -> None:
        super().__init__(plan, rank, start_step)
        assert plan.block_size is not None
        self.tokens, self.block_size, self.seed, self.streaming = tokens, plan.block_size, seed, streaming
        self._order: SampleOrder | None = None

    def samples_of(self, start: int) -> tuple[Integers, Integers]:
        return self._samples_at(np.arange(start, start + self.plan.global_batch_size))

    def _samples_at(self, positions: Integers) -> tuple[Integers, Integers]:
        return self._order_at(int(positions[-1])).samples(positions)

    def micro_batch(self, start: int, part: slice) -> Batch:
        epochs, samples = self._samples_at(np.arange(start + part.start, start + part.stop))
        rows = self.tokens.rows(samples * self.block_size + self._offsets(epochs), self.block_size + 1)
        return self._batch(rows, epochs, samples)

    def _batch(self, rows: Integers, epochs: Integers, samples: Integers) -> Batch:
        """The batch of these rows of T + 1 tokens each, (B, T + 1)."""
        block = torch.from_numpy(rows)
        total = float(self.plan.global_batch_size * self.block_size)
        return {"tokens": block[:, :-1].contiguous(), "targets": block[:, 1:].contiguous(), "total": total}

    def _offsets(self, epochs: np.ndarray) -> np.ndarray:
        """Where an epoch's first block starts: 0 in the first, then elsewhere, so that blocks are not cut alike again."""
        if self.streaming:
            return np.zeros_like(epochs)
        offsets = {
            e: key_of(self.seed, int(e), self.block_size) % self.block_size if e else 0 for e in np.unique(epochs)
        }
        return np.array([offsets[e] for e in epochs], dtype=np.int64)

    def _order_at(self, position: int) -> SampleOrder:
        """The order up to `position`; of a stream, as soon as the window it falls into has been tokenised."""
        if self._order is not None:
            return self._order
        info = self.tokens.info()
        if not self.streaming:
            assert info is not None
            self._order = SampleOrder(self.seed, train_blocks(info.tokens, self.block_size))
            return self._order
        if info is None:
            needed = (position // STREAM_WINDOW + 1) * STREAM_WINDOW * self.block_size + 1
            wait_for_tokens(self.tokens, needed)
            info = self.tokens.info()
        if info is None:  # the end is not known, and this position lies before it
            return SampleOrder(self.seed, (position // STREAM_WINDOW + 1) * STREAM_WINDOW, STREAM_WINDOW)
        blocks, wanted = (info.tokens - 1) // self.block_size, self.plan.global_batch_size
        if blocks < wanted:
            raise DataError(too_few(str(self.tokens.file), info.tokens, blocks, self.block_size, wanted))
        self._order = SampleOrder(self.seed, blocks, STREAM_WINDOW)
        return self._order


def train_blocks(tokens: int, block_size: int) -> int:
    """Blocks of an epoch; one block is left over so that later epochs may start anywhere inside the first."""
    return max(0, (tokens - block_size) // block_size)


def too_few(label: str, tokens: int, blocks: int, block_size: int, wanted: int) -> str:
    return (
        f"{label}: {tokens:,} training tokens make {blocks} samples of model.block_size={block_size}, fewer than one batch "
        f"of data.global_batch_size={wanted}; lower one of the two, or add text"
    )


class EvalBatches(Dataset[Batch]):
    """Micro batches of one rank that together cover a split once, every token a target but the first.

    The last block is short and the last batches may lack rows; what is missing carries ignored targets.
    """

    def __init__(self, tokens: TokenFile, plan: Plan, rank: int) -> None:
        assert plan.block_size is not None
        self.tokens, self.block_size, self.plan, self.rank = tokens, plan.block_size, plan, rank
        self.n_targets = tokens.available() - 1
        self.n_blocks = -(-self.n_targets // self.block_size)

    def __len__(self) -> int:
        return -(-self.n_blocks // (self.plan.micro_batch_size * self.plan.world_size))

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        size = self.plan.micro_batch_size
        first = (index * self.plan.world_size + self.rank) * size
        tokens = torch.zeros(size, self.block_size, dtype=torch.int64)
        targets = torch.full((size, self.block_size), IGNORED)
        for i in range(max(0, min(size, self.n_blocks - first))):
            start = (first + i) * self.block_size
            length = min(self.block_size, self.n_targets - start)
            row = torch.from_numpy(self.tokens.rows(np.array([start]), length + 1)[0])
            tokens[i, :length], targets[i, :length] = row[:-1], row[1:]
        return {"tokens": tokens, "targets": targets}


class TextDataModule(DataModule):
    """Serves blocks of a corpus.

    Args:
        section: the recipe's data section.
        plan: batch sizes, ranks, workers, steps, tokens in one sample.
        seed: decides the order of samples.
        folder: the run's, where rank 0 leaves the tokenizer for later use of the model.
    """

    corpus: Corpus

    def __init__(self, section: EmbeddedData | TextData, plan: Plan, seed: int, folder: RunFolder) -> None:
        super().__init__(plan, seed)
        assert plan.block_size is not None
        self.section, self.block_size, self.folder = section, plan.block_size, folder
        self.streaming = bool(getattr(section, "streaming", False))

    def prepare(self, model: AnyModel) -> None:
        """Tokenises what is not tokenised yet, and checks that the data fit the batch and the model."""
        self.corpus = prepare_corpus(self.section, self.streaming)
        self.label, self.fingerprint = self.corpus.label, self.corpus.fingerprint
        self.facts = DataFacts(vocab_size=vocabulary_size(self.corpus.tokenizer))
        asked: int | str = getattr(model, "vocab_size", "auto")
        for split in self.corpus.splits:
            self._check(split, asked if isinstance(asked, int) else None)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.corpus.tokenizer

    def kept(self) -> dict[str, str]:
        return {self.folder.tokenizer.name: self.tokenizer.to_str()}

    @property
    def vocab_size(self) -> int:
        assert self.facts.vocab_size is not None
        return self.facts.vocab_size

    def _check(self, split: Split, model_vocab_size: int | None) -> None:
        label, info = self.corpus.label, self.corpus.tokens(split).info()
        if model_vocab_size is not None:
            if info is None and self.vocab_size > model_vocab_size:
                raise DataError(
                    f"{label}: the tokenizer has {self.vocab_size} ids, model.vocab_size={model_vocab_size} is smaller; "
                    "set model.vocab_size=auto"
                )
            if info is not None and info.max_id >= model_vocab_size:
                raise DataError(
                    f"{info.max_id_where}: token id {info.max_id} is not below model.vocab_size={model_vocab_size}; "
                    f"set model.vocab_size=auto or at least {info.max_id + 1}"
                )
        if info is not None and split == "train":
            blocks, wanted = train_blocks(info.tokens, self.block_size), self.plan.global_batch_size
            if blocks < wanted:
                raise DataError(too_few(label, info.tokens, blocks, self.block_size, wanted))
        elif info is not None and info.tokens < 2:
            raise DataError(f"{label}: {info.tokens} {split} tokens; at least 2 are needed to predict one from another")

    def bytes_per_token(self, split: Split) -> float:
        """UTF-8 bytes of text that one token of the split stands for, on average."""
        info = self.corpus.tokens(split).info()
        assert info is not None, "only complete splits are evaluated"
        return info.text_bytes / info.tokens

    def epoch(self, step: int) -> float:
        """Passes over the training split after `step` optimizer steps; 0 while a stream's end is not known."""
        info = self.corpus.tokens("train").info()
        return 0.0 if info is None else self.passed(step) * self.block_size / info.tokens

    def size_in_words(self) -> str:
        info = self.corpus.tokens("train").info()
        return "tokens still being counted" if info is None else f"{info.tokens:,} training tokens"

    def has(self, split: Split) -> bool:
        return split in self.corpus.splits

    @property
    def may_wait(self) -> bool:
        return self.streaming

    def train_batches(self, rank: int) -> StepBatches:
        tokens = self.corpus.tokens("train")
        return TrainBatches(tokens, self.plan, rank, self.seed, self.start_step, self.streaming)

    def evaluation_batches(self, split: Split, rank: int) -> Dataset[Batch]:
        return EvalBatches(self.corpus.tokens(split), self.plan, rank)
