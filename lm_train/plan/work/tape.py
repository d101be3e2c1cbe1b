"""A small model of torch's eager autograd: which storages are alive when, without torch and without numbers.

A network is written down as it is written for torch: functions that pass tensors on. A `Storage` is alive as long as Python
holds it, as in torch, so that the temporaries of an expression, the local names of a function and what an operation keeps for
its backward pass end when they end there (CPython counts references). The tape counts the bytes that are alive, and keeps the
highest count of each stage.

The backward pass follows torch's engine (torch/csrc/autograd/engine.cpp): the youngest operation first; its results exist
beside what it has kept and the gradient that came in, and both of these go afterwards. Gradients of a tensor with several uses
are added up in place only where torch does so (torch/csrc/autograd/input_buffer.cpp), else in a third tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from heapq import heappop, heappush
from math import prod
from sys import getrefcount
from typing import Literal

from lm_train.plan.work.ops import WIDTH, Kind, Number, Op

Device = Literal["cpu", "gpu"]
Group = Literal["", "logits", "gradient"]
"""What the bytes of a storage are counted as besides."""
RANDOM_STATE = 5056
"""Bytes of the CPU generator's state, which torch.utils.checkpoint keeps for each call."""


class Storage:
    """Bytes that are alive as long as this object."""

    __slots__ = ("bytes", "group", "tape")

    def __init__(self, tape: Tape, size: int, group: Group = "") -> None:
        self.tape, self.bytes, self.group = tape, size, group
        tape.live += size
        if group:
            tape.grouped[group] += size
        if tape.live > tape.peak.without_gradients:
            tape.peak.take(tape)

    def __del__(self) -> None:
        self.tape.live -= self.bytes
        if self.group:
            self.tape.grouped[self.group] -= self.bytes

    def regroup(self, group: Group) -> None:
        if self.group:
            self.tape.grouped[self.group] -= self.bytes
        if group:
            self.tape.grouped[group] += self.bytes
        self.group = group


class Peak:
    """The highest counts of alive bytes: without and with the gradients of parameters; of the former what are logits."""

    __slots__ = ("logits", "total", "without_gradients")

    def __init__(self, total: int = 0, without_gradients: int = 0, logits: int = 0) -> None:
        self.total, self.without_gradients, self.logits = total, without_gradients, logits

    def take(self, tape: Tape) -> None:
        without = tape.live - tape.grouped["gradient"]
        if without > self.without_gradients:
            self.without_gradients, self.logits = without, tape.grouped["logits"]
        if tape.live > self.total:
            self.total = tape.live


class Parameter:
    """A weight. Its own bytes are not counted here; those of its gradient are a group of their own."""

    __slots__ = ("arrived", "gradient", "number", "shape", "size", "uses")

    def __init__(self, number: Number, *shape: int) -> None:
        self.number, self.shape, self.size = number, shape, prod(shape)
        self.uses = self.arrived = 0
        self.gradient: Tensor | None = None

    @property
    def bytes(self) -> int:
        return self.size * WIDTH[self.number]


class Tensor:
    """Values in a storage; `view`: torch holds that storage by a second tensor, and will not add to it in place."""

    __slots__ = ("index", "node", "number", "size", "storage", "view")

    def __init__(
        self,
        storage: Storage | None,
        size: int,
        number: Number,
        node: Node | None = None,
        index: int = 0,
        view: bool = False,
    ) -> None:
        self.storage, self.size, self.number, self.node, self.index, self.view = (
            storage,
            size,
            number,
            node,
            index,
            view,
        )

    @property
    def bytes(self) -> int:
        return self.size * WIDTH[self.number]


Gradient = Tensor | None
Backward = Callable[[Sequence[Gradient]], tuple[Gradient, ...]]
"""Gradients of an operation's outputs to those of its inputs."""


class Node:
    """An operation of the forward pass that waits for its backward pass."""

    __slots__ = ("backward", "inputs", "number", "outputs", "saved", "stage")

    def __init__(
        self,
        tape: Tape,
        inputs: Sequence[Tensor | Parameter | None],
        saved: list[Saved],
        backward: Backward,
        outputs: int,
    ) -> None:
        tape.nodes += 1
        self.number, self.stage, self.outputs = tape.nodes, tape.stage, outputs
        self.inputs = [_edge(each) for each in inputs]
        self.saved, self.backward = saved, backward


