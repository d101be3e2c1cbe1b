"""Measured operations, and the seconds of those between them: linear in the logarithms. Free of torch."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from lm_train.plan.work import Kind, Number, Op

T = TypeVar("T")
SHAPED = ("matmul", "attention", "convolution", "recurrent")
"""Kinds whose speed depends on several sizes."""

NEIGHBOURS = 6
"""Measured shapes that speak for one that was not."""


class Point(BaseModel):
    """One operation, as in `lm_train.plan.work.Op`, and how long it took."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: str
    """Which operation of its kind, such as gelu: a part of the names on the tape, where it matters; else empty."""
    kind: Kind
    backward: bool
    number: Number
    shape: tuple[int, ...]
    bytes: float
    seconds: float


class Curve:
    """Seconds over one size.

    Between two measured sizes the logarithm of the seconds is linear in that of the size; above the largest, seconds grow
    with the size; below the smallest they stay.
    """

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        self._points = sorted((math.log(max(size, 1.0)), math.log(max(seconds, 1e-12))) for size, seconds in points)
        self._sizes = [size for size, _ in self._points]

    def __call__(self, size: float) -> float:
        x = math.log(max(size, 1.0))
        right = bisect_left(self._sizes, x)
        if right == 0:
            return math.exp(self._points[0][1])
        if right == len(self._points):
            last, seconds = self._points[-1]
            return math.exp(seconds + x - last)
        (x0, y0), (x1, y1) = self._points[right - 1], self._points[right]
        return math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0))


class Surface:
    """Seconds a unit of work over several sizes: the measured neighbours, weighted by nearness in the logarithms.

    What is interpolated are the seconds above a fixed cost, over the work, which changes far less from shape to shape than
    the seconds do.

    Args:
        points: sizes, work (such as FLOPs), parts that follow one another, seconds.
        fixed: seconds that each part takes however small it is.
    """

    def __init__(self, points: Iterable[tuple[Sequence[float], float, int, float]], fixed: float) -> None:
        self.fixed = fixed
        self._points = [
            (
                tuple(math.log(max(size, 1.0)) for size in sizes),
                math.log(max(seconds - parts * fixed, 0.05 * seconds) / work),
            )
            for sizes, work, parts, seconds in points
        ]

    def __call__(self, sizes: Sequence[float], work: float, parts: int = 1) -> float:
        at = tuple(math.log(max(size, 1.0)) for size in sizes)
        near = sorted((sum((a - b) ** 2 for a, b in zip(at, point, strict=True)), rate) for point, rate in self._points)
        weights = [(1 / (distance + 0.01), rate) for distance, rate in near[:NEIGHBOURS]]
        rate = sum(weight * rate for weight, rate in weights) / sum(weight for weight, _ in weights)
        return parts * self.fixed + work * math.exp(rate)


_Key = tuple[str, bool, str]


class Tables:
    """Seconds of any operation by those of measured ones of its kind."""

    def __init__(self, points: Iterable[Point]) -> None:
        self._curves: dict[_Key, dict[str, Curve]] = defaultdict(dict)
        self._surfaces: dict[_Key, dict[str, Surface]] = defaultdict(dict)
        self._known: dict[tuple[object, ...], float | None] = {}
        grouped: dict[_Key, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
        floor = 0.0
        for point in points:
            if point.kind == "elementwise":
                floor = min(floor or point.seconds, point.seconds)
            grouped[point.kind, point.backward, point.number][point.variant].append(point)
        for key, variants in grouped.items():
            for variant, own in variants.items():
                if key[0] in SHAPED:
                    # steps of a recurrent layer wait for one another, and several threads for each other at every step
                    least = 0.8 * min(point.seconds / _parts(point.kind, point.shape) for point in own)
                    fixed = least if key[0] == "recurrent" else min(floor, least)
                    measured = (
                        (_sizes(p.kind, p.shape), _work(p.kind, p.shape), _parts(p.kind, p.shape), p.seconds)
                        for p in own
                    )
                    self._surfaces[key][variant] = Surface(measured, fixed)
                else:
                    self._curves[key][variant] = Curve((point.bytes, point.seconds) for point in own)

    def seconds(self, op: Op) -> float | None:
        """None where nothing of its kind was measured."""
        key = (op.kind, op.backward, op.number, op.shape, op.bytes, op.name)
        if key not in self._known:
            self._known[key] = self._between(op)
        return self._known[key]

    def stream(self, size: float) -> float | None:
        """A plain pass that reads and writes so many bytes in all."""
        tables = self._curves.get(("elementwise", False, "fp32"))
        curve = None if tables is None else _variant(tables, "")
        return None if curve is None else curve(size)

    def _between(self, op: Op) -> float | None:
        if op.kind in SHAPED:
            surface = _variant(_first(self._surfaces, op), op.name)
            if surface is None:
                return None
            return surface(_sizes(op.kind, op.shape), _work(op.kind, op.shape), _parts(op.kind, op.shape))
        curve = _variant(_first(self._curves, op), op.name)
        return self.stream(op.bytes) if curve is None else curve(op.bytes)


def _first(tables: Mapping[_Key, dict[str, T]], op: Op) -> dict[str, T]:
    """Of the operation itself, else of the same in another type, else in the other direction."""
    for backward in (op.backward, not op.backward):
        for number in (op.number, "bf16" if op.number == "fp16" else "fp32"):
            if (op.kind, backward, number) in tables:
                return tables[op.kind, backward, number]
    return {}


def _variant(tables: dict[str, T], name: str) -> T | None:
    """The table of the operation's own variant, which its name contains; else the first, which stands for its kind."""
    if not tables:
        return None
    own = (variant for variant in sorted(tables, key=len, reverse=True) if variant and variant in name)
    return tables[next(own, next(iter(tables)))]


def _sizes(kind: str, shape: tuple[int, ...]) -> tuple[float, ...]:
    """The sizes that decide the speed: batch and heads of an attention are alike, as height and width of an image are."""
    match kind:
        case "attention":
            batch, heads, queries, keys, head_size = shape
            return batch * heads, queries, keys, head_size
        case "convolution":
            batch, channels, width_out, height, width, kernel = shape
            return batch, channels, width_out, height * width, kernel
        case "recurrent":
            batch, _, width, state = shape
            return batch, width, state
    return tuple(shape)


def _parts(kind: str, shape: tuple[int, ...]) -> int:
    """Of an operation, those that begin only when the one before has ended."""
    return shape[1] if kind == "recurrent" else 1


def _work(kind: str, shape: tuple[int, ...], flops: float = 0.0) -> float:
    """What the seconds grow with, from the shape alone, so that however FLOPs are counted the unit is the same."""
    product = 1.0
    for size in shape:
        product *= size
    match kind:
        case "convolution":
            return product * shape[-1]  # the kernel is square
        case "recurrent":
            batch, steps, width, state = shape
            return float(batch * steps * state * (width + state))
    return product
