"""Text for language models: packed blocks of tokens in a global order that no number of processes changes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from lm_train.data.batches import IGNORED, Batch, Integers, StepBatches
from lm_train.data.corpus import Corpus, TokenFile, prepare_corpus, wait_for_tokens
from lm_train.data.documents import DocumentStarts
from lm_train.data.mixing import BlockOrder, train_blocks
from lm_train.data.module import DataModule
from lm_train.data.order import SampleOrder
from lm_train.data.remote import Prefetcher
from lm_train.data.shard_files import DamagedShard
from lm_train.data.shard_stream import ShardCorpus, ShardTokens
from lm_train.data.source import Split
from lm_train.data.tokenizer import vocabulary_size
from lm_train.errors import DataError
from lm_train.plan import DataFacts, Plan
from lm_train.recipe import AnyModel, EmbeddedData, ShardData, TextData
from lm_train.runs import RunFolder

STREAM_WINDOW = 2048
"""Blocks that are shuffled together while a stream is still being tokenised."""
_ATTEMPTS = 1000
"""Other samples that are tried in place of a damaged one."""


Tokens = TokenFile | ShardTokens
"""One split's tokens: on disk as a corpus was tokenised, or of prepared folders."""


class _StreamOrder:
    """Blocks of a stream that is still being tokenised, shuffled in windows."""

    def __init__(self, seed: int, blocks: int, block_size: int) -> None:
        self.order, self.block_size = SampleOrder(seed, blocks, STREAM_WINDOW), block_size

    def at(self, first: int, count: int) -> tuple[Integers, Integers, Integers]:
        """As of BlockOrder; every epoch's blocks are cut alike."""
        epochs, samples = self.order.samples(np.arange(first, first + count))
        return epochs, samples, samples * self.block_size


