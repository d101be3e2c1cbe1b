"""Transformer blocks, for decoders, encoders and pairs of them.

Shapes in comments: B batch, T sequence, S the other sequence, C width (n_embd), H heads, K heads of keys, D = C/H.
"""

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
    n_kv_head: int
    n_embd: int
    mlp_width: int
    dropout: float
    bias: bool
    norm: Literal["layer", "rms"]
    norm_eps: float
    rope_theta: float | None
    """Base of rotary positions; None: the blocks know no positions."""
    gated: bool
    """SwiGLU instead of two layers with `activation` between in the MLP."""
    activation: Literal["gelu_tanh", "gelu", "relu"] = "gelu_tanh"
    """GELU in GPT-2's tanh form, GELU as it is defined (BERT), or ReLU (Vaswani et al. 2017)."""
    causal: bool = True
    """A position sees itself and what stands before it; else the whole sequence."""
    pre_norm: bool = True
    """x + f(norm(x)); else norm(x + f(x)), as the first Transformers have it."""
    cross_attention: bool = False
    """Between attention and MLP each block looks at another sequence, the encoder's output."""

    def make_norm(self) -> nn.Module:
        if self.norm == "rms":
            return nn.RMSNorm(self.n_embd, eps=self.norm_eps)  # Zhang & Sennrich 2019, arXiv:1910.07467
        return nn.LayerNorm(self.n_embd, eps=self.norm_eps, bias=self.bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2) by torch's fused kernel.

    With fewer key than query heads H/K neighbouring query heads share one (Ainslie et al. 2023, arXiv:2305.13245).
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        self.dropout = config.dropout
        self.causal = config.causal
        self.rope_theta = config.rope_theta
        self.head_size = config.n_embd // config.n_head
        self.qkv = nn.Linear(config.n_embd, sum(self.heads) * self.head_size, bias=config.bias)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """
        Args:
            x: (B, T, C).
            seen: which keys each query may look at, (B, 1, 1 or T, T) bool; None: all, in causal attention those before it.
                A mask given to causal attention is all that it goes by (`same_document`).

        Returns:
            (B, T, C).
        """
        b, t, c = x.shape
        qkv = self.qkv(x).view(b, t, sum(self.heads), self.head_size)
        q, k, v = qkv.split(self.heads, dim=2)
        if self.rope_theta is not None:
            cos, sin = rotary_angles(t, self.head_size, self.rope_theta, x.device)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, D)
        if k.shape[1] != q.shape[1]:
            # enable_gqa=True would leave fp32, and GPUs before compute capability 8.0, without a fused kernel
            # (github.com/pytorch/pytorch/pull/181528)
            k, v = (kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1) for kv in (k, v))
        dropout = self.dropout if self.training else 0.0
        causal = self.causal and seen is None
        y = F.scaled_dot_product_attention(q, k, v, seen, dropout_p=dropout, is_causal=causal)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(b, t, c))


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence to another (Vaswani et al. 2017, section 3.2.3)."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.query = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.key_value = nn.Linear(config.n_embd, 2 * config.n_embd, bias=config.bias)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, memory: Tensor, seen: Tensor | None) -> Tensor:
        """
        Args:
            x: (B, T, C), which asks.
            memory: (B, S, C), which answers.
            seen: which positions of `memory` may be looked at, (B, 1, 1, S) bool; None: all.

        Returns:
            (B, T, C).
        """
        b, t, c = x.shape
        q = self.query(x).view(b, t, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        key_value = self.key_value(memory).view(b, memory.shape[1], 2 * self.n_head, -1)
        k, v = key_value.transpose(1, 2).chunk(2, dim=1)  # (B, H, S, D)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, seen, dropout_p=dropout)
        return self.out(y.transpose(1, 2).reshape(b, t, c))


def seen_positions(lengths: Tensor, size: int) -> Tensor:
    """Which positions of sequences filled up at the end are real: (B,) lengths -> (B, 1, 1, size) bool."""
    return (torch.arange(size, device=lengths.device) < lengths[:, None])[:, None, None]


def same_document(documents: Tensor) -> Tensor:
    """Which positions a causal attention may look at that stays within a document: (B, T) numbers -> (B, 1, T, T) bool."""
    size = documents.shape[1]
    before = torch.ones(size, size, dtype=torch.bool, device=documents.device).tril()
    return ((documents[:, :, None] == documents[:, None, :]) & before)[:, None]


def positions_within(documents: Tensor) -> Tensor:
    """How far each token stands behind the first one of its document in the row: (B, T) numbers -> (B, T)."""
    positions = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return positions - torch.where(begins, positions, 0).cummax(dim=1).values


def rotary_angles(length: int, head_size: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * theta^(-2i/D), each (T, 1, D/2) in fp32.

    Computed in every call: a few small kernels, and no table that a cast of the module, a build on the meta device or a
    wrapper that casts a block's inputs could spoil.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / theta**exponents).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (B, T, H, D) -> (B, T, H, D)
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): turns the pairs (i, i + D/2) of each head, as transformers
    lays them out; in fp32 whatever the precision."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class MLP(nn.Module):
    """Two linear layers with GELU (Hendrycks & Gimpel 2016) or ReLU between."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.down = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        wide = self.up(x)
        match self.activation:
            case "gelu_tanh":
                return self.down(F.gelu(wide, approximate="tanh"))
            case "gelu":
                return self.down(F.gelu(wide))
            case "relu":
                return self.down(F.relu(wide))


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): one linear layer gates another."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.up = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.down = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Residual block of attention, attention to another sequence where configured, and MLP.

    Pre-norm: x + f(norm(x)) for each of them; post-norm: norm(x + f(x)).

    Args:
        config: sizes.
        recompute: keep only the input in training and compute the activations again in the backward pass. The block does
            it by itself, so that whatever wraps it (sharding, `Block.compile`) lies outside of the recomputation.
    """

    def __init__(self, config: BlockConfig, recompute: bool = False) -> None:
        super().__init__()
        self.recompute, self.pre_norm = recompute, config.pre_norm
        self.attention_norm = config.make_norm()
        self.attention = SelfAttention(config)
        self.cross_norm = config.make_norm() if config.cross_attention else None
        self.cross_attention = CrossAttention(config) if config.cross_attention else None
        self.mlp_norm = config.make_norm()
        self.mlp = GatedMLP(config) if config.gated else MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, seen: Tensor | None = None, memory: Tensor | None = None, memory_seen: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            x: (B, T, C).
            seen: positions of x that may be looked at, (B, 1, 1 or T, T) bool; None: all.
            memory: the other sequence, (B, S, C); for blocks with cross-attention.
            memory_seen: its positions that may be looked at, (B, 1, 1, S) bool; None: all.

        Returns:
            (B, T, C).
        """
        if self.recompute and self.training:
            return checkpoint(self._forward, x, seen, memory, memory_seen, use_reentrant=False)
        return self._forward(x, seen, memory, memory_seen)

    def _forward(self, x: Tensor, seen: Tensor | None, memory: Tensor | None, memory_seen: Tensor | None) -> Tensor:
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), seen))
            if self.cross_attention is not None and self.cross_norm is not None:
                x = x + self.dropout(self.cross_attention(self.cross_norm(x), memory, memory_seen))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, seen)))
        if self.cross_attention is not None and self.cross_norm is not None:
            x = self.cross_norm(x + self.dropout(self.cross_attention(x, memory, memory_seen)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


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

    def forward(
        self, x: Tensor, seen: Tensor | None = None, memory: Tensor | None = None, memory_seen: Tensor | None = None
    ) -> Tensor:  # (B, T, C) -> (B, T, C)
        for block in self:
            x = block(x, seen, memory, memory_seen)
        return x


def chunked_cross_entropy(
    hidden: Tensor,  # (B, T, C)
    weight: Tensor,  # (V padded, C)
    targets: Tensor,  # (B, T), -100 where no token is to be predicted
    vocab_size: int,
    chunks: int,
    bias: Tensor | None = None,  # (V padded,)
) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T + bias`, in nats, over targets that are not -100.

    With `chunks` above 1 the logits exist for one piece of the B*T tokens at a time, in the forward and in the backward
    pass (where they are computed again): memory falls by about `chunks`, one more product with the head is paid.
    """
    flat_hidden, flat_targets = hidden.flatten(0, 1), targets.flatten()
    if chunks == 1:
        return _cross_entropy(flat_hidden, weight, flat_targets, vocab_size, bias)
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(flat_hidden.chunk(chunks), flat_targets.chunk(chunks), strict=True):
        total = total + checkpoint(
            _cross_entropy, part, weight, wanted, vocab_size, bias, use_reentrant=False, preserve_rng_state=False
        )
    return total


def _cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, bias: Tensor | None) -> Tensor:
    logits = mask_padding(F.linear(hidden, weight, bias), vocab_size)
    return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")


def mask_padding(logits: Tensor, vocab_size: int) -> Tensor:
    """Sets the logits of ids that pad the vocabulary to minus infinity: they take no probability and no gradient."""
    if logits.shape[-1] > vocab_size:
        logits[..., vocab_size:] = float("-inf")
    return logits
