"""What a strategy holds beside the model's state: gradients on their way, gathered parameters, buckets. Free of torch.

Read in torch 2.13 (DDP's reducer, distributed/fsdp/_fully_shard) and DeepSpeed 0.19 (runtime/zero), and held to account by
`benchmarks/memory.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lm_train.plan.layout import Layout, Strategy
from lm_train.plan.memory import ZERO_PERSISTENT, StateBytes
from lm_train.plan.work import Stage

NamedShapes = Sequence[tuple[str, tuple[int, ...]]]
ZERO_BUCKET = 200_000_000
"""Elements that DeepSpeed reduces at once, as Lightning 2.6 sets it (`reduce_bucket_size`)."""
_UNIT = re.compile(r"(?:\w+\.)*?\w+\.\d+(?=\.)")


@dataclass(frozen=True)
class Held:
    """Bytes beside parameters, optimizer and activations at one moment."""

    gradients: int
    buffers: int


def units_of(shapes: NamedShapes) -> dict[str, int]:
    """Elements of what is gathered together, by name; the network's rest is under "".

    The entries of the outermost lists of modules, as `lm_train.strategy.units` finds them in the modules.
    """
    found: dict[str, int] = {"": 0}
    for name, shape in shapes:
        match = _UNIT.match(name)
        key = match[0] if match else ""
        found[key] = found.get(key, 0) + math.prod(shape)
    return found


class Exchange:
    """Gradients and buffers of a strategy, moment by moment.

    Args:
        shapes: name and shape of every parameter.
        stages: of the network, in the order of the forward pass.
        layout: strategy, precision, ranks, accumulation.
        state: what the rank holds all through the training.
    """

    def __init__(self, shapes: NamedShapes, stages: Sequence[Stage], layout: Layout, state: StateBytes) -> None:
        self.layout, self.state, self.stages = layout, state, stages
        self.strategy: Strategy = layout.strategy
        self.total = sum(math.prod(shape) for _, shape in shapes)
        self.largest = max(math.prod(shape) for _, shape in shapes)
        self.small = sum(n for _, shape in shapes if (n := math.prod(shape)) <= ZERO_PERSISTENT)
        self.units = units_of(shapes)
        self.master = 2 if layout.precision == "bf16-true" else 4
        """Bytes of a parameter as it is kept."""
        low = {"32-true": 4, "bf16-mixed": 2, "bf16-true": 2, "16-mixed": 2}[layout.precision]
        self.computed = low if self.strategy == "fsdp" or self.strategy.startswith("zero") else self.master
        """Bytes of a parameter as the network sees it."""
        self.accumulates = layout.accumulate_grad_batches > 1

    def forward(self, stage: int) -> Held:
        """During a stage's forward pass.

        single, ddp, fsdp: Lightning sets gradients to None after the forward pass, so that the last step's are there.
        fsdp: the root's parameters, the unit's own, and the output of its all-gather, which is kept until the next one's.
        zero1, zero2: gradients only of earlier micro batches.
        zero3: the unit's parameters, and prefetched the next one's.
        """
        match self.strategy:
            case "single" | "ddp":
                return Held(self.state.gradients, 0)
            case "fsdp":
                root, unit = self.units[""], self._unit(stage)
                return Held(self.state.gradients, self.computed * (root + 2 * unit if unit else 2 * root))
            case "zero1" | "zero2":
                return Held(self.state.gradients if self.accumulates else 0, 0)
            case _:
                return Held(self.state.gradients, self.computed * self._gathered(stage))

    def backward(self, stage: int) -> Held:
        """During a stage's backward pass; its own gradients count as if they were all there.

        single: gradients of what has been passed, or where earlier micro batches have left theirs, all.
        ddp: all, since they live in the buckets, and each once more until it is copied there.
        fsdp: own unit, prefetched next one's all-gather, gradients of unit and root, the last reduce-scatter's fp32 input.
        zero1, zero2: the bucket with all gradients so far, and when it is reduced a copy of it.
        zero3: own unit and the prefetched next one, the bucket.
        """
        passed = sum(s.parameters for s in self.stages[stage:])
        share = 1.0 if self.accumulates or self.total == 0 else min(1.0, passed / self.total)
        own = round(self.state.gradients * share)
        match self.strategy:
            case "single":
                return Held(own, 0)
            case "ddp":
                return Held(self.state.gradients, self.master * self.largest)
            case "fsdp":
                root, unit, following = self.units[""], self._unit(stage), self._unit(stage - 1)
                before = self._unit(stage + 1)
                gathered = self.computed * (root + unit + following)
                on_their_way = self.computed * (unit + root * (stage < len(self.stages) - 1)) + 4 * before
                return Held(own, gathered + on_their_way)
            case "zero1" | "zero2":
                return Held(self.state.gradients if self.accumulates else 0, self._bucket(passed))
            case _:
                return Held(self.state.gradients, self.computed * self._gathered(stage) + self._bucket(passed))

    def reduced(self) -> Held:
        """When the last gradients are reduced; nothing of the micro batch is left."""
        n, low = min(self.total, ZERO_BUCKET), self.computed
        match self.strategy:
            case "single":
                return Held(self.state.gradients, 0)
            case "ddp":
                return Held(self.state.gradients, self.master * self.largest)
            case "fsdp":
                root = self.units[""]
                return Held(self.state.gradients, (2 * self.computed + 2 * 4) * root)
            case "zero1" | "zero2":
                return Held(self.state.gradients, self._bucket(self.total) + low * n)
            case _:
                return Held(self.state.gradients, self._bucket(self.total) + low * n)

    def evaluation(self) -> Held:
        """During a validation: the last step's gradients are still there, but for DeepSpeed's."""
        if self.strategy == "fsdp":
            root, unit = self.units[""], max((n for key, n in self.units.items() if key), default=0)
            return Held(self.state.gradients, self.computed * (root + 2 * unit))
        if self.strategy in ("zero1", "zero2"):
            return Held(0, 0)
        if self.strategy.startswith("zero3"):
            return Held(self.state.gradients, self.computed * max(self._gathered(i) for i in range(len(self.stages))))
        return Held(self.state.gradients, 0)

    def _unit(self, stage: int) -> int:
        """Elements of the unit that a stage is; 0 where it belongs to the network as a whole."""
        if not 0 <= stage < len(self.stages):
            return 0
        return self.units.get(self.stages[stage].name, 0) if self.stages[stage].name else 0

    def _gathered(self, stage: int) -> int:
        """Elements that ZeRO-3 has gathered for a stage: its own, and the next one's ahead of time."""
        own, following = self.stages[stage].parameters, 0
        if stage + 1 < len(self.stages):
            following = self.stages[stage + 1].parameters
        return own + min(following, 50_000_000)

    def _bucket(self, passed: int) -> int:
        """Bytes of DeepSpeed's gradient buckets: two of them on a GPU (`overlap_comm`), one under stage 3; on a CPU only what
        has been written to counts."""
        if self.layout.accelerator == "cpu":
            return self.computed * min(passed, ZERO_BUCKET)
        return self.computed * ZERO_BUCKET * (1 if self.strategy.startswith("zero3") else 2)