class Kept:
    """What stands for a saved storage in a part that is computed again; empty until then."""

    __slots__ = ("__weakref__", "part", "storage")

    def __init__(self, part: Recomputed) -> None:
        self.part = part
        self.storage: Storage | None = None


Saved = Storage | Kept | None


class _AllThere(Exception):
    """Everything that the backward pass needs has been computed again."""


class Recomputed:
    """A part of the network of which only the inputs are kept (torch.utils.checkpoint with use_reentrant=False)."""

    def __init__(self, tape: Tape, run: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], state: int) -> None:
        self.tape, self.run, self.inputs = tape, run, inputs
        self.random_state = Storage(tape, state) if state else None
        self.kept: list[weakref.ref[Kept]] = []
        self.found = -1
        """How many storages have been found again; below 0 before the backward pass."""

    def recompute(self) -> None:
        tape = self.tape
        state = self.random_state and Storage(tape, RANDOM_STATE)  # of the backward pass, to go on with
        self.found, tape.part = 0, self
        with suppress(_AllThere):  # torch stops there, too (`set_checkpoint_early_stop`)
            self.run(*self.inputs)
        tape.part = None
        del state


class _Repeated:
    """What a block that stands for others of its kind did, relative to what was alive before it."""

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas
        self.forward: tuple[int, Peak] | None = None
        """Bytes more than before; the peak."""
        self.backward: tuple[int, int, int, Peak] | None = None
        """Bytes more than before; gradients among them; values of parameters that are complete; the peak."""


class _Passed:
    """A stage as it is passed."""

    def __init__(self, name: str) -> None:
        self.name, self.forward, self.backward, self.parameters = name, Peak(), Peak(), 0
        self.before = 0
        """Bytes alive as the forward pass enters it."""
        self.times = (1, 1)
        """How often what the stage does is done, in the forward and in the backward pass, the replicas included."""
        self.records: _Repeated | None = None


