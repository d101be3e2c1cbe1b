"""What a rank holds beside the model's state, moment by moment, under every strategy. Free of torch.

Read in torch 2.13 (DDP's reducer; distributed/fsdp/_fully_shard) and DeepSpeed 0.19 (runtime/zero), and seen phase by phase in
real processes by `benchmarks/memory.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lm_train.plan.layout import Layout
from lm_train.plan.memory import StateBytes
from lm_train.plan.work import Stage, Work

NamedShapes = Sequence[tuple[str, tuple[int, ...]]]
REDUCED_AT_ONCE = 200_000_000
"""Elements of DeepSpeed's gradient bucket, as Lightning 2.6 sets it (`reduce_bucket_size`)."""
FETCHED_AHEAD = 50_000_000
"""Elements that ZeRO-3 gathers ahead of their use (`stage3_prefetch_bucket_size`, DeepSpeed's default)."""
REUSED_WITHIN = 1_000_000_000
"""ZeRO-3 lets go of a parameter only if so many others are used before it is used again (`stage3_max_reuse_distance`)."""
BATCHES = {"cpu": 4, "gpu": 2}
"""Micro batches in memory at once: the one in work, Lightning's next, and on a CPU the two that are made ahead
(`lm_train.data.loading`)."""
_UNIT = re.compile(r"(?:\w+\.)*?\w+\.\d+(?=\.)")

FORWARD, BACKWARD, REDUCTION = "the forward pass", "the backward pass", "the reduction of gradients"
VALIDATION, SAVE = "a validation", "a save"
BUCKETS, UPDATE = "the second step, when ddp lays its buckets out anew", "the update"


@dataclass(frozen=True)
class Moment:
    """Bytes beside parameters and optimizer state."""

    name: str
    gradients: int
    activations: int
    logits: int = 0
    buffers: int = 0
    copy: int = 0
    """Of what a save writes, where that lies in the same memory."""

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.logits + self.buffers + self.copy


def units_of(shapes: NamedShapes) -> dict[str, int]:
    """Elements of what is gathered together, by name; what belongs to the network as a whole is under "".

    The entries of the outermost lists of modules, as `lm_train.strategy.units` finds them in the modules themselves.
    """
    found = {"": 0}
    for name, shape in shapes:
        match = _UNIT.match(name)
        key = match[0] if match else ""
        found[key] = found.get(key, 0) + math.prod(shape)
    return found


