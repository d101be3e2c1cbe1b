"""The encoder-decoder Transformer (Vaswani et al. 2017, arXiv:1706.03762): one text in, another out."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_train.models.transformer import BlockConfig, BlockStack, chunked_cross_entropy, seen_positions
from lm_train.plan import padded_vocab_size
from lm_train.recipe import Seq2Seq as Seq2SeqSection


class Seq2Seq(nn.Module):
    """Post-norm blocks with ReLU, sinusoidal positions, one embedding for source, target and the head.

    Equal to transformers' MarianMTModel (with ReLU and scaled embeddings) with the same weights.

    Args:
        section: sizes; see `lm_train.recipe.Seq2Seq`.
        vocab_size: token ids of both texts, with those that start, end and fill up.
        activation_checkpointing: blocks that recompute their activations: "none", "full", or every n-th.
        cross_entropy_chunks: pieces in which the loss computes its logits.
        initialise: draw the weights; else they stay on the meta device, for whoever calls `fill`.
    """

    def __init__(
        self,
        section: Seq2SeqSection,
        vocab_size: int,
        activation_checkpointing: Literal["none", "full"] | int = "none",
        cross_entropy_chunks: int = 1,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        self.vocab_size, self.block_size = vocab_size, section.block_size
        self.cross_entropy_chunks = cross_entropy_chunks

        def stack(decodes: bool) -> BlockStack:
            config = BlockConfig(
                n_layer=section.n_layer,
                n_head=section.n_head,
                n_kv_head=section.n_head,
                n_embd=section.n_embd,
                mlp_width=4 * section.n_embd,
                dropout=section.dropout,
                bias=True,
                norm="layer",
                norm_eps=1e-5,
                rope_theta=None,
                gated=False,
                activation="relu",
                causal=decodes,
                pre_norm=False,
                cross_attention=decodes,
            )
            return BlockStack(config, activation_checkpointing)

        with torch.device("meta"):  # torch's own initial weights would cost time and random numbers
            self.token_embedding = nn.Embedding(padded_vocab_size(vocab_size), section.n_embd)
            self.dropout = nn.Dropout(section.dropout)
            self.encoder, self.decoder = stack(decodes=False), stack(decodes=True)
        if initialise:
            self.to_empty(device=torch.get_default_device())
            for name, parameter in self.named_parameters():
                self.fill(name, parameter)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        target_tokens: Tensor | None = None,
        targets: Tensor | None = None,
        memory: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Encoder and decoder behind one entry point, so that wrappers see every use.

        Args:
            tokens: the sources, (B, S).
            lengths: their real tokens, (B,), at least 1; None: all S.
            target_tokens: what the decoder has read, (B, T), filled up at the end; None: encode only.
            targets: what follows each of them, (B, T), -100 where nothing is to be predicted.
            memory: the encoder's output where it is known already, (B, S, C).
            last_only: logits of the last position only.

        Returns:
            Without target_tokens the encoder's output, (B, S, C); without targets logits, (B, T, vocab_size), T being 1
            with `last_only`; else the summed cross-entropy in nats, ().

        Raises:
            ValueError: if a source or target is longer than block_size.
        """
        seen = None if lengths is None else seen_positions(lengths, tokens.shape[1])
        if memory is None:
            memory = self.encoder(self._embed(tokens), seen)
        if target_tokens is None:
            return memory
        hidden = self.decoder(self._embed(target_tokens), None, memory, seen)
        weight = self.token_embedding.weight
        if targets is None:
            return F.linear(hidden[:, -1:] if last_only else hidden, weight)[..., : self.vocab_size]
        return chunked_cross_entropy(hidden, weight, targets, self.vocab_size, self.cross_entropy_chunks)

    @torch.no_grad()
    def generate(self, tokens: Tensor, lengths: Tensor | None, n_tokens: int, start: int, end: int) -> Tensor:
        """The likeliest token after each other (greedy decoding), for a batch.

        Where parameters are sharded every rank calls it, with the same n_tokens: the number of passes never depends on
        what comes out.

        Args:
            tokens: the sources, (B, S).
            lengths: their real tokens, (B,); None: all S.
            n_tokens: most tokens of an output, up to block_size.
            start: id that the decoder begins with.
            end: id that ends an output.

        Returns:
            The outputs, (B, n_tokens), `end` from where they end.
        """
        with torch.compiler.set_stance("force_eager"):  # a graph for each new length costs more than it saves
            memory = self(tokens, lengths)
            read = torch.full((len(tokens), 1), start, device=tokens.device)
            ended = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
            for _ in range(n_tokens):
                logits = self(tokens, lengths, read, memory=memory, last_only=True)  # (B, 1, V)
                following = logits.argmax(dim=-1).masked_fill(ended, end)
                ended = ended | (following == end)
                read = torch.cat((read, following), dim=1)
        return read[:, 1:]

    def fill(self, name: str, tensor: Tensor) -> None:
        """Puts the initial value of parameter `name` into `tensor`, which has the parameter's shape.

        As tensor2tensor and fairseq do it: embeddings normal(0, 1/sqrt(C)), matrices uniform (Glorot & Bengio 2010), biases
        0, norms 1. Called in the order of `named_parameters`, it draws the numbers that building in place draws.
        """
        *_, module, kind = name.split(".")
        if kind == "bias":
            nn.init.zeros_(tensor)
        elif module.endswith("norm"):
            nn.init.ones_(tensor)
        elif module == "token_embedding":
            nn.init.normal_(tensor, mean=0.0, std=tensor.shape[1] ** -0.5)
        else:
            nn.init.xavier_uniform_(tensor)

    def _embed(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, C)
        t = tokens.shape[1]
        if t > self.block_size:
            raise ValueError(f"a sequence of {t} tokens is longer than block_size={self.block_size}")
        embedded = self.token_embedding(tokens)
        c = embedded.shape[-1]
        return self.dropout(embedded * math.sqrt(c) + sinusoidal_positions(t, c, tokens.device).to(embedded.dtype))


def sinusoidal_positions(length: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines of position / 10000^(2i/C), (T, C) in fp32 (Vaswani et al. 2017, section 3.5).

    All sines stand before all cosines, as in the authors' tensor2tensor; a permutation of the paper's columns. Computed in
    every call: no table that a cast of the module or a build on the meta device could spoil.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), 10000.0**-exponents)
    return torch.cat((angles.sin(), angles.cos()[:, : width // 2]), dim=-1)
