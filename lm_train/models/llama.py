"""Llama style decoder (Touvron et al. 2023, arXiv:2302.13971): rotary positions, RMSNorm, SwiGLU, no biases."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lm_train.models.decoder import Decoder
from lm_train.models.transformer import BlockConfig, BlockStack, same_document
from lm_train.plan import padded_vocab_size
from lm_train.recipe import Llama as LlamaSection


class Llama(Decoder):
    """A decoder-only language model.

    Args:
        section: sizes; see `lm_train.recipe.Llama`.
        vocab_size: token ids.
        activation_checkpointing: blocks that recompute their activations: "none", "full", or every n-th.
        cross_entropy_chunks: pieces in which the loss computes its logits.
        initialise: draw the weights; else they stay on the meta device, for whoever calls `fill`.
    """

    def __init__(
        self,
        section: LlamaSection,
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
            n_kv_head=section.key_value_heads,
            n_embd=section.n_embd,
            mlp_width=section.mlp_width,
            dropout=section.dropout,
            bias=False,
            norm="rms",
            norm_eps=section.norm_eps,
            rope_theta=section.rope_theta,
            gated=True,
        )
        with torch.device("meta"):  # torch's own initial weights would cost time and random numbers
            self.token_embedding = nn.Embedding(padded_vocab_size(vocab_size), section.n_embd)
            self.dropout = nn.Dropout(section.dropout)
            self.blocks = BlockStack(config, activation_checkpointing)
            self.norm = config.make_norm()
            rows = self.token_embedding.num_embeddings
            self.head = None if section.tie_embeddings else nn.Linear(section.n_embd, rows, bias=False)
        if initialise:
            self.to_empty(device=torch.get_default_device())
            self.init_weights()

    @property
    def head_weight(self) -> Tensor:  # (V padded, C)
        return self.token_embedding.weight if self.head is None else self.head.weight

    def hidden(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:  # (B, T), (B, T) -> (B, T, C)
        seen = None if documents is None else same_document(documents)  # rotary positions are relative: they run on
        return self.norm(self.blocks(self.dropout(self.token_embedding(tokens)), seen))
