"""Bytes that a rank holds all through a training: parameters, gradients, optimizer. Free of torch.

Exact for the layouts of torch 2.13 and DeepSpeed 0.19; the tests compare with the tensors of real sharded models.
Activations, communication buffers and what the libraries reserve come on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from lm_train.plan.layout import Precision, Strategy
from lm_train.recipe import AnyOptim

Shapes = Iterable[tuple[str, tuple[int, ...]]]
ZERO_ALIGNMENT = 2
"""DeepSpeed pads each group of parameters to a multiple of this many elements a rank (`nccl_start_alignment_factor`)."""
ZERO_PERSISTENT = 100_000
"""Parameters of at most so many elements stay whole on every rank (`stage3_param_persistence_threshold`)."""


class StateBytes(NamedTuple):
    """On the rank that holds most. Gradients are those between the backward pass and the update."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return sum(self)


def state_bytes(shapes: Shapes, strategy: Strategy, precision: Precision, optim: AnyOptim, ranks: int) -> StateBytes:
    """Bytes of the model's state on the rank that holds most.

    With N parameters, W ranks, b bytes a parameter and s values of the optimizer for each:
        single, ddp   b N + b N + b s N
        fsdp          b n + b n + b s n             n = sum over parameters of ceil(rows / W) x the rest
        zero1         b N + b N + 4 (1 + s) N/W     fp32 masters beside parameters of any type
        zero2         b N + b n + 4 (1 + s) N/W     n = N/W and what reaches beyond the rank's part of a cut parameter
        zero3         b n + b n + 4 (1 + s) n       n = sum of ceil(N_i / W); small parameters are whole besides
        zero3_offload as zero3, with fp32 gradients for the update besides; in host memory but for the small parameters

    Args:
        shapes: name and shape of every parameter, shared ones once.
        strategy: decides what is divided among the ranks.
        precision: decides the bytes of an element.
        optim: decides s.
        ranks: over which the state is divided.
    """
    named = list(shapes)
    sizes = [shape for _, shape in named]
    width = 2 if precision == "bf16-true" else 4
    if strategy in ("single", "ddp"):
        total = sum(map(math.prod, sizes))
        kept = sum(optimizer_values(optim, name, shape) * math.prod(shape) for name, shape in named)
        return StateBytes(width * total, width * total, width * kept)
    states = max(optimizer_values(optim, name, shape) for name, shape in named)
    if strategy == "fsdp":
        own = sum(-(-(shape or (1,))[0] // ranks) * math.prod(shape[1:]) for shape in sizes)
        return StateBytes(width * own, width * own, width * states * own)
    low = 4 if precision == "32-true" else 2
    if strategy in ("zero1", "zero2"):
        groups = [[math.prod(s) for s in sizes if len(s) >= 2], [math.prod(s) for s in sizes if len(s) < 2]]
        padded = [_rounded_up(sum(group), ZERO_ALIGNMENT * ranks) for group in groups]
        whole = sum(map(sum, groups))
        gradients = whole if strategy == "zero1" else _gradients_of_parts(groups, padded, ranks)
        return StateBytes(low * sum(padded), low * gradients, 4 * (1 + states) * (sum(padded) // ranks))
    own = sum(-(-math.prod(shape) // ranks) for shape in sizes)
    small = sum(math.prod(shape) for shape in sizes if math.prod(shape) <= ZERO_PERSISTENT)
    gradient = low + 4 if strategy == "zero3_offload" else low
    return StateBytes(low * (own + small), gradient * own, 4 * (1 + states) * own)


def _rounded_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _gradients_of_parts(groups: list[list[int]], padded: list[int], ranks: int) -> int:
    """Elements of gradients on the rank that keeps most, where one cut between two ranks is kept whole by both."""
    held = [0] * ranks
    for sizes, total in zip(groups, padded, strict=True):
        part = total // ranks
        if part == 0:
            continue
        start = 0
        for size in [*sizes, total - sum(sizes)]:
            if size:
                for rank in range(start // part, (start + size - 1) // part + 1):
                    held[rank] += size
            start += size
    return max(held)


def optimizer_values(optim: AnyOptim, name: str, shape: tuple[int, ...]) -> int:
    """Values that the optimizer keeps for each element of a parameter, besides masters."""
    match optim.kind:
        case "adam" | "adamw":
            return 2
        case "sgd":
            return int(optim.momentum > 0)
        case "adagrad":
            return 1
        case "rmsprop":
            return 1 + int(optim.momentum > 0)
        case "muon":  # its momentum for the matrices of the blocks, AdamW's two values for the rest
            return 1 if name.startswith("blocks.") and len(shape) == 2 else 2


def checkpoint_bytes(shapes: Shapes, strategy: Strategy, precision: Precision, optim: AnyOptim) -> int:
    """Bytes of parameters and optimizer state on disk; ZeRO's parameters are its fp32 masters."""
    width = 2 if precision == "bf16-true" and not strategy.startswith("zero") else 4
    return width * sum((1 + optimizer_values(optim, name, shape)) * math.prod(shape) for name, shape in shapes)
