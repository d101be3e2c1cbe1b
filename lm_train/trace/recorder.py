"""What a network does while it runs: every operation, and every storage from its birth to its death.

Works on fake tensors and on real ones alike. Seen is what passes torch's dispatcher: an operation's own scratch memory is not.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lm_train.plan.work import Kind, Number
from lm_train.trace.corrections import corrected
from lm_train.trace.operations import IGNORED_OPS, describe

Phase = Literal["forward", "backward", "evaluation"]
_ACCUMULATES = 2**64 - 1
"""Number of every autograd node that adds to a parameter's gradient."""


@dataclass(slots=True)
class Storage:
    """A piece of memory that an operation made."""

    size: int
    """Bytes."""
    width: int
    """Last dimension of the tensor that it was made for: the vocabulary, of logits."""
    is_copy: bool
    """Made by autograd for a gradient that it cannot take as it is."""


@dataclass(slots=True)
class Event:
    """A birth, a death, or the moment in which a storage is a parameter's gradient."""

    storage: int
    what: Literal["birth", "death", "arrival"]
    micro: int
    phase: Phase
    segment: int


@dataclass(slots=True)
class Seen:
    """One operation."""

    name: str
    kind: Kind
    phase: Phase
    micro: int
    flops: float
    bytes: float
    shape: tuple[int, ...]
    number: Number


@dataclass
class Recording:
    """All that was seen."""

    storages: list[Storage] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    operations: list[Seen] = field(default_factory=list)
    segments: list[str] = field(default_factory=list)
    """The parts of one micro batch in the order of its forward pass: a unit's name, or "" for what lies between."""
    completed: dict[str, int] = field(default_factory=dict)
    """Segment in whose backward pass a parameter's gradient is complete, by the parameter's name."""


class Recorder(TorchDispatchMode):
    """Records while it is entered.

    The backward pass of an operation belongs to the segment and the module of its forward pass: autograd numbers its nodes.

    Args:
        net: whose modules give names.
        units: its modules that make a segment each.
    """

    def __init__(self, net: nn.Module, units: Iterable[nn.Module]) -> None:
        super().__init__()
        self.recording = Recording()
        self.micro, self.phase = 0, "forward"
        self._names = {id(module): name for name, module in net.named_modules()}
        self._parameters = list(net.named_parameters())
        self._units = {id(unit) for unit in units}
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._segment = 0
        self._path: list[str] = []
        self._nodes: list[int] = []
        self._places: list[tuple[int, str]] = []
        self._place = (0, "")
        self._accumulates = self._finished = False

    phase: Phase

    # ---- what is told from outside

    def start(self, micro: int, phase: Phase) -> None:
        """What follows is this pass of this micro batch."""
        self.micro, self.phase = micro, phase
        if phase != "backward":
            self._segment, self._nodes, self._places = 0, [], []
            if micro == 0 and phase == "forward":
                self.recording.segments = [""]

    def known(self, tensors: Iterable[Tensor]) -> set[int]:
        """Makes storages known that are there already; their numbers."""
        return {self._number(tensor) for tensor in tensors}

    def finish(self) -> None:
        """What dies from now on is no part of the recording."""
        self._finished = True

    def numbers_of(self, tensors: Iterable[Tensor]) -> set[int]:
        """The numbers of storages that are alive."""
        keys = {tensor.untyped_storage()._cdata for tensor in tensors}
        return {self._alive[key][0] for key in keys if key in self._alive}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """While these are in place modules are known by name."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
            *(
                p.register_post_accumulate_grad_hook(self._completes(name))
                for name, p in self._parameters
                if p.requires_grad
            ),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ---- modules

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._path.append(self._names.get(id(module), ""))
        if id(module) in self._units and self.phase == "forward":
            self._next_segment(self._names[id(module)])

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self._path.pop()
        if id(module) in self._units and self.phase == "forward":
            self._next_segment("")

    def _next_segment(self, name: str) -> None:
        self._segment += 1
        if self.micro == 0:
            self.recording.segments.append(name)

    def _completes(self, name: str) -> Callable[[Tensor], None]:
        def complete(parameter: Tensor) -> None:
            self.recording.completed[name] = self._place[0]
            if parameter.grad is not None:
                for number in self.numbers_of([parameter.grad]):
                    self._event(number, "arrival")

        return complete

    # ---- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in IGNORED_OPS:
            return func(*args, **kwargs)
        self._locate()
        cause = func.overloadpacket.__name__
        out = corrected(cause, args, func(*args, **kwargs))
        before = len(self.recording.storages)
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self._number(tensor)
        if len(self.recording.storages) > before or func._schema.is_mutable:
            found = describe(func, args, kwargs, out, tensors)
            kind, flops, moved, shape, number = found
            self.recording.operations.append(
                Seen(self._place[1], kind, self.phase, self.micro, flops, moved, shape, number)
            )
        return out

    def _locate(self) -> None:
        """Where the next operation belongs."""
        if self.phase == "backward":
            node = torch._C._current_autograd_node()
            number = -1 if node is None else node._sequence_nr()
            self._accumulates = number == _ACCUMULATES
            at = bisect_right(self._nodes, number)
            if number >= 0 and at < len(self._places):
                self._place = self._places[at]
            elif self._path:  # computed again by code that is no module's forward
                self._place = self._place[0], self._path[-1]
        else:
            self._place = self._segment, self._path[-1] if self._path else ""
        following = torch._C._autograd._get_sequence_nr()
        if torch.is_grad_enabled() and (not self._nodes or following > self._nodes[-1]):
            self._nodes.append(following)  # a node below `following` was made by the first operation that says so
            self._places.append(self._place)

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return self._alive[key][0]
        number = len(self.recording.storages)
        self.recording.storages.append(
            Storage(storage.nbytes(), tensor.shape[-1] if tensor.dim() else 1, self._accumulates)
        )
        self._event(number, "birth")

        def dies(_: Any) -> None:
            if self._alive.get(key, (None,))[0] == number:
                del self._alive[key]
            self._event(number, "death")

        self._alive[key] = number, weakref.ref(storage, dies)
        return number

    def _event(self, number: int, what: Literal["birth", "death", "arrival"]) -> None:
        if not self._finished:
            self.recording.events.append(Event(number, what, self.micro, self.phase, self._place[0]))
