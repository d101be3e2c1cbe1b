"""GPT-2 style decoder (Radford et al. 2019): learned positions, pre-norm blocks, head tied to the embedding."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lm_train.models.decoder import Decoder
from lm_train.models.transformer import BlockConfig, BlockStack, positions_within, same_document
from lm_train.plan import padded_vocab_size
from lm_train.recipe import GPT as GPTSection


class GPT(Decoder):
    """A decoder-only language model.

    Args:
        section: sizes; see `lm_train.recipe.GPT`.
        vocab_size: token ids.
        activation_checkpointing: blocks that recompute their activations: "none", "full", or every n-th.
        cross_entropy_chunks: pieces in which the loss computes its logits.
        initialise: draw the weights; else they stay on the meta device, for whoever calls `fill`.
    """

    def __init__(
        self,
        section: GPTSection,
        vocab_size: int,
        activation_checkpointing: Literal["none", "full"] | int = "none",
        cross_entropy_chunks: int = 1,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.block_size = section.block_size
        self.cross_entropy_chunks = cross_entropy_chunks
        config = BlockConfig(
            n_layer=section.n_layer,
            n_head=section.n_head,
            n_kv_head=section.n_head,
            n_embd=section.n_embd,
            mlp_width=4 * section.n_embd,
            dropout=section.dropout,
            bias=section.bias,
            norm="layer",
            norm_eps=1e-5,
            rope_theta=None,
            gated=False,
        )
        with torch.device("meta"):  # torch's own initial weights would cost time and random numbers
            self.token_embedding = nn.Embedding(padded_vocab_size(vocab_size), section.n_embd)
            self.position_embedding = nn.Embedding(section.block_size, section.n_embd)
            self.dropout = nn.Dropout(section.dropout)
            self.blocks = BlockStack(config, activation_checkpointing)
            self.norm = config.make_norm()
        if initialise:
            self.to_empty(device=torch.get_default_device())
            self.init_weights()

    @property
    def head_weight(self) -> Tensor:  # (V padded, C)
        return self.token_embedding.weight

    def hidden(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:  # (B, T), (B, T) -> (B, T, C)
        if documents is None:
            positions, seen = torch.arange(tokens.shape[1], device=tokens.device), None
        else:  # each document is read as if it stood alone: from position 0 on
            positions, seen = positions_within(documents), same_document(documents)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        return self.norm(self.blocks(x, seen))
