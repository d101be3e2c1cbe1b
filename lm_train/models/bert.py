"""BERT (Devlin et al. 2019, arXiv:1810.04805): an encoder that reads both ways, with the head of its task."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_train.models.decoder import INIT_STD
from lm_train.models.transformer import BlockConfig, BlockStack, chunked_cross_entropy, seen_positions
from lm_train.plan import padded_vocab_size
from lm_train.recipe import BERT as BERTSection

NORM_EPS = 1e-12
TOKEN_TYPES = 2
"""First and second text of a pair. Everything read here is a first text; the second's row is there for released weights."""


class MaskedHead(nn.Module):
    """The product with the token embedding's weights, and a bias of its own for each token id."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(rows))

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor | None, vocab_size: int, chunks: int) -> Tensor:
        """Logits (B, k, vocab_size) of hidden states (B, k, C); with targets, (B, k), the summed cross-entropy, ()."""
        if targets is None:
            return F.linear(hidden, weight, self.bias)[..., :vocab_size]
        return chunked_cross_entropy(hidden, weight, targets, vocab_size, chunks, self.bias)


class BERT(nn.Module):
    """The encoder with either a masked-LM head (`n_classes` None) or a classifier on the pooled first position.

    Equal to transformers' BertForMaskedLM and BertForSequenceClassification with the same weights.

    Args:
        section: sizes; see `lm_train.recipe.BERT`.
        vocab_size: token ids, the mask symbol included.
        n_classes: of a classification; None for a masked language model.
        activation_checkpointing: blocks that recompute their activations: "none", "full", or every n-th.
        cross_entropy_chunks: pieces in which the masked-LM loss computes its logits.
        initialise: draw the weights; else they stay on the meta device, for whoever calls `fill`.
    """

    def __init__(
        self,
        section: BERTSection,
        vocab_size: int,
        n_classes: int | None = None,
        activation_checkpointing: Literal["none", "full"] | int = "none",
        cross_entropy_chunks: int = 1,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        self.vocab_size, self.block_size = vocab_size, section.block_size
        self.cross_entropy_chunks = cross_entropy_chunks
        d = section.n_embd
        config = BlockConfig(
            n_layer=section.n_layer,
            n_head=section.n_head,
            n_kv_head=section.n_head,
            n_embd=d,
            mlp_width=4 * d,
            dropout=section.dropout,
            bias=True,
            norm="layer",
            norm_eps=NORM_EPS,
            rope_theta=None,
            gated=False,
            activation="gelu",
            causal=False,
            pre_norm=False,
        )
        with torch.device("meta"):  # torch's own initial weights would cost time and random numbers
            rows = padded_vocab_size(vocab_size)
            self.token_embedding = nn.Embedding(rows, d)
            self.position_embedding = nn.Embedding(section.block_size, d)
            self.type_embedding = nn.Embedding(TOKEN_TYPES, d)
            self.embedding_norm = config.make_norm()
            self.dropout = nn.Dropout(section.dropout)
            self.blocks = BlockStack(config, activation_checkpointing)
            self.transform = nn.Linear(d, d) if n_classes is None else None
            self.transform_norm = config.make_norm() if n_classes is None else None
            self.head = MaskedHead(rows) if n_classes is None else None
            self.pooler = None if n_classes is None else nn.Linear(d, d)
            self.classifier = None if n_classes is None else nn.Linear(d, n_classes)
        if initialise:
            self.to_empty(device=torch.get_default_device())
            for name, parameter in self.named_parameters():
                self.fill(name, parameter)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Class scores, or what stands at the masked positions.

        Args:
            tokens: (B, T), the mask symbol where a token is to be guessed.
            lengths: real tokens of each row, (B,), at least 1; None: all T.
            positions: where to guess, (B, k); None: everywhere.
            targets: the right tokens there, (B, k), -100 where nothing is to be guessed.

        Returns:
            A classifier's logits (B, classes); a masked LM's logits (B, k, vocab_size), or with targets the summed
            cross-entropy in nats, ().

        Raises:
            ValueError: if a row is longer than block_size.
        """
        hidden = self.hidden(tokens, lengths)
        if self.classifier is not None and self.pooler is not None:
            return self.classifier(self.dropout(torch.tanh(self.pooler(hidden[:, 0]))))
        assert self.transform is not None
        assert self.transform_norm is not None
        assert self.head is not None
        if positions is not None:  # the product with the vocabulary only where it is wanted
            hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))  # (B, k, C)
        hidden = self.transform_norm(F.gelu(self.transform(hidden)))
        return self.head(hidden, self.token_embedding.weight, targets, self.vocab_size, self.cross_entropy_chunks)

    def hidden(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:  # (B, T), (B,) -> (B, T, C)
        t = tokens.shape[1]
        if t > self.block_size:
            raise ValueError(f"a sequence of {t} tokens is longer than block_size={self.block_size}")
        first = self.type_embedding(torch.zeros_like(tokens))
        at = self.position_embedding(torch.arange(t, device=tokens.device))
        x = self.dropout(self.embedding_norm(self.token_embedding(tokens) + first + at))
        return self.blocks(x, None if lengths is None else seen_positions(lengths, t))

    def fill(self, name: str, tensor: Tensor) -> None:
        """Puts the initial value of parameter `name` into `tensor`, which has the parameter's shape.

        BERT's normal(0, 0.02) is for its width of 768; here the deviation is 0.02 sqrt(768/C), so that products of narrower
        networks are as large, and attention does not start all but uniform. Biases 0, norms 1. Called in the order of
        `named_parameters`, it draws the numbers that building in place draws.
        """
        *_, module, kind = name.split(".")
        if kind == "bias":
            nn.init.zeros_(tensor)
        elif module.endswith("norm"):
            nn.init.ones_(tensor)
        else:
            nn.init.normal_(tensor, mean=0.0, std=INIT_STD * math.sqrt(768 / self.token_embedding.embedding_dim))
