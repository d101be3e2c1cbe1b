"""Seconds of an optimizer step by part, and of the run around it. Free of torch.

    step = accumulation x operations + exposed communication + update + waiting for data + what the host cannot hide

The operations are those of `lm_train.plan.work`, recomputed ones included; what one of them, a collective or a pass over
the parameters costs is asked of `Rates`. With W ranks, N parameters and g bytes of a value, each rank sends and receives:
    ddp                    2 (W-1)/W g N, in buckets, behind the last micro batch's backward pass
    zero1                  2 (W-1)/W g N once, in buckets of 200 million values; then (W-1)/W g N of updated parameters
    zero2                  as zero1, but gradients after every micro batch
    fsdp, zero3            (W-1)/W g N three times a micro batch: parameters before the forward and before the backward pass,
                           gradients after it
(Rajbhandari et al. 2020, arXiv:1910.02054, section 7; when they do so is read in torch 2.13, DeepSpeed 0.19, lightning 2.6.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lm_train.plan.layout import Layout
from lm_train.plan.prediction import Interval, TimePrediction
from lm_train.plan.rates import Collective, Rates
from lm_train.plan.work import Op, Work
from lm_train.recipe import AnyOptim

Shapes = Iterable[tuple[str, tuple[int, ...]]]
DDP_BUCKET = 25 * 2**20
"""Bytes of gradients that ddp sums together (`bucket_cap_mb`)."""
ZERO_BUCKET = 200_000_000
"""Values of gradients that ZeRO sums together (`reduce_bucket_size` of Lightning's strategy)."""
START_ERROR = (0.5, 1.0)
"""Of the time until the first step: it depends on the file system's mood."""
CHECKPOINT_ERROR = (0.4, 1.0)
"""Of one save, for the same reason."""


@dataclass(frozen=True)
class Pass:
    """Seconds of one micro batch's operations, on the device and on the host that launches them."""

    forward: float
    backward: float
    host: float

    @property
    def device(self) -> float:
        return self.forward + self.backward


def time_of(
    shapes: Shapes,
    work: Work,
    layout: Layout,
    optim: AnyOptim,
    rates: Rates,
    *,
    log_every: int,
    clips: bool = True,
    sample_seconds: float = 0.0,
) -> TimePrediction:
    """Predicts one optimizer step on the slowest of equal ranks.

    Args:
        shapes: name and shape of every parameter, shared ones once.
        work: of one micro batch under this layout.
        layout: the candidate.
        optim: which update.
        rates: of this layout's ranks.
        log_every: steps between two rows of metrics.
        clips: whether gradients are scaled by their norm.
        sample_seconds: of one core, until one sample is in a batch.
    """
    named = list(shapes)
    micro = pass_of(work.ops, rates)
    accumulate = layout.accumulate_grad_batches
    accumulating = (accumulate - 1) * rates.stream(3 * _gradient_width(layout) * _total(named))
    compute = accumulate * micro.device + accumulating
    communication = _communication(named, work, layout, micro, rates)
    cost = rates.strategy(layout.strategy)
    own = cost.step + own_passes(layout, len(named), len(work.stages)) * cost.each
    optimizer = _update(named, layout, optim, rates, clips)
    host = rates.loop.step + accumulate * (rates.loop.micro_batch + micro.host) + own
    if rates.asynchronous:
        host = max(0.0, host - compute - communication - optimizer)
    host += rates.loop.row / log_every
    samples = layout.micro_batch_size * accumulate
    making = samples * sample_seconds
    if layout.num_workers:
        data = max(0.0, making / layout.num_workers - compute - communication - optimizer - host)
    else:  # on a CPU a thread makes them beside the step, on a core that the step would use
        data = making / (1 if rates.asynchronous else max(1, layout.threads_per_rank))
    return TimePrediction(
        compute=compute,
        communication=communication,
        optimizer=optimizer,
        data=data,
        host=host,
        relative_error=rates.relative_error,
        source=rates.source,
    )


def pass_of(ops: Iterable[Op], rates: Rates) -> Pass:
    """Of one micro batch."""
    seconds = [0.0, 0.0]
    host = 0.0
    for op in ops:
        seconds[op.backward] += op.times * rates.device(op)
        host += op.times * rates.launch(op)
    return Pass(seconds[0], seconds[1], host)


def _communication(
    named: list[tuple[str, tuple[int, ...]]], work: Work, layout: Layout, micro: Pass, rates: Rates
) -> float:
    """Seconds of collectives, and of copies for them, that nothing hides in one step."""
    strategy, ranks, accumulate = layout.strategy, layout.ranks, layout.accumulate_grad_batches
    total, units = _total(named), max(1, len(work.stages))
    if strategy == "single":
        return 0.0
    hidden = rates.overlap * micro.backward
    if strategy == "ddp":
        size = _gradient_width(layout) * total
        copied = rates.stream(2 * size)
        if ranks == 1:
            return copied
        buckets = math.ceil(size / DDP_BUCKET)
        summing = buckets * rates.collective("all_reduce", size / buckets)
        # the first stage's gradients come last, and nothing is left to compute behind which their sum could hide
        first = work.stages[0].parameters if work.stages else 0
        tail = rates.collective("all_reduce", min(size, max(size / buckets, first * _gradient_width(layout))))
        return copied + _exposed(summing, hidden, tail, rates)
    low = 4 if layout.precision == "32-true" else 2
    if strategy in ("zero1", "zero2"):
        # into the bucket, out of it into this rank's part, and there to fp32
        copied = rates.stream(low * total * (2 + 2 / ranks)) + rates.stream((low + 4) * total / ranks)
        parts = math.ceil(total / ZERO_BUCKET)
        each = rates.collective("all_reduce", low * total / parts)
        summing = _exposed(parts * each, hidden, each, rates) + copied
        gathering = rates.collective("all_gather", low * total)
        times = accumulate if strategy == "zero2" else 1
        return times * summing + gathering
    width, reduced = (low, low) if strategy.startswith("zero") else (_gathered_width(layout), _gradient_width(layout))

    def each_unit(kind: Collective, size: float) -> float:
        return units * rates.collective(kind, size / units)

    gathers, reduction = 2 * each_unit("all_gather", width * total), each_unit("reduce_scatter", reduced * total)
    # whole parameters are copied out of what was gathered, gradients into what is reduced
    copied = rates.stream(2 * (2 * width + reduced) * total)
    first_and_last = (rates.collective("all_gather", width * total / units) + reduction / units) if ranks > 1 else 0.0
    hidden += rates.overlap * micro.forward
    seconds = _exposed(gathers + reduction, hidden, first_and_last, rates) + copied
    if strategy == "zero3_offload":
        seconds += rates.offload((2 * low + low) * total / ranks)
    return accumulate * seconds


def own_passes(layout: Layout, tensors: int, units: int) -> int:
    """How often a strategy's own code deals with a unit (fsdp) or a parameter in one step."""
    accumulate = layout.accumulate_grad_batches
    match layout.strategy:
        case "single":
            return 0
        case "ddp" | "zero1":
            return tensors
        case "zero2":
            return tensors * accumulate
        case "fsdp":
            return 2 * units * accumulate
    return 2 * tensors * accumulate


def _exposed(communicating: float, hidden: float, tail: float, rates: Rates) -> float:
    """What is left of a collective behind `hidden` seconds of computing, which it slows down."""
    slowed = rates.interference * min(communicating, hidden)
    return max(tail, communicating - hidden) + slowed


def _update(
    named: list[tuple[str, tuple[int, ...]]], layout: Layout, optim: AnyOptim, rates: Rates, clips: bool
) -> float:
    """The gradient's norm, clipping and the update, on this rank's part of the parameters."""
    zero = layout.strategy.startswith("zero")
    width = 4 if zero else _gradient_width(layout)
    offloaded = layout.strategy == "zero3_offload"
    muon = [shape for name, shape in named if optim.kind == "muon" and name.startswith("blocks.") and len(shape) == 2]
    sizes = updated_sizes(named, layout)
    seconds = rates.norm(sizes, width, clips) + rates.update(optim, sizes, width, on_host=offloaded)
    if optim.kind == "muon":
        seconds += sum(_orthogonalised(shape, optim.ns_steps, rates) for shape in muon)
    if zero:
        seconds += rates.stream((4 + 2) * _total(named) / layout.ranks)  # masters to parameters
    if offloaded:
        seconds += rates.offload(4 * _total(named) / layout.ranks)
    return seconds


def _orthogonalised(shape: tuple[int, ...], ns_steps: int, rates: Rates) -> float:
    """Newton-Schulz steps of Muon on one matrix, in bf16 as torch does them: X X^T, its square, and the product with X."""
    short, long = min(shape), max(shape)
    products = ((short, short, long), (short, short, short), (short, long, short))
    seconds = 0.0
    for rows, columns, inner in products:
        moved = 2 * (rows * inner + inner * columns + rows * columns)
        op = Op("muon", "matmul", False, 2.0 * rows * columns * inner, moved, (rows, columns, inner), "bf16", ns_steps)
        seconds += ns_steps * rates.device(op)
    return seconds


def updated_sizes(named: Iterable[tuple[str, tuple[int, ...]]], layout: Layout) -> tuple[tuple[int, int], ...]:
    """Elements of the tensors that one rank updates, and how many there are of each size; as in `lm_train.plan.memory`."""
    shapes = [shape for _, shape in named]
    ranks = layout.ranks
    match layout.strategy:
        case "single" | "ddp":
            sizes = [math.prod(shape) for shape in shapes]
        case "fsdp":
            sizes = [-(-shape[0] // ranks) * math.prod(shape[1:]) if shape else 1 for shape in shapes]
        case _:  # flat: matrices, and vectors
            groups = [sum(math.prod(s) for s in shapes if (len(s) >= 2) is wide) for wide in (True, False)]
            sizes = [-(-size // ranks) for size in groups if size]
    return tuple(sorted(Counter(sizes).items()))


def _total(named: list[tuple[str, tuple[int, ...]]]) -> int:
    return sum(math.prod(shape) for _, shape in named)


def _gradient_width(layout: Layout) -> int:
    """Bytes of a gradient's value as it is summed; FSDP2 sums in fp32 under bf16-mixed."""
    return 2 if layout.precision == "bf16-true" else 4


def _gathered_width(layout: Layout) -> int:
    """Bytes of a parameter's value as FSDP2 gathers it."""
    return 4 if layout.precision in ("32-true", "16-mixed") else 2


def validation_seconds(work: Work, rates: Rates, micro_batches: float) -> float:
    """Of one validation: the forward passes of so many micro batches on each rank."""
    micro = pass_of((op for op in work.ops if not op.backward), rates)
    each = max(micro.device, micro.host) if rates.asynchronous else micro.device + micro.host
    return micro_batches * (each + rates.loop.micro_batch) + rates.loop.row


def checkpoint_seconds(size: float, layout: Layout, rates: Rates) -> Interval:
    """Of one save of `size` bytes by all ranks together, from its beginning until it is published."""
    return Interval.around(rates.written(size / layout.nodes), *CHECKPOINT_ERROR)


def checkpoint_stall(size: float, layout: Layout, rates: Rates) -> Interval:
    """Of the training by a save that is written beside it: the copy to host memory.

    On a CPU the writing thread takes time of the cores that the training computes on: none of its time, or all of it.
    """
    own = size / layout.ranks
    if layout.accelerator == "gpu":
        return Interval.around(rates.offload(own), *CHECKPOINT_ERROR)
    copy, written = rates.stream(2 * own), rates.written(size / layout.nodes)
    return Interval(low=copy * (1 - CHECKPOINT_ERROR[0]), value=copy + written / 2, high=(copy + written) * 2)


def run_hours(
    step: Interval,
    steps: int,
    *,
    start_seconds: float,
    validation_seconds: float = 0.0,
    validations: int = 0,
    checkpoint: Interval | None = None,
    stall: Interval | None = None,
    saves: int = 0,
    end_seconds: float = 0.0,
) -> Interval:
    """Of a whole run: start, steps, validations, saves, end.

    A step's error is that of every step, and of the validations, which the same rates foretell: it does not average out.
    The errors of the start, of the saves and of the end are independent of it and of one another: squares are added.
    """
    none = Interval(low=0.0, value=0.0, high=0.0)
    share = step.low / step.value, step.high / step.value
    validating = validations * validation_seconds
    parts = (
        Interval(
            low=steps * step.low + validating * share[0],
            value=steps * step.value + validating,
            high=steps * step.high + validating * share[1],
        ),
        Interval.around(start_seconds, *START_ERROR),
        Interval.around(end_seconds, *START_ERROR),
        # the last one is waited for
        (stall or checkpoint or none).times(max(0, saves - 1)),
        (checkpoint or none).times(min(1, saves)),
    )
    value = sum(part.value for part in parts)
    below = math.sqrt(sum((part.value - part.low) ** 2 for part in parts))
    above = math.sqrt(sum((part.high - part.value) ** 2 for part in parts))
    return Interval(low=max(0.0, value - below), value=value, high=value + above).times(1 / 3600)
