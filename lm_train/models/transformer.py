"""Transformer blocks. Shapes in comments: B batch, T sequence, C width (n_embd), H heads, D = C/H."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class BlockConfig:
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool


class SelfAttention(nn.Module):
    """Multi-head causal self-attention (Vaswani et al. 2017, section 3.2) by torch's fused kernel."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        b, t, c = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.n_head, c // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(b, t, c))


class MLP(nn.Module):
    """Two linear layers, four times wider between, with GPT-2's tanh form of GELU (Hendrycks & Gimpel 2016)."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        config: sizes.
        recompute: keep only the input in training and compute the activations again in the backward pass. The block does
            it by itself, so that whatever wraps it (sharding, `Block.compile`) lies outside of the recomputation.
    """

    def __init__(self, config: BlockConfig, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.attention_norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = SelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        if self.recompute and self.training:
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class BlockStack(nn.ModuleList):
    """n_layer blocks, of which none, all, or every n-th recompute their activations in the backward pass."""

    def __init__(self, config: BlockConfig, activation_checkpointing: Literal["none", "full"] | int) -> None:
        match activation_checkpointing:
            case "none":
                every = config.n_layer + 1
            case "full":
                every = 1
            case n:
                every = n
        super().__init__(Block(config, recompute=(i + 1) % every == 0) for i in range(config.n_layer))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        for block in self:
            x = block(x)
        return x


def chunked_cross_entropy(
    hidden: Tensor,  # (B, T, C)
    weight: Tensor,  # (V padded, C)
    targets: Tensor,  # (B, T), -100 where no token is to be predicted
    vocab_size: int,
    chunks: int,
) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T`, in nats, over targets that are not -100.

    With `chunks` above 1 the logits exist for one piece of the B*T tokens at a time, in the forward and in the backward
    pass (where they are computed again): memory falls by about `chunks`, one more product with the head is paid.
    """
    flat_hidden, flat_targets = hidden.flatten(0, 1), targets.flatten()
    if chunks == 1:
        return _cross_entropy(flat_hidden, weight, flat_targets, vocab_size)
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(flat_hidden.chunk(chunks), flat_targets.chunk(chunks), strict=True):
        total = total + checkpoint(
            _cross_entropy, part, weight, wanted, vocab_size, use_reentrant=False, preserve_rng_state=False
        )
    return total


def _cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    logits = mask_padding(F.linear(hidden, weight), vocab_size)
    return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")


def mask_padding(logits: Tensor, vocab_size: int) -> Tensor:
    """Sets the logits of ids that pad the vocabulary to minus infinity: they take no probability and no gradient."""
    if logits.shape[-1] > vocab_size:
        logits[..., vocab_size:] = float("-inf")
    return logits