class Moments:
    """Args:
    shapes: name and shape of every parameter.
    work: of one micro batch.
    layout: strategy, precision, ranks, accumulation.
    state: what the rank holds all through the training.
    """

    def __init__(self, shapes: NamedShapes, work: Work, layout: Layout, state: StateBytes) -> None:
        self.work, self.stages, self.layout, self.state = work, work.stages, layout, state
        self.total = sum(math.prod(shape) for _, shape in shapes)
        units = units_of(shapes)
        self.root = units.pop("")
        self.units = _matched(work.stages, list(units.values()))
        self.accumulates = layout.accumulate_grad_batches > 1
        self.gloo = layout.accelerator == "cpu"
        """Whether all-gather and reduce-scatter hold one more copy of what is gathered: gloo's do (measured), NCCL's do not."""
        low = {"32-true": 4, "bf16-mixed": 2, "bf16-true": 2, "16-mixed": 2}[layout.precision]
        casts = layout.strategy == "fsdp" or layout.strategy.startswith("zero") or layout.precision == "bf16-true"
        self.width = low if casts else 4
        """Bytes of a parameter, and of its gradient, as the network sees them."""
        self.bucket = bucket_of_zero_3(shapes, layout)
        self.batches = BATCHES[layout.accelerator] * work.batch_bytes

    def all(self, validates: bool) -> Iterator[Moment]:
        """The moments of a step, of the first and of later ones, and those of a validation."""
        match self.layout.strategy:
            case "single" | "ddp":
                yield from self._replicated()
            case "fsdp":
                yield from self._fully_sharded()
            case "zero1" | "zero2":
                yield from self._zero_1_2()
            case _:
                yield from self._zero_3()
        if validates:
            yield from self._validation()

    def _replicated(self) -> Iterator[Moment]:
        """single: Lightning sets gradients to None after the forward pass, so that the last step's are there in it; in the
        backward pass they appear, or are added to those of earlier micro batches.

        ddp: gradients are views of the buckets, which stay; what the backward pass makes is copied there. Where micro batches
        accumulate, all but the last make gradients beside the buckets. After the first step torch lays the buckets out in the
        order of the backward pass: for a moment there are two sets of them.
        """
        stay = self.accumulates or self.layout.strategy == "ddp"
        beside = self.state.gradients if self.accumulates and self.layout.strategy == "ddp" else 0
        for stage in self.stages:
            yield self._forward(stage, self.state.gradients, beside)
            yield self._backward(stage, self.state.gradients, beside) if stay else self._growing(stage)
        if self.layout.strategy == "ddp":
            yield Moment(BUCKETS, self.state.gradients, self.batches, 0, self.state.gradients)

    def _fully_sharded(self) -> Iterator[Moment]:
        """With c bytes a gathered and r bytes a reduced element, unit i of u_i elements between units h and j, root of R:

            before unit i    c R + c u_h + c u_i (+ c u_i)     the output of an all-gather stays until the next one's
            unit i           c R + 2 c u_i
            backwards        c R + c u_i + c u_h + r u_j       h is fetched ahead; the input of j's reduce-scatter stays
            reduction of i   c R + c u_h + (c + r) u_i, or with gloo 2 r u_i

        Sharded gradients of the last step are there in the forward pass; gradients of the root's parameters stay whole until
        the end of the backward pass. In brackets: gloo's copy.
        """
        c, r = self.width, 4 if self.layout.precision in ("32-true", "bf16-mixed") else self.width
        share, copy, root = self.state.gradients / max(1, self.total), int(self.gloo), self.root
        unit = (*self.units, 0)  # the last entry serves the stages before the first and behind the last, too
        yield Moment(FORWARD, self.state.gradients, self.batches, 0, c * root * (2 if root else 0))
        gathered = root  # by the all-gather before
        for i, stage in enumerate(self.stages):
            if unit[i]:
                buffers = c * (root + gathered + unit[i] * (1 + copy))
                yield Moment(FORWARD, self.state.gradients, self.batches + stage.kept_before, 0, buffers)
                gathered = unit[i]
            yield self._forward(stage, self.state.gradients, c * (root + gathered + (unit[i] and unit[i])))
        reduced = 0
        """Elements of the units whose gradients have been reduced."""
        for i in reversed(range(len(self.stages))):
            stage, ahead = self.stages[i], unit[i - 1] if i else 0
            here = self.state.gradients if self.accumulates else round(share * reduced)
            behind = r * unit[i + 1] if i + 1 < len(self.stages) else 0
            own = self._with_gradients(i) - stage.backward_peak - c * reduced
            buffers = c * (root + unit[i] + ahead) + behind + own
            yield self._backward(stage, here, buffers)
            if unit[i]:
                reduced += unit[i]
                after = self.state.gradients if self.accumulates else round(share * reduced)
                roots = self._with_gradients(i) - stage.backward_peak - c * reduced
                moving = max((c + r) * unit[i], (1 + copy) * r * unit[i])
                buffers = c * (root + ahead) + moving + max(0, roots)
                yield Moment(REDUCTION, after, self.batches + stage.kept_before, 0, buffers)
        moving = max((c + r) * root, (1 + copy) * r * root)
        yield Moment(REDUCTION, self.state.gradients, self.batches, 0, c * root + moving)

    def _zero_1_2(self) -> Iterator[Moment]:
        """Gradients move into a bucket as they appear, and when it is full, or at the end of the backward pass, a copy of it is
        reduced. On a GPU two buckets are allocated whole (`overlap_comm`); on a CPU what is not written to takes no memory.

        Under zero1 gradients of earlier micro batches stay whole; under zero2 the rank's part of them.
        """
        earlier = self.state.gradients if self.accumulates else 0
        whole = self.layout.strategy == "zero1" and self.accumulates
        filled = min(self.total, REDUCED_AT_ONCE)
        buckets = 2 * REDUCED_AT_ONCE if not self.gloo else min(self.total, 2 * REDUCED_AT_ONCE)
        for i, stage in enumerate(self.stages):
            yield self._forward(stage, earlier)
            if self.gloo and not whole:
                grown = self._with_gradients(i) - stage.backward_peak
                yield self._backward(stage, earlier, min(grown, self.width * buckets))
            else:
                yield self._backward(stage, earlier, 0 if self.gloo else self.width * buckets)
        own = 0 if whole else earlier
        yield Moment(REDUCTION, own, self.batches, 0, self.width * (buckets + filled))

    def _zero_3(self) -> Iterator[Moment]:
        """Parameters are gathered ahead of their use, through a flat copy, and let go when they are not used again soon: a
        network of less than half of `REUSED_WITHIN` stays whole from the forward to the end of the backward pass.

        The bucket of gradients stays all the time, as does the rank's part of the gradients.
        """
        filled = min(self.total, REDUCED_AT_ONCE)
        for i, stage in enumerate(self.stages):
            held = self.width * self._gathered(i, forward=True)
            yield self._forward(stage, self.state.gradients, self.bucket + held)
            held = self.width * self._gathered(i, forward=False)
            yield self._backward(stage, self.state.gradients, self.bucket + held)
        moving = self.width * filled * (2 if self.gloo else 1)
        last = self.width * min(self.root, filled)
        yield Moment(REDUCTION, self.state.gradients, self.batches, 0, self.bucket + moving + last)

    def _gathered(self, stage: int, forward: bool) -> int:
        """Elements that ZeRO-3 has gathered, with the flat copy that they come from: it lives until the last parameter in it is
        used, which behind the last unit is the case."""
        sizes = [each.parameters for each in self.stages]
        before, own, after = sizes[:stage], sizes[stage], sum(sizes[stage + 1 :])
        rest = own + after
        kept = 0
        for size in reversed(before):
            if 2 * rest < REUSED_WITHIN:
                kept += size
            rest += size
        if forward:
            flat = min(FETCHED_AHEAD, self.total) if any(self.units[stage:]) else 0
            return kept + own + min(FETCHED_AHEAD, after) + flat
        missing = min(FETCHED_AHEAD, sum(before) - kept)
        return kept + own + 2 * missing

    def _validation(self) -> Iterator[Moment]:
        """Lightning sets gradients to None before a validation; ddp's buckets and ZeRO-3's gradients stay."""
        gradients, buffers = 0, 0
        match self.layout.strategy:
            case "ddp":
                gradients = self.state.gradients
            case "fsdp":
                buffers = self.width * (self.root + max(2, 2 + self.gloo) * max((*self.units, 0)))
            case "zero3" | "zero3_offload":
                gradients = self.state.gradients
                held = [self.width * self._gathered(i, forward=True) for i in range(len(self.stages))]
                yield Moment(VALIDATION, gradients, self.batches, 0, self.bucket + max(held))
                buffers = self.bucket + held[-1]
        yield Moment(VALIDATION, gradients, self.batches + self.work.evaluation_peak, 0, buffers)

    def _forward(self, stage: Stage, gradients: int, buffers: int = 0) -> Moment:
        rest = self.batches + stage.forward_peak - stage.forward_logits
        return Moment(FORWARD, gradients, rest, stage.forward_logits, buffers)

    def _backward(self, stage: Stage, gradients: int, buffers: int = 0) -> Moment:
        """With gradients that are there anyway."""
        rest = self.batches + stage.backward_peak - stage.backward_logits
        return Moment(BACKWARD, gradients, rest, stage.backward_logits, buffers)

    def _growing(self, stage: Stage) -> Moment:
        """With the gradients that the backward pass has made so far."""
        grown = self._with_gradients(self.stages.index(stage)) - stage.backward_peak
        return self._backward(stage, grown)

    def _with_gradients(self, stage: int) -> int:
        """The stage's highest count with the gradients so far; where only the one without them is known, its own count whole."""
        known = self.stages[stage].backward_peak_with_gradients
        if known:
            return known
        return self.stages[stage].backward_peak + self.width * sum(s.parameters for s in self.stages[stage:])


def bucket_of_zero_3(shapes: NamedShapes, layout: Layout) -> int:
    """Bytes of the bucket of gradients, which stays all the time; on a CPU what has been written to."""
    low = 4 if layout.precision == "32-true" else 2
    total = sum(math.prod(shape) for _, shape in shapes)
    return low * (min(total, REDUCED_AT_ONCE) if layout.accelerator == "cpu" else REDUCED_AT_ONCE)


def _matched(stages: Sequence[Stage], units: list[int]) -> tuple[int, ...]:
    """Elements of the unit that each stage is; 0 where it belongs to the network as a whole.

    Both are in the order of the forward pass, and a stage that is a unit has its parameters.
    """
    left = iter([*units, -1])
    following, found = next(left), []
    for stage in stages:
        fits = stage.parameters == following
        found.append(following if fits else 0)
        if fits:
            following = next(left)
    return tuple(found)
