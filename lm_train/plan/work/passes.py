"""From a network on the tape to its Work: a training pass, and one of a validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lm_train.plan.layout import Layout
from lm_train.plan.work.ops import Number, Stage, Work
from lm_train.plan.work.tape import Tape, Tensor

Network = Callable[[Tape, Number], Tensor]
"""Passes a micro batch through a network whose weights are of a type; gives the loss."""


@dataclass(frozen=True)
class Numbers:
    """Types of the values."""

    weights: Number
    """Of the weights as the network sees them."""
    autocast: Number | None
    """What torch.autocast casts to; None where the strategy casts, or nothing."""


def numbers_of(layout: Layout) -> Numbers:
    """FSDP and ZeRO cast the weights themselves; Lightning's mixed precision is autocast."""
    match layout.precision:
        case "32-true":
            return Numbers("fp32", None)
        case "bf16-true":
            return Numbers("bf16", None)
    low: Number = "fp16" if layout.precision == "16-mixed" else "bf16"
    if layout.strategy in ("single", "ddp"):
        return Numbers("fp32", low)
    return Numbers(low, None)


def work_of_passes(layout: Layout, network: Network, batch_bytes: int, usual: Network | None = None) -> Work:
    """
    Args:
        layout: decides types, and whether gradients are added to earlier ones.
        network: with the longest samples, whose memory is needed. A validation is told from the training by the tape.
        batch_bytes: of the micro batch.
        usual: with samples of the mean length, whose time is taken; None where all are equally long.
    """
    numbers = numbers_of(layout)
    # ddp copies a gradient into its bucket, which is always there
    accumulates = layout.strategy == "ddp" or (
        layout.accumulate_grad_batches > 1 and layout.strategy in ("single", "zero1")
    )
    tape = _trained(layout, numbers, network, accumulates)
    timed = tape if usual is None else _trained(layout, numbers, usual, accumulates)
    watched = Tape(layout.accelerator, False, numbers.autocast, False)
    network(watched, numbers.weights)
    return Work(
        ops=timed.ops,
        stages=tuple(
            Stage(
                name=stage.name,
                parameters=stage.parameters,
                forward_peak=stage.forward.total,
                backward_peak=stage.backward.without_gradients,
                forward_logits=stage.forward.logits,
                backward_logits=stage.backward.logits,
                backward_peak_with_gradients=stage.backward.total,
                kept_before=stage.before,
            )
            for stage in tape.stages
        ),
        evaluation_peak=max(stage.forward.total for stage in watched.stages),
        batch_bytes=batch_bytes,
    )


def _trained(layout: Layout, numbers: Numbers, network: Network, accumulates: bool) -> Tape:
    tape = Tape(layout.accelerator, True, numbers.autocast, accumulates)
    loss = network(tape, numbers.weights)
    tape.backward(loss)
    return tape
