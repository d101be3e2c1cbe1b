"""A language model of someone else's: whatever gives logits, with the entry point that ours have."""

from __future__ import annotations

from abc import abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
"""Target of a position where nothing is to be predicted."""


class LogitsLanguageModel(nn.Module):
    """What computes the loss from whole logits.

    Args:
        block_size: most tokens of one sequence.
        vocab_size: token ids of the data; the model may have more.
    """

    def __init__(self, block_size: int, vocab_size: int) -> None:
        super().__init__()
        self.block_size, self.vocab_size = block_size, vocab_size

    @abstractmethod
    def logits(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        """Of each position."""

    def forward(self, tokens: Tensor, targets: Tensor | None = None, last_only: bool = False) -> Tensor:
        """Logits, or with targets the loss.

        Args:
            tokens: (B, T).
            targets: (B, T), the next token of each position, -100 where there is none.
            last_only: logits of the last position only.

        Returns:
            Without targets (B, T, vocabulary of the model) logits, T being 1 with `last_only`; with targets the summed
            cross-entropy in nats, ().
        """
        logits = self.logits(tokens)
        if targets is None:
            return logits[:, -1:] if last_only else logits
        return summed_cross_entropy(logits, targets)


class LogitsMaskedLM(nn.Module):
    """What guesses masked tokens, with the entry point of our own."""

    @abstractmethod
    def logits(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:  # (B, T), (B,) -> (B, T, V)
        """Of each position; what stands behind a row's length is padding."""

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits, or with targets the loss.

        Args:
            tokens: (B, T), the mask symbol where a token is to be guessed.
            targets: the right tokens, (B, k), -100 where nothing is to be guessed.
            lengths: real tokens of each row, (B,); None: all T.
            positions: where to guess, (B, k); None: everywhere, k being T.

        Returns:
            Without targets (B, k, vocabulary of the model) logits; with targets the summed cross-entropy in nats, ().
        """
        logits = self.logits(tokens, lengths)
        if positions is not None:
            logits = logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))
        return logits if targets is None else summed_cross_entropy(logits, targets)


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:  # (B, T, V), (B, T) -> ()
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
