"""What one micro batch makes a rank do: operations for the time it takes, stages for the memory it needs. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "matmul",
    "attention",
    "convolution",
    "recurrent",
    "normalisation",
    "activation",
    "elementwise",
    "reduction",
    "lookup",
    "loss",
    "copy",
]
Number = Literal["fp32", "bf16", "fp16"]
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one value."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of the forward or backward pass."""

    name: str
    """Where in the network, such as `attention.qkv`."""
    kind: Kind
    backward: bool
    flops: float
    """Of matrix-like work: a multiply-add is two. 0 for the rest."""
    bytes: float
    """Read and written, if nothing stays in a cache."""
    shape: tuple[int, ...]
    """matmul: (rows, columns, inner); attention: (batch, heads, queries, keys, head size); convolution: (batch, channels in,
    channels out, height, width, kernel) of the output; recurrent: (batch, steps, width in, state); else (elements,)."""
    number: Number
    """In which the values are."""
    times: int = 1
    """How often it is done, one after the other: once in each of so many equal blocks."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the network that is passed at once: the embedding, a block, the head with the loss.

    Peaks are bytes of everything that is alive then because of the micro batch: what earlier stages keep for their backward
    passes included; the batch itself, parameters, their gradients and the optimizer's state not.
    """

    name: str
    parameters: int
    """Values whose gradient is complete after this stage's backward pass; shared ones with the stage that comes last in it."""
    forward_peak: int
    backward_peak: int
    forward_logits: int
    """Of the peak, bytes of logits and what the loss makes of them."""
    backward_logits: int
    backward_peak_with_gradients: int = 0
    """The highest count of the same bytes and of the parameters' gradients that this backward pass has made so far. Where
    gradients of earlier micro batches are there, all of them come on top of either peak."""
    kept_before: int = 0
    """What is alive as the forward pass enters the stage, and again as the backward pass leaves it."""


@dataclass(frozen=True, slots=True)
class Work:
    """One micro batch of one rank, forward and backward."""

    ops: tuple[Op, ...]
    """In the order in which they are done."""
    stages: tuple[Stage, ...]
    """In the order of the forward pass."""
    evaluation_peak: int
    """As a stage's peaks, of a validation's micro batch: nothing is kept there."""
    batch_bytes: int
    """Of the micro batch itself."""

    @property
    def flops(self) -> float:
        return sum(op.flops * op.times for op in self.ops)
