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
            targets: (B, T), already those of each position (next tokens, or masked ones), -100 where there is none.
            last_only: logits of the last position only.

        Returns:
            Without targets (B, T, vocabulary of the model) logits, T being 1 with `last_only`; with targets the summed
            cross-entropy in nats, ().
        """
        logits = self.logits(tokens)
        if targets is None:
            return logits[:, -1:] if last_only else logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