class Tape:
    """The state of one micro batch's pass through a network.

    Args:
        device: whose kernels are meant, where they differ.
        training: with a backward pass; else nothing is kept.
        autocast: the type that torch.autocast casts to; None without it.
        accumulates: gradients of earlier micro batches are there, and new ones are added to them; else a parameter's gradient
            is what the backward pass makes, and counted as `gradient`.
    """

    def __init__(self, device: Device, training: bool, autocast: Number | None, accumulates: bool) -> None:
        self.device, self.training, self.autocast, self.accumulates = device, training, autocast, accumulates
        self.live, self.nodes = 0, 0
        self.grouped = {"logits": 0, "gradient": 0}
        self.stages: list[_Passed] = []
        self.stage, self.times, self.goes_back = -1, 1, False
        self.peak = Peak()
        self.part: Recomputed | None = None
        self._ops: dict[tuple[str, Kind, bool, float, float, tuple[int, ...], Number], int] = {}

    # ---- stages

    def enter(self, name: str) -> None:
        """What comes now belongs to a stage of that name."""
        self.stage = len(self.stages)
        self.stages.append(_Passed(name))
        self.stages[-1].before = self.live
        self.peak, self.times = self.stages[-1].forward, 1
        self.peak.take(self)

    def repeat(
        self, x: Tensor, names: Sequence[str], kinds: Sequence[Hashable], block: Callable[[Tensor, int], Tensor]
    ) -> Tensor:
        """Passes x through blocks, of which those of one kind do alike: of each kind only the first and the last is gone
        through, the first of them giving the forward pass of those between, the last their backward pass.

        Args:
            x: what the first block takes.
            names: of the stages, one for each block.
            kinds: of the blocks.
            block: what a block does, with its number.
        """
        # the first and the last block are of their own: what all blocks share comes to be, or goes, with one of them
        kinds = [(kind, i == 0, i == len(kinds) - 1) for i, kind in enumerate(kinds)]
        found: dict[Hashable, _Repeated] = {}
        last = {kind: i for i, kind in enumerate(kinds)}
        for i, (name, kind) in enumerate(zip(names, kinds, strict=True)):
            self.enter(name)
            record = found.get(kind)
            first = record is None
            if record is None:
                record = found[kind] = _Repeated(max(0, kinds.count(kind) - 2))
            before = self.live
            passed = self.stages[-1]
            if first or last[kind] == i:
                passed.records = record
                passed.times = (1 + record.replicas if first else 1, 1 + record.replicas if last[kind] == i else 1)
                self.times = passed.times[0]
                x = block(x, i)
                if first:
                    record.forward = (self.live - before, _relative(passed.forward, before))
            else:
                x = self._replica(x, record, passed, before)
                self.live = before + record.forward[0]  # type: ignore[index]
        return x

    def _replica(self, x: Tensor, record: _Repeated, passed: _Passed, before: int) -> Tensor:
        assert record.forward is not None
        peak = record.forward[1]
        size, number = x.size, x.number
        out = Tensor(Storage(self, x.bytes), size, number)

        def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
            return (self.new(size, number),)

        if self.training:
            out.node = Node(self, (x,), [], backward, 1)
            passed.records = record
        passed.forward.total = before + peak.total
        passed.forward.without_gradients = before + peak.without_gradients
        passed.forward.logits = self.grouped["logits"]
        passed.times = (0, 0)
        return out

    # ---- operations

    def new(self, size: int, number: Number, group: Group = "", view: bool = False) -> Tensor:
        return Tensor(Storage(self, size * WIDTH[number], group), size, number, view=view)

    def mask(self, positions: int) -> Tensor:
        """Which positions are real: a byte each. What attention makes of it has the type of its queries."""
        return Tensor(Storage(self, positions), positions, "bf16")

    def new_gradient(self, size: int, number: Number, of: Parameter | None, view: bool = False) -> Tensor:
        """The gradient of a parameter, or of a tensor that is made of one."""
        kept = of is not None and not self.accumulates and of.gradient is None
        return self.new(size, number, "gradient" if kept else "", view)

    def keep(self, *tensors: Tensor | Parameter | None) -> list[Saved]:
        """Saves for the backward pass; inputs before the outputs are made, as torch does."""
        if not self.training:
            return []
        saved: list[Saved] = []
        for tensor in tensors:
            storage = tensor.storage if isinstance(tensor, Tensor) else None
            part = self.part
            if part is None:
                saved.append(storage)
            elif part.found < 0:
                kept = Kept(part)
                part.kept.append(weakref.ref(kept))
                saved.append(kept)
            else:
                wanted = part.kept[part.found]()
                if wanted is not None:
                    wanted.storage = storage
                part.found += 1
                if part.found == len(part.kept):
                    raise _AllThere
                saved.append(storage)
        return saved

    def result(
        self, out: Tensor, inputs: Sequence[Tensor | Parameter | None], saved: list[Saved], backward: Backward
    ) -> Tensor:
        """`out` as what an operation on these inputs has made."""
        if self.training and any(isinstance(i, Parameter) or (i is not None and i.node is not None) for i in inputs):
            out.node = Node(self, inputs, saved, backward, 1)
            self._count_uses(inputs)
        return out

    def _count_uses(self, inputs: Sequence[Tensor | Parameter | None]) -> None:
        if self.part is None or self.part.found < 0:
            for each in inputs:
                if isinstance(each, Parameter):
                    each.uses += 1

    def op(self, name: str, kind: Kind, flops: float, size: float, shape: tuple[int, ...], number: Number) -> None:
        """Notes an operation; arguments as in `Op`."""
        key = (name, kind, self.goes_back, flops, size, shape, number)
        self._ops[key] = self._ops.get(key, 0) + self.times

    @property
    def ops(self) -> tuple[Op, ...]:
        return tuple(Op(*key, times) for key, times in self._ops.items())

    def lowered(self, parameter: Parameter | None) -> Tensor | Parameter | None:
        """A weight in the type of autocast; as it is without.

        Each use has a cast of its own: Lightning opens autocast with cache_enabled=False.
        """
        low = self.autocast
        if parameter is None or low is None or parameter.number == low:
            return parameter
        moved = parameter.size * (WIDTH[parameter.number] + WIDTH[low])
        out = self.new(parameter.size, low)
        self.op("cast.weight", "copy", 0, moved, (parameter.size,), low)

        def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
            self.op("cast.weight", "copy", 0, moved, (parameter.size,), low)
            return (self.new_gradient(parameter.size, parameter.number, parameter),)

        return self.result(out, (parameter,), [], backward)

    def recomputed(self, run: Callable[..., Tensor], *inputs: Tensor | None, random_state: bool = True) -> Tensor:
        """`run` of the inputs; in training only these are kept, and the rest is computed again in the backward pass."""
        if not self.training:
            return run(*inputs)
        self.part = Recomputed(self, run, inputs, RANDOM_STATE if random_state else 0)
        out = run(*inputs)
        self.part = None
        return out

    # ---- the backward pass

    def backward(self, loss: Tensor) -> None:
        self.goes_back = True
        root = loss.node
        assert root is not None
        waiting: dict[Node, list[Gradient]] = {root: [self.new(1, "fp32")]}
        heap = [(-root.number, root)]
        self.stage = -1
        entered, gradients_before, stage = 0, 0, None
        while heap:
            node = heappop(heap)[1]
            if node.stage != self.stage:
                self._leave(stage, entered, gradients_before)
                self.stage = node.stage
                stage = self.stages[node.stage]
                self.peak, self.times = stage.backward, stage.times[1]
                self.peak.take(self)
                entered, gradients_before = self.live, self.grouped["gradient"]
            gradients = waiting.pop(node)
            saved = self._unpacked(node)
            results: list[Gradient] = list(node.backward(gradients))
            del gradients, saved
            node.saved, there = [], None
            for i, edge in enumerate(node.inputs):
                result, results[i] = results[i], None  # each ends with its sum, not with the operation
                if result is None or edge is None:
                    continue
                target, index = edge
                if isinstance(target, Parameter):
                    self._arrive(target, result)
                    continue
                there = waiting.get(target)
                if there is None:
                    there = waiting[target] = [None] * target.outputs
                    heappush(heap, (-target.number, target))
                there[index] = result if there[index] is None else self._sum(there, index, result)
            del result, there
        self._leave(stage, entered, gradients_before)

    def _unpacked(self, node: Node) -> list[Storage | None]:
        storages: list[Storage | None] = []
        for saved in node.saved:
            if isinstance(saved, Kept):
                if saved.part.found < 0:
                    saved.part.recompute()
                storages.append(saved.storage)
                saved.storage = None
            else:
                storages.append(saved)
        return storages

    def _sum(self, buffer: list[Gradient], index: int, new: Tensor, of: Parameter | None = None) -> Tensor:
        """Of a gradient that waits and one that comes: in place where nobody else holds the former."""
        old = buffer[index]
        assert old is not None
        assert old.storage is not None
        size = 3 * old.bytes
        self.op("gradient.sum", "elementwise", 0, size, (old.size,), old.number)
        # held by the buffer and here; its storage by itself; and both by the call that counts
        if not old.view and getrefcount(old) == 3 and getrefcount(old.storage) == 2:
            return old
        group = old.storage.group
        old.storage.regroup("")
        return self.new(old.size, old.number, group)

    def _arrive(self, parameter: Parameter, gradient: Tensor) -> None:
        parameter.arrived += 1
        if parameter.gradient is None:
            parameter.gradient = gradient
        else:
            buffer: list[Gradient] = [parameter.gradient]
            parameter.gradient = None
            parameter.gradient = self._sum(buffer, 0, gradient)
        if parameter.arrived == parameter.uses:
            self.stages[self.stage].parameters += parameter.size
            if self.accumulates:
                parameter.gradient = None

    def _leave(self, stage: _Passed | None, before: int, gradients: int) -> None:
        """The end of a stage in the backward pass."""
        if stage is None or stage.records is None:
            return
        record = stage.records
        if stage.times != (0, 0):
            if record.backward is None:
                more = self.live - before
                record.backward = (
                    more,
                    self.grouped["gradient"] - gradients,
                    stage.parameters,
                    _relative(stage.backward, before, gradients),
                )
            return
        assert record.backward is not None
        more, more_gradients, stage.parameters, peak = record.backward
        self.live, self.grouped["gradient"] = before + more, gradients + more_gradients
        stage.backward.total = before + peak.total
        stage.backward.without_gradients = before - gradients + peak.without_gradients
        stage.backward.logits = self.grouped["logits"]


def _relative(peak: Peak, live: int, gradients: int = 0) -> Peak:
    return Peak(peak.total - live, peak.without_gradients - (live - gradients))


def _edge(input: Tensor | Parameter | None) -> tuple[Node | Parameter, int] | None:
    if isinstance(input, Parameter):
        return input, 0
    return None if input is None or input.node is None else (input.node, input.index)
