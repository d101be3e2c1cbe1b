"""From recordings of two sizes of a micro batch to what any size needs, as JSON values.

Every storage's size is a linear function of the samples, so that what is alive at one moment is a line too, and the most that
is alive in a stage is the upper envelope of its moments' lines: a few of them are kept, and give the peak of any size exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from lm_train.plan.traced import Line, TracedOp, TracedStage, TracedWork
from lm_train.trace.passes import Passes
from lm_train.trace.recorder import Phase, Recording


class Moment(NamedTuple):
    """Bytes that are alive."""

    alive: float
    """Gradients of parameters left out."""
    logits: float
    """Of them."""
    with_gradients: float
    accumulating: float
    """With those gradients that have not arrived: on arrival they are added to earlier ones, and are gone."""


_NOTHING = Moment(0, 0, 0, 0)


def summarise(
    net: nn.Module, sizes: tuple[int, int], passes: tuple[Passes, Passes], logit_widths: set[int]
) -> TracedWork:
    """What two sizes of a micro batch tell about every size.

    Args:
        net: the network.
        sizes: samples; equal ones serve that size alone.
        passes: of each size.
        logit_widths: last dimensions of logits.
    """
    one, two = passes
    names = _stage_names(one.recording.segments)
    stage_of = _stages_of_segments(one.recording.segments)
    moments = [_moments(run, stage_of, len(names), logit_widths) for run in passes]
    parameters = [0] * len(names)
    for name, parameter in net.named_parameters():
        if name in one.recording.completed:
            parameters[stage_of[one.recording.completed[name]]] += parameter.numel()

    def of(micro: int, phase: Phase, stage: int) -> list[list[Moment]]:
        return [m.get((micro, phase, stage), [_NOTHING]) for m in moments]

    evaluation = [
        [moment for (_, phase, _), some in m.items() if phase == "evaluation" for moment in some] or [_NOTHING]
        for m in moments
    ]
    return TracedWork(
        shapes=tuple((name, tuple(p.shape)) for name, p in net.named_parameters()),
        trained=sum(p.numel() for p in net.parameters() if p.requires_grad),
        ops=_operations(sizes, one.recording, two.recording),
        stages=tuple(
            TracedStage(
                name=name,
                parameters=parameters[i],
                before=_line(sizes, *(some[0].alive for some in of(0, "forward", i))),
                forward=envelope(sizes, *of(0, "forward", i)),
                backward=envelope(sizes, *of(0, "backward", i)),
                with_gradients=envelope(
                    sizes, *([_counted(m.with_gradients) for m in s] for s in of(0, "backward", i))
                ),
                accumulating=envelope(
                    sizes, *([_counted(m.accumulating, m.logits) for m in s] for s in of(0, "backward", i))
                ),
            )
            for i, name in enumerate(names)
        ),
        evaluation=envelope(sizes, *evaluation),
        batch=_line(sizes, one.batch_bytes, two.batch_bytes),
    )


# ---- stages


def _stage_names(segments: list[str]) -> list[str]:
    units = [name for name in segments if name]
    return ["embedding", *units, "head"] if units else ["network"]


def _stages_of_segments(segments: list[str]) -> list[int]:
    """What lies between two units goes with the one that follows."""
    if not any(segments):
        return [0] * len(segments)
    found, seen = [], 0
    total = sum(map(bool, segments))
    for i, name in enumerate(segments):
        seen += bool(name)
        found.append(seen if name or i == 0 else seen + 1)
    return [min(stage, total + 1) for stage in found]


def _moments(
    run: Passes, stage_of: list[int], n_stages: int, logit_widths: set[int]
) -> dict[tuple[int, Phase, int], list[Moment]]:
    """What is alive after every birth, and where a stage begins, by micro batch, phase and stage."""
    head, storages = n_stages - 1, run.recording.storages
    logits: set[int] = set()
    found: dict[tuple[int, Phase, int], list[Moment]] = {}
    waiting: set[int] = set()
    alive = of_logits = of_gradients = of_waiting = 0
    for event in run.recording.events:
        number, size = event.storage, storages[event.storage].size
        if number in run.given:
            continue
        stage = stage_of[min(event.segment, len(stage_of) - 1)]

        def moment() -> Moment:
            return Moment(alive, of_logits, alive + of_gradients, alive + of_waiting)  # noqa: B023

        some = found.setdefault((event.micro, event.phase, stage), [moment()])
        sign = {"birth": 1, "death": -1, "arrival": 0}[event.what]
        if number in run.gradients:
            of_gradients += sign * size
            if event.what == "birth" and not storages[number].is_copy:
                waiting.add(number)
                of_waiting += size
            elif number in waiting:
                waiting.remove(number)
                of_waiting -= size
        else:
            if event.what == "birth" and stage == head and storages[number].width in logit_widths:
                logits.add(number)
            alive += sign * size
            of_logits += sign * size if number in logits else 0
        some.append(moment())
    return found


def _counted(size: float, logits: float = 0) -> Moment:
    """A moment of which only this counts."""
    return Moment(size, logits, size, size)


def envelope(sizes: tuple[int, int], one: list[Moment], two: list[Moment]) -> tuple[Line, ...]:
    """The lines that are the highest for some size from 1 on."""
    if len(one) != len(two):  # other kernels for another size: the greater one's peak, in proportion
        one, two = [_NOTHING], [max(two)]
        sizes = (0, sizes[1])
    by_slope: dict[float, Line] = {}
    for line in {_line(sizes, a.alive, b.alive, a.logits, b.logits) for a, b in zip(one, two, strict=True)}:
        known = by_slope.get(line.slope)
        if known is None or line.start > known.start:
            by_slope[line.slope] = line
    kept: list[Line] = []
    for line in (by_slope[slope] for slope in sorted(by_slope)):
        while kept and line.at(1) >= kept[-1].at(1):
            kept.pop()
        while len(kept) > 1 and _crossing(kept[-2], line) <= _crossing(kept[-2], kept[-1]):
            kept.pop()
        kept.append(line)
    return tuple(kept)


def _crossing(one: Line, other: Line) -> float:
    return (one.start - other.start) / (other.slope - one.slope)


def _line(sizes: tuple[int, int], one: float, two: float, logits_one: float = 0, logits_two: float = 0) -> Line:
    first, second = sizes
    if first == second:
        return Line(start=two, slope=0, logits_start=logits_two, logits_slope=0)
    slope, logits = (two - one) / (second - first), (logits_two - logits_one) / (second - first)
    return Line(start=one - slope * first, slope=slope, logits_start=logits_one - logits * first, logits_slope=logits)


# ---- operations


def _operations(sizes: tuple[int, int], one: Recording, two: Recording) -> tuple[TracedOp, ...]:
    """Of the first micro batch, equal ones counted together, in the order in which each came first."""
    pairs = [[op for op in run.operations if op.micro == 0 and op.phase != "evaluation"] for run in (one, two)]
    if [op.kind for op in pairs[0]] != [op.kind for op in pairs[1]]:
        pairs[0], sizes = pairs[1], (sizes[1], sizes[1])  # another way for another size: the greater one alone
    counted: dict[tuple[Any, ...], int] = {}
    for a, b in zip(*pairs, strict=True):
        name = re.sub(r"\.\d+(?=\.|$)", "", a.name)
        key = (name, a.kind, a.phase == "backward", a.flops, b.flops, a.bytes, b.bytes, a.shape, b.shape, a.number)
        counted[key] = counted.get(key, 0) + 1
    return tuple(
        TracedOp(
            name=name,
            kind=kind,
            backward=backward,
            flops=_line(sizes, f1, f2),
            bytes=_line(sizes, b1, b2),
            shape=tuple(_linear(sizes, pair) for pair in _paired(s1, s2)),
            number=number,
            times=times,
        )
        for (name, kind, backward, f1, f2, b1, b2, s1, s2, number), times in counted.items()
    )


def _paired(one: tuple[int, ...], two: tuple[int, ...]) -> Iterable[tuple[int, int]]:
    return zip(one, two, strict=True) if len(one) == len(two) else zip(two, two, strict=True)


def _linear(sizes: tuple[int, int], pair: tuple[int, int]) -> tuple[float, float]:
    line = _line(sizes, *pair)
    return line.start, line.slope
