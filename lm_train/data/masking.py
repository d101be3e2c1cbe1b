"""Masked language modelling (Devlin et al. 2019, section 3.1): which tokens of a block are hidden, and behind what."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from lm_train.data.batches import IGNORED, Batch, Integers, Split, StepBatches
from lm_train.data.order import key_of, mix64
from lm_train.data.text import STREAM_WINDOW, EvalBatches, TextDataModule, Tokens, TrainBatches
from lm_train.data.tokenizer import vocabulary_size
from lm_train.errors import DataError
from lm_train.plan import DataFacts, Plan
from lm_train.recipe import AnyModel
from lm_train.recipe.tokenizer_names import MASKS

_MASKED, _RANDOM = 0.8, 0.1
"""Shares of the chosen tokens that the mask symbol, and that a random token replaces; the rest stays as it is."""
_EVALUATION = 0x6576616C
"""Stands for the seed in the keys of evaluation masks, which are the same in every run."""
_COUNTED_TOKENS = 10_000_000
"""The most frequent token is looked for among the first so many of the training split."""


class Masking:
    """Hides a fixed number of tokens of each block.

    Args:
        fraction: share of a block's tokens that are chosen.
        vocab_size: ids of the corpus' tokens; a random token is one of them.
        mask_id: of the mask symbol.
    """

    def __init__(self, fraction: float, vocab_size: int, mask_id: int) -> None:
        self.fraction, self.vocab_size, self.mask_id = fraction, vocab_size, mask_id

    def count(self, length: int) -> int:
        """How many tokens of a block of this length are chosen: always as many, so that a batch's total is known."""
        return min(length, max(1, round(self.fraction * length)))

    def hide(self, tokens: Integers, key: int) -> tuple[Integers, Integers, Integers]:
        """What the network sees of one block, where it has to guess, and what stands there.

        Args:
            tokens: (T,).
            key: decides everything.

        Returns:
            The block with tokens replaced, (T,); chosen positions in ascending order, (k,); their tokens, (k,).
        """
        size, k = len(tokens), self.count(len(tokens))
        at = np.arange(size, dtype=np.uint64)
        chosen = np.sort(np.argsort(mix64(at ^ np.uint64(key)), kind="stable")[:k])
        replaced = mix64(at[chosen] ^ np.uint64(key_of(key, 1))) / np.float64(2**64)
        drawn = (mix64(at[chosen] ^ np.uint64(key_of(key, 2))) % np.uint64(self.vocab_size)).astype(np.int64)
        kept = tokens[chosen]
        seen = tokens.copy()
        seen[chosen] = np.where(replaced < _MASKED, self.mask_id, np.where(replaced < _MASKED + _RANDOM, drawn, kept))
        return seen, chosen, kept


class MaskedTrainBatches(TrainBatches):
    """Blocks of T tokens of which k are to be guessed: other ones in each epoch, the same at any number of ranks."""

    def __init__(
        self, masking: Masking, tokens: Tokens, plan: Plan, rank: int, seed: int, start_step: int, streaming: bool
    ) -> None:
        super().__init__(tokens, plan, rank, seed, start_step, streaming)
        self.masking = masking

    def _batch(self, rows: npt.NDArray[np.integer], epochs: Integers, samples: Integers) -> Batch:
        blocks = rows[:, : self.block_size].astype(np.int64)
        hidden = [
            self.masking.hide(block, key_of(self.seed, int(epoch), int(sample), self.block_size))
            for block, epoch, sample in zip(blocks, epochs, samples, strict=True)
        ]
        seen, chosen, kept = (torch.from_numpy(np.stack(part)) for part in zip(*hidden, strict=True))
        total = float(self.plan.global_batch_size * self.masking.count(self.block_size))
        return {"tokens": seen, "positions": chosen, "targets": kept, "total": total}


class MaskedEvalBatches(EvalBatches):
    """Micro batches of one rank that together cover a split once, with masks that no run, seed or number of ranks changes.

    The last block is short and the last batches may lack rows; what is missing carries ignored targets.
    """

    def __init__(self, masking: Masking, tokens: Tokens, plan: Plan, rank: int) -> None:
        super().__init__(tokens, plan, rank)
        self.masking = masking
        self.n_tokens = tokens.available()
        self.n_blocks = -(-self.n_tokens // self.block_size)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        size, k = self.plan.micro_batch_size, self.masking.count(self.block_size)
        first = (index * self.plan.world_size + self.rank) * size
        tokens = torch.zeros(size, self.block_size, dtype=torch.int64)
        lengths = torch.full((size,), self.block_size)
        positions = torch.zeros(size, k, dtype=torch.int64)
        targets = torch.full((size, k), IGNORED)
        for i in range(max(0, min(size, self.n_blocks - first))):
            start = (first + i) * self.block_size
            length = min(self.block_size, self.n_tokens - start)
            row = self._row(start, length)
            if row is None:
                continue
            seen, chosen, kept = self.masking.hide(row.numpy(), key_of(_EVALUATION, first + i, self.block_size))
            tokens[i, :length], lengths[i] = torch.from_numpy(seen), length
            positions[i, : len(chosen)], targets[i, : len(chosen)] = torch.from_numpy(chosen), torch.from_numpy(kept)
        return {"tokens": tokens, "lengths": lengths, "positions": positions, "targets": targets}


class MaskedTextDataModule(TextDataModule):
    """Serves blocks of a corpus with tokens to guess; the vocabulary has a mask symbol."""

    masking: Masking

    def prepare(self, model: AnyModel) -> None:
        super().prepare(model)
        plain = vocabulary_size(self.corpus.tokenizer)
        self._with_mask = Tokenizer.from_str(self.corpus.tokenizer.to_str())
        if all(self._with_mask.token_to_id(mask) is None for mask in MASKS):
            self._with_mask.add_special_tokens([MASKS[0]])
        mask_id = next(i for i in map(self._with_mask.token_to_id, MASKS) if i is not None)
        vocab_size = vocabulary_size(self._with_mask)
        asked: int | str = getattr(model, "vocab_size", "auto")
        if isinstance(asked, int) and mask_id >= asked:
            raise DataError(
                f"{self.label}: the mask symbol is token id {mask_id}, not below model.vocab_size={asked}; set "
                f"model.vocab_size=auto or at least {mask_id + 1}"
            )
        self.masking = Masking(self.section.mask_fraction, plain, mask_id)
        self.facts = DataFacts(
            vocab_size=vocab_size, guessed_fraction=self.masking.count(self.block_size) / self.block_size
        )

    @property
    def tokenizer(self) -> Tokenizer:
        return self._with_mask

    @cached_property
    def most_frequent_token(self) -> int:
        """Of the training split, or of its first tokens where it is long or still growing."""
        tokens = self.corpus.tokens("train")
        info = tokens.info()
        count = STREAM_WINDOW * self.block_size if info is None else min(info.tokens, _COUNTED_TOKENS)
        (ids,) = tokens.rows(np.zeros(1, dtype=np.int64), count)
        return int(np.bincount(ids).argmax())

    def train_batches(self, rank: int) -> StepBatches:
        tokens = self.corpus.tokens("train")
        return MaskedTrainBatches(self.masking, tokens, self.plan, rank, self.seed, self.start_step, self.streaming)

    def evaluation_batches(self, split: Split, rank: int) -> Dataset[Batch]:
        return MaskedEvalBatches(self.masking, self.corpus.tokens(split), self.plan, rank)
