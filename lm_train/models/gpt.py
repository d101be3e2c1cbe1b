"""GPT-2 style decoder (Radford et al. 2019): learned positions, pre-norm blocks, head tied to the embedding."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_train.models.transformer import (
    BlockConfig,
    BlockStack,
    chunked_cross_entropy,
    init_weights,
    mask_padding,
)
from lm_train.plan import padded_vocab_size
from lm_train.recipe import GPT as GPTSection


class GPT(nn.Module):
    """A decoder-only language model.

    Args:
        section: sizes; see `lm_train.recipe.GPT`.
        vocab_size: token ids. The embedding has this many rows, rounded up to a multiple of 64; the ids above
            `vocab_size` never take probability.
        activation_checkpointing: blocks that recompute their activations: "none", "full", or every n-th.
        cross_entropy_chunks: pieces in which the loss computes its logits.
    """

    def __init__(
        self,
        section: GPTSection,
        vocab_size: int,
        activation_checkpointing: Literal["none", "full"] | int = "none",
        cross_entropy_chunks: int = 1,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.block_size = section.block_size
        self.cross_entropy_chunks = cross_entropy_chunks
        config = BlockConfig(section.n_layer, section.n_head, section.n_embd, section.dropout, section.bias)
        with torch.device("meta"):  # torch's own initial weights would cost time and random numbers
            self.token_embedding = nn.Embedding(padded_vocab_size(vocab_size), section.n_embd)
            self.position_embedding = nn.Embedding(section.block_size, section.n_embd)
            self.dropout = nn.Dropout(section.dropout)
            self.blocks = BlockStack(config, activation_checkpointing)
            self.norm = nn.LayerNorm(section.n_embd, bias=section.bias)
        self.to_empty(device=torch.get_default_device())
        self.init_weights()

    def init_weights(self) -> None:
        """Draws the initial weights; after `to_empty` of a model built on the meta device, the same as built in place."""
        init_weights(self, n_layer=len(self.blocks))

    def hidden(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, C)
        t = tokens.shape[1]
        if t > self.block_size:
            raise ValueError(f"a sequence of {t} tokens is longer than block_size={self.block_size}")
        positions = torch.arange(t, device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        return self.norm(self.blocks(x))

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits of the next token, or with targets the loss (one entry point, so that wrappers see every use).

        Args:
            tokens: (B, T).
            targets: (B, T), -100 where nothing is to be predicted.

        Returns:
            Without targets (B, T, vocab_size) logits; with targets the summed cross-entropy in nats, ().
        """
        hidden, weight = self.hidden(tokens), self.token_embedding.weight
        if targets is None:
            return F.linear(hidden, weight)[..., : self.vocab_size]
        return chunked_cross_entropy(hidden, weight, targets, self.vocab_size, self.cross_entropy_chunks)

    @torch.no_grad()
    def generate(self, tokens: Tensor, n_tokens: int, temperature: float = 0.8, top_k: int = 50) -> Tensor:
        """Samples `n_tokens` more tokens.

        Args:
            tokens: prompt, (1, T) with T at least 1.
            n_tokens: how many to add.
            temperature: divides the logits; above 0.
            top_k: only the k most likely tokens are drawn.

        Returns:
            Prompt and continuation, (1, T + n_tokens).
        """
        for _ in range(n_tokens):
            last = self.hidden(tokens[:, -self.block_size :])[:, -1]  # (1, C)
            logits = mask_padding(F.linear(last, self.token_embedding.weight).float(), self.vocab_size) / temperature
            best, ids = logits.topk(min(top_k, self.vocab_size))  # (1, k)
            choice = torch.multinomial(best.softmax(dim=-1), 1)
            tokens = torch.cat((tokens, ids.gather(1, choice)), dim=1)
        return tokens
