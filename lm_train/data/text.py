"""Text for language models: packed blocks of tokens in a global order that no number of processes changes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lm_train import signals
from lm_train.data.cache import write_text
from lm_train.data.corpus import Corpus, TokenFile, prepare_corpus, wait_for_tokens
from lm_train.data.order import SampleOrder, key_of
from lm_train.data.source import Split
from lm_train.data.tokenizer import vocabulary_size
from lm_train.errors import DataError
from lm_train.plan import Plan
from lm_train.recipe import AnyData

IGNORED = -100
"""Target of a position where nothing is to be predicted (cross_entropy's ignore_index)."""
STREAM_WINDOW = 2048
"""Blocks that are shuffled together while a stream is still being tokenised."""
Batch = dict[str, Tensor]
_IN_TRACEBACK = f"{DataError.__module__}.{DataError.__qualname__}: "


class TrainBatches(Dataset[Batch]):
    """The micro batches of one rank from one optimizer step on.

    Sample p (a global position) is block `order(p)` of the corpus: tokens [start, start + T] for inputs and, one further,
    targets. Step s takes positions s*G to (s+1)*G; within it micro batch m of rank r takes (m*W + r)*b on.
    """

    def __init__(
        self, tokens: TokenFile, block_size: int, plan: Plan, rank: int, seed: int, start_step: int, streaming: bool
    ) -> None:
        self.tokens, self.block_size, self.plan, self.rank, self.seed = tokens, block_size, plan, rank, seed
        self.start_step, self.streaming = start_step, streaming
        self._order: SampleOrder | None = None

    def __len__(self) -> int:
        return (self.plan.max_steps - self.start_step) * self.plan.accumulate_grad_batches

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        plan = self.plan
        step, micro = divmod(index, plan.accumulate_grad_batches)
        first = (self.start_step + step) * plan.global_batch_size
        first += (micro * plan.world_size + self.rank) * plan.micro_batch_size
        positions = np.arange(first, first + plan.micro_batch_size)
        epochs, samples = self._order_at(int(positions[-1])).samples(positions)
        rows = self.tokens.rows(samples * self.block_size + self._offsets(epochs), self.block_size + 1)
        block = torch.from_numpy(rows)
        return {"tokens": block[:, :-1].contiguous(), "targets": block[:, 1:].contiguous()}

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

    def __init__(self, tokens: TokenFile, block_size: int, plan: Plan, rank: int) -> None:
        self.tokens, self.block_size, self.plan, self.rank = tokens, block_size, plan, rank
        self.n_targets = tokens.available() - 1
        self.n_blocks = -(-self.n_targets // block_size)

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


class TimedLoader:
    """A loader that adds up how long the training loop waited for its batches."""

    def __init__(self, loader: DataLoader[Batch]) -> None:
        self.loader = loader
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        with signals.blocked():  # the workers stay so; see _leave_signals_to_the_rank
            batches = iter(self.loader)
        while True:
            before = time.perf_counter()
            try:
                batch = next(batches, None)
            except DataError as error:  # a worker's comes wrapped in its traceback, the message at the end
                raise DataError(str(error).strip().splitlines()[-1].removeprefix(_IN_TRACEBACK)) from None
            self.wait_seconds += time.perf_counter() - before
            if batch is None:
                return
            yield batch


class TextDataModule(L.LightningDataModule):
    """Serves blocks of a corpus.

    Args:
        section: the recipe's data section.
        plan: batch sizes, ranks, workers, steps.
        block_size: tokens in one sample.
        seed: decides the order of samples.
        tokenizer_file: where rank 0 leaves the tokenizer for later use of the model.
    """

    corpus: Corpus

    def __init__(self, section: AnyData, plan: Plan, block_size: int, seed: int, tokenizer_file: Path) -> None:
        super().__init__()
        self.section, self.plan, self.block_size, self.seed = section, plan, block_size, seed
        self.tokenizer_file = tokenizer_file
        self.streaming = bool(getattr(section, "streaming", False))
        self.start_step = 0
        self.train_loader: TimedLoader | None = None

    def prepare(self, model_vocab_size: int | None) -> None:
        """Tokenises what is not tokenised yet, and checks that the data fit the batch and the model.

        Args:
            model_vocab_size: ids that the model knows; None if it takes them from the corpus.

        Raises:
            DataError: naming file and row.
        """
        self.corpus = prepare_corpus(self.section, self.streaming)
        if not self.tokenizer_file.exists():
            write_text(self.tokenizer_file, self.corpus.tokenizer.to_str())
        for split in self.corpus.splits:
            self._check(split, model_vocab_size)

    @property
    def vocab_size(self) -> int:
        return vocabulary_size(self.corpus.tokenizer)

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
        return 0.0 if info is None else step * self.plan.tokens_per_step / info.tokens

    def has(self, split: Split) -> bool:
        return split in self.corpus.splits

    def train_dataloader(self) -> TimedLoader:
        batches = TrainBatches(
            self.corpus.tokens("train"),
            self.block_size,
            self.plan,
            self._rank(),
            self.seed,
            self.start_step,
            self.streaming,
        )
        self.train_loader = TimedLoader(self._loader(batches, self.plan.num_workers))
        return self.train_loader

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        return self._evaluation("val") if self.has("val") else []

    def test_dataloader(self) -> DataLoader[Batch] | list[Any]:
        return self._evaluation("test") if self.has("test") else []

    def _evaluation(self, split: Split) -> DataLoader[Batch]:
        return self._loader(EvalBatches(self.corpus.tokens(split), self.block_size, self.plan, self._rank()), 0)

    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    def _loader(self, batches: Dataset[Batch], num_workers: int) -> DataLoader[Batch]:
        return DataLoader(
            batches,
            batch_size=None,
            sampler=range(len(batches)),  # type: ignore[arg-type]
            num_workers=num_workers,
            pin_memory=self.plan.accelerator == "gpu",
            persistent_workers=num_workers > 0,
            # a stream may take long to come, and has a patience of its own
            timeout=60 if num_workers > 0 and not self.streaming else 0,
            worker_init_fn=_leave_signals_to_the_rank,
        )


def _leave_signals_to_the_rank(worker: int) -> None:
    """A scheduler signals every process of a job; the rank still needs its batches to reach a step boundary.

    Signals are blocked since the worker's start; SIGTERM still ends it when its own rank sends it, as the loader and
    multiprocessing do to clean up.
    """
    signals.forget()
    if sys.platform == "linux":
        threading.Thread(target=_end_when_the_rank_asks, daemon=True).start()
    else:  # cannot tell who sent it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_when_the_rank_asks() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