class TrainBatches(StepBatches):
    """The micro batches of one rank from one optimizer step on.

    Sample p (a global position) is block `order(p)` of the corpus: tokens [start, start + T] for inputs and, one further,
    targets.
    """

    def __init__(self, tokens: Tokens, plan: Plan, rank: int, seed: int, start_step: int, streaming: bool) -> None:
        super().__init__(plan, rank, start_step)
        assert plan.block_size is not None
        self.tokens, self.block_size, self.seed, self.streaming = tokens, plan.block_size, seed, streaming
        self._order: BlockOrder | _StreamOrder | None = None
        self._total: tuple[int, float] | None = None
        self._prefetcher: Prefetcher | None = None

    def samples_of(self, start: int) -> tuple[Integers, Integers]:
        size = self.plan.global_batch_size
        epochs, samples, _ = self._order_at(start + size - 1).at(start, size)
        return epochs, samples

    def micro_batch(self, start: int, part: slice) -> Batch:
        first, count = start + part.start, part.stop - part.start
        epochs, samples, starts = self._order_at(first + count - 1).at(first, count)
        replaced = 0
        if self._prefetcher is not None:
            self._prefetcher.follow(first)
        rows: npt.NDArray[np.integer]
        try:
            rows = self.tokens.rows(starts, self.block_size + 1)
        except DamagedShard:
            samples, starts, rows, replaced = self._replaced(epochs, samples, starts)
        batch = self._batch(rows, epochs, samples)
        documents = getattr(self.tokens, "documents", None)
        if documents is not None:
            self._keep_apart(batch, documents, starts, start)
        return batch | {"replaced": replaced} if replaced else batch

    def _batch(self, rows: npt.NDArray[np.integer], epochs: Integers, samples: Integers) -> Batch:
        """The batch of these rows of T + 1 tokens each, (B, T + 1)."""
        total = float(self.plan.global_batch_size * self.block_size)
        tokens, targets = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
        return {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets), "total": total}

    def _keep_apart(self, batch: Batch, documents: DocumentStarts, starts: Integers, step_start: int) -> None:
        """Says of which document each token is; what would be predicted across a boundary is no target."""
        batch["documents"] = torch.from_numpy(documents.mark(starts, batch["targets"].numpy()))
        if self._total is None or self._total[0] != step_start:
            size = self.plan.global_batch_size
            order = self._order_at(step_start + size - 1)
            crossing = documents.count(order.at(step_start, size)[2], self.block_size)
            self._total = step_start, float(size * self.block_size - crossing)
        batch["total"] = self._total[1]

    def _replaced(
        self, epochs: Integers, samples: Integers, starts: Integers
    ) -> tuple[Integers, Integers, npt.NDArray[np.integer], int]:
        """The batch with other blocks in place of those that are damaged: samples, starts, rows, how many were replaced.

        Which ones is a function of the damaged samples and their epochs alone, so that every number of processes and a
        resumed run find the same.

        Raises:
            DamagedShard: unless damage may be passed over, or if nothing whole is found.
        """
        order = self._order
        if not getattr(self.tokens, "skips", False) or not isinstance(order, BlockOrder):
            self.tokens.rows(starts, self.block_size + 1)  # once more, for its error
        assert isinstance(order, BlockOrder)
        samples, starts, rows, replaced = samples.copy(), starts.copy(), [], 0
        for i, (epoch, sample) in enumerate(zip(epochs.tolist(), samples.tolist(), strict=True)):
            for attempt in range(_ATTEMPTS + 1):
                try:
                    rows.append(self.tokens.rows(starts[i : i + 1], self.block_size + 1))
                    break
                except DamagedShard as error:
                    if attempt == _ATTEMPTS:
                        raise DataError(f"{error}; {_ATTEMPTS} samples in a row are damaged") from None
                    samples[i], starts[i] = order.replacement(epoch, sample, attempt)
            replaced += attempt > 0
        return samples, starts, np.concatenate(rows), replaced

    def _order_at(self, position: int) -> BlockOrder | _StreamOrder:
        """The order up to `position`; of a stream, as soon as the window it falls into has been tokenised."""
        if self._order is not None:
            return self._order
        if not self.streaming:
            self._order = order = BlockOrder(self.seed, self.block_size, self.tokens.parts())
            if isinstance(self.tokens, ShardTokens) and self.tokens.is_remote:
                self._prefetcher = self._prefetching(self.tokens)
            return order
        assert isinstance(self.tokens, TokenFile)
        info = self.tokens.info()
        if info is None:
            needed = (position // STREAM_WINDOW + 1) * STREAM_WINDOW * self.block_size + 1
            wait_for_tokens(self.tokens, needed)
            info = self.tokens.info()
        if info is None:  # the end is not known, and this position lies before it
            return _StreamOrder(self.seed, (position // STREAM_WINDOW + 1) * STREAM_WINDOW, self.block_size)
        blocks, wanted = (info.tokens - 1) // self.block_size, self.plan.global_batch_size
        if blocks < wanted:
            raise DataError(too_few(str(self.tokens.file), info.tokens, blocks, self.block_size, wanted))
        self._order = _StreamOrder(self.seed, blocks, self.block_size)
        return self._order

    def _prefetching(self, tokens: ShardTokens) -> Prefetcher:
        order = BlockOrder(self.seed, self.block_size, tokens.parts())  # of its own: it works in a thread

        def places(first: int, count: int) -> list[tuple[int, int, int]]:
            return tokens.places(order.at(first, count)[2], self.block_size + 1)

        return Prefetcher(places, tokens.file, tokens.prefetch_bytes)


def too_few(label: str, tokens: int, blocks: int, block_size: int, wanted: int) -> str:
    return (
        f"{label}: {tokens:,} training tokens make {blocks} samples of model.block_size={block_size}, fewer than one batch "
        f"of data.global_batch_size={wanted}; lower one of the two, or add text"
    )


class EvalBatches(Dataset[Batch]):
    """Micro batches of one rank that together cover a split once, every token a target but the first.

    The last block is short and the last batches may lack rows; what is missing carries ignored targets.
    """

    def __init__(self, tokens: Tokens, plan: Plan, rank: int) -> None:
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
            row = self._row(start, length + 1)
            if row is not None:
                tokens[i, :length], targets[i, :length] = row[:-1], row[1:]
        batch: Batch = {"tokens": tokens, "targets": targets}
        documents = getattr(self.tokens, "documents", None)
        if documents is not None:
            starts = np.arange(first, first + size) * self.block_size
            batch["documents"] = torch.from_numpy(documents.mark(starts, targets.numpy()))
        return batch

    def _row(self, start: int, length: int) -> Tensor | None:
        """Tokens from `start` on, (length,); None where they are damaged and damage may be passed over."""
        try:
            (row,) = self.tokens.rows(np.array([start]), length)
        except DamagedShard:
            if not getattr(self.tokens, "skips", False):
                raise
            return None
        return torch.from_numpy(row.astype(np.int64))


class TextDataModule(DataModule):
    """Serves blocks of a corpus.

    Args:
        section: the recipe's data section.
        plan: batch sizes, ranks, workers, steps, tokens in one sample.
        seed: decides the order of samples.
        folder: the run's, where rank 0 leaves the tokenizer for later use of the model.
    """

    corpus: Corpus | ShardCorpus

    def __init__(self, section: EmbeddedData | TextData | ShardData, plan: Plan, seed: int, folder: RunFolder) -> None:
        super().__init__(plan, seed)
        assert plan.block_size is not None
        self.section, self.block_size, self.folder = section, plan.block_size, folder
        self.streaming = bool(getattr(section, "streaming", False))

    def prepare(self, model: AnyModel) -> None:
        """Tokenises what is not tokenised yet, and checks that the data fit the batch and the model."""
        if isinstance(self.section, ShardData):
            self.corpus = ShardCorpus(self.section, self.block_size)
        else:
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
            parts, wanted = self.corpus.tokens(split).parts(), self.plan.global_batch_size
            blocks = sum(train_blocks(part.tokens, self.block_size) for part in parts)
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
        return self.streaming or (isinstance(self.corpus, ShardCorpus) and self.corpus.is_remote)

    @property
    def may_replace(self) -> bool:
        return isinstance(self.corpus, ShardCorpus) and self.corpus.skips

    def train_batches(self, rank: int) -> StepBatches:
        tokens = self.corpus.tokens("train")
        return TrainBatches(tokens, self.plan, rank, self.seed, self.start_step, self.streaming)

    def evaluation_batches(self, split: Split, rank: int) -> Dataset[Batch]:
        return EvalBatches(self.corpus.tokens(split), self.plan, rank)
