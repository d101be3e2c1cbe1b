"""Transformer blocks on the tape, written as `lm_train.models.transformer` writes them: names hold as much, and as long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lm_train.plan.work.attention import attention, takes_scores
from lm_train.plan.work.norms import layer_norm, rms_norm
from lm_train.plan.work.operations import (
    activation,
    add,
    cast,
    concatenate,
    contiguous,
    cross_entropy,
    dropout,
    linear,
    masked_columns,
    multiply,
    repeat,
    scale,
    split,
)
from lm_train.plan.work.ops import Number
from lm_train.plan.work.tape import Parameter, Tape, Tensor


@dataclass(frozen=True)
class Blocks:
    """A stack of equal blocks; names as in models.transformer.BlockConfig."""

    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    mlp_width: int
    dropout: float
    bias: bool
    norm: Literal["layer", "rms"]
    rotary: bool
    gated: bool
    activation: Literal["gelu_tanh", "gelu", "relu"] = "gelu_tanh"
    causal: bool = True
    pre_norm: bool = True
    cross_attention: bool = False


class Norm:
    def __init__(self, number: Number, config: Blocks) -> None:
        self.rms = config.norm == "rms"
        self.weight = Parameter(number, config.n_embd)
        self.bias = Parameter(number, config.n_embd) if config.bias and config.norm == "layer" else None

    def __call__(self, tape: Tape, x: Tensor, name: str) -> Tensor:
        if self.rms:
            return rms_norm(tape, x, self.weight, name)
        return layer_norm(tape, x, self.weight, self.bias, name)


class Linear:
    def __init__(self, number: Number, inner: int, width: int, bias: bool) -> None:
        self.weight = Parameter(number, width, inner)
        self.bias = Parameter(number, width) if bias else None

    def __call__(self, tape: Tape, x: Tensor, name: str) -> Tensor:
        return linear(tape, x, self.weight, self.bias, name)


class Block:
    """One block's weights, and what it does with a micro batch.

    Args:
        config: sizes.
        number: type of the weights.
        samples: B.
        length: T.
        memory_length: S, of the sequence that cross-attention looks at.
    """

    def __init__(self, config: Blocks, number: Number, samples: int, length: int, memory_length: int = 0) -> None:
        d, self.config, self.samples, self.length = config.n_embd, config, samples, length
        self.head_size, self.memory_length = d // config.n_head, memory_length
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        self.attention_norm = Norm(number, config)
        self.qkv = Linear(number, d, sum(self.heads) * self.head_size, config.bias)
        self.out = Linear(number, d, d, config.bias)
        if config.cross_attention:
            self.cross_norm = Norm(number, config)
            self.query = Linear(number, d, d, config.bias)
            self.key_value = Linear(number, d, 2 * d, config.bias)
            self.cross_out = Linear(number, d, d, config.bias)
        self.mlp_norm = Norm(number, config)
        self.gate = Linear(number, d, config.mlp_width, config.bias) if config.gated else None
        self.up = Linear(number, d, config.mlp_width, config.bias)
        self.down = Linear(number, config.mlp_width, d, config.bias)

    def __call__(
        self,
        tape: Tape,
        x: Tensor,
        seen: Tensor | None = None,
        memory: Tensor | None = None,
        memory_seen: Tensor | None = None,
    ) -> Tensor:
        p = self.config.dropout
        if self.config.pre_norm:
            attended = dropout(
                tape, self.attention(tape, self.attention_norm(tape, x, "attention.norm"), seen), p, "dropout"
            )
            x = add(tape, x, attended, "residual")
            del attended
            return add(
                tape, x, dropout(tape, self.mlp(tape, self.mlp_norm(tape, x, "mlp.norm")), p, "dropout"), "residual"
            )
        attended = add(tape, x, dropout(tape, self.attention(tape, x, seen), p, "dropout"), "residual")
        x = self.attention_norm(tape, attended, "attention.norm")
        del attended
        if memory is not None:
            crossed = add(
                tape, x, dropout(tape, self.cross_attention(tape, x, memory, memory_seen), p, "dropout"), "residual"
            )
            x = self.cross_norm(tape, crossed, "cross.norm")
            del crossed
        return self.mlp_norm(tape, add(tape, x, dropout(tape, self.mlp(tape, x), p, "dropout"), "residual"), "mlp.norm")

    def attention(self, tape: Tape, x: Tensor, seen: Tensor | None) -> Tensor:
        rows = self.samples * self.length * self.head_size
        qkv = self.qkv(tape, x, "attention.qkv")
        q, k, v = split(tape, qkv, [rows * heads for heads in self.heads], "attention.split")
        if self.config.rotary:
            cos, sin = rotary_angles(tape, self.length, self.head_size)
            q, k = rotate(tape, q, cos, sin), rotate(tape, k, cos, sin)
        if self.heads[1] != self.heads[0]:
            k, v = (repeat(tape, kv, self.heads[0] // self.heads[1], "attention.repeat") for kv in (k, v))
        sizes = (self.samples, self.config.n_head, self.length, self.length, self.head_size)
        y = attention(tape, q, k, v, sizes, "attention.scores", self.config.dropout, self.config.causal, seen)
        return self.out(tape, self._merged(tape, y), "attention.out")

    def cross_attention(self, tape: Tape, x: Tensor, memory: Tensor, seen: Tensor | None) -> Tensor:
        q = self.query(tape, x, "cross.query")
        key_value = self.key_value(tape, memory, "cross.key_value")
        k, v = split(tape, key_value, [key_value.size // 2, key_value.size // 2], "cross.split")
        sizes = (self.samples, self.config.n_head, self.length, self.memory_length, self.head_size)
        y = attention(tape, q, k, v, sizes, "cross.scores", self.config.dropout, False, seen)
        return self.cross_out(tape, self._merged(tape, y), "cross.out")

    def _merged(self, tape: Tape, y: Tensor) -> Tensor:
        """The heads side by side: as fused kernels leave them."""
        return contiguous(tape, y, "attention.merge") if takes_scores(tape, self.config.dropout) else y

    def mlp(self, tape: Tape, x: Tensor) -> Tensor:
        if self.gate is not None:
            gated = multiply(
                tape,
                activation(tape, self.gate(tape, x, "mlp.gate"), "silu", "mlp.activation"),
                self.up(tape, x, "mlp.up"),
                "mlp.product",
            )
            return self.down(tape, gated, "mlp.down")
        wide = self.up(tape, x, "mlp.up")
        return self.down(tape, activation(tape, wide, self.config.activation, "mlp.activation"), "mlp.down")


def rotary_angles(tape: Tape, length: int, head_size: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles."""
    half = length * (head_size // 2)
    angles = tape.new(half, "fp32")
    tape.op("attention.rotary", "elementwise", 0, 6 * angles.bytes, (half,), "fp32")
    return tape.new(half, "fp32"), tape.new(half, "fp32")


def rotate(tape: Tape, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The heads of x turned by these angles, in fp32."""
    name, number = "attention.rotary", x.number
    a, b = split(tape, cast(tape, x, "fp32"), [x.size // 2, x.size // 2], name)
    turned = concatenate(
        tape,
        (
            add(tape, scale(tape, a, cos, name), scale(tape, b, sin, name), name, subtract=True),
            add(tape, scale(tape, b, cos, name), scale(tape, a, sin, name), name),
        ),
        name,
    )
    return cast(tape, turned, number)


Pass = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]
"""What a block makes of x, of which positions are seen, of another sequence and of what is seen of that."""


def stack(
    tape: Tape,
    x: Tensor,
    blocks: int,
    every: int,
    block: Pass,
    name: str,
    seen: Tensor | None = None,
    memory: Tensor | None = None,
    memory_seen: Tensor | None = None,
) -> Tensor:
    """Passes x through so many blocks, of which every `every`-th is computed again in the backward pass (0: none)."""
    again = [bool(every) and (i + 1) % every == 0 for i in range(blocks)]

    def one(x: Tensor, i: int) -> Tensor:
        if again[i]:
            return tape.recomputed(block, x, seen, memory, memory_seen)
        return block(x, seen, memory, memory_seen)

    return tape.repeat(x, [f"{name} {i}" for i in range(blocks)], list(map(kind_of, again)), one)


def kind_of(recomputed: bool) -> str:
    """Which blocks do alike."""
    return "recomputed" if recomputed else "kept"


def chunked_cross_entropy(
    tape: Tape, hidden: Tensor, weight: Parameter, bias: Parameter | None, vocab_size: int, chunks: int
) -> Tensor:
    """The summed loss of hidden states whose product with `weight` are the logits."""
    padded = weight.shape[0] > vocab_size

    def loss_of(part: Tensor) -> Tensor:
        logits = linear(tape, part, weight, bias, "head", logits=True)
        if padded:
            logits = masked_columns(tape, logits)
        return cross_entropy(tape, cast(tape, logits, "fp32"))

    if chunks == 1:
        return loss_of(hidden)
    inner = weight.shape[1]
    rows = hidden.size // inner
    each = -(-rows // chunks)
    sizes = [min(each, rows - start) * inner for start in range(0, rows, each)]
    parts = split(tape, hidden, sizes, "loss.chunks")
    total = tape.new(1, "fp32")
    for part in parts:
        total = add(tape, total, tape.recomputed(loss_of, part, random_state=False), "loss.sum")
    return total


def batch_bytes(*counts: int) -> int:
    """Of tensors of so many int64 values."""
    return 8 * sum(counts)
