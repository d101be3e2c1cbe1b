"""What one rank writes of a training, as it stands at a step boundary."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lm_train.checkpoint.randomness import RandomState
from lm_train.checkpoint.views import View, Views
from lm_train.errors import CheckpointError
from lm_train.saved.tensors import TYPES, header_bytes

_NAMES = {getattr(torch, name): name for name in TYPES}
CHUNK = 8 << 20
"""Bytes that are hashed and written at a time."""


class HostMemory:
    """Where the copies of a training lie while they are written; kept from save to save, and page-locked for a GPU."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._making: threading.Thread | None = None

    def prepare(self, n_bytes: int, pinned: bool) -> None:
        """Gets so much in a thread, touched, so that the first save does not wait for that."""

        def make() -> None:
            self._memory = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=pinned)
            self._memory.zero_()

        self._making = threading.Thread(target=make, name="memory for checkpoints", daemon=True)
        self._making.start()

    @property
    def n_bytes(self) -> int:
        """That are held."""
        return 0 if self._memory is None else self._memory.numel()

    def of(self, n_bytes: int, pinned: bool) -> Tensor:
        """So many bytes, (n_bytes,); what was there before is gone."""
        if self._making is not None:
            self._making.join()
            self._making = None
        if self._memory is None or self._memory.numel() < n_bytes:
            self._memory = None  # before the next: never two at a time
            self._memory = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=pinned)
        return self._memory[:n_bytes]


class Snapshot:
    """This rank's shard, and what its manifest will say of it.

    Args:
        views: of the network and the optimizer.
        state: JSON values of the whole run; must hold `step`.
        memory: for a copy of the tensors, so that the training may go on; None: they must stay as they are until all is
            written.
        every: what `views.to_save()` gives, where that is known.

    Raises:
        CheckpointError: if there is a tensor of a type that the format does not have.
    """

    def __init__(
        self,
        views: Views,
        state: dict[str, Any],
        memory: HostMemory | None = None,
        every: Sequence[View] | None = None,
    ) -> None:
        self.rank, self.world = views.rank, views.world
        self.state = json.dumps(state, indent=1)
        self.optimizer = type(views.optimizer).__name__
        self.optimizer_step = views.optimizer_step()
        self._every = list(views.to_save() if every is None else every)
        for view in self._every:
            if view.flat.dtype not in _NAMES:
                raise CheckpointError(f"{view.name}: tensors of type {view.flat.dtype} cannot be saved")
        # the widest first: each tensor then begins at a multiple of its elements' width, without a gap
        self._own = sorted((v for v in self._every if v.flat.numel()), key=lambda view: -view.flat.element_size())
        self._random = RandomState()
        flats = [view.flat for view in self._own]
        self._parts = flats if memory is None else [_copied(flats, memory)]
        self.n_given = 0
        """Bytes that were asked for so far."""

    # Names, shapes and types stay as they are while the training goes on: the writer's thread makes what tells of them.

    @cached_property
    def held(self) -> dict[str, Any]:
        """Shape, and type by key, of each tensor that this rank holds a part of."""
        return _held(self._every)

    @cached_property
    def header(self) -> bytes:
        return header_bytes(
            ((f"{v.name}|{v.key}|{v.start}", type_name(v.flat), (v.flat.numel(),)) for v in self._own),
            {"rng": json.dumps(self._random.values())},
        )

    @cached_property
    def n_bytes(self) -> int:
        """Of the file."""
        return len(self.header) + sum(map(bytes_of, self._parts))

    def chunks(self) -> Iterator[memoryview]:
        """The file's bytes."""
        yield memoryview(self.header)
        for part in self._parts:
            raw = memoryview(part.cpu().view(torch.uint8).numpy().data) if part.numel() else memoryview(b"")
            for begin in range(0, len(raw), CHUNK):
                yield raw[begin : begin + CHUNK]
                self.n_given += CHUNK


def _copied(flats: list[Tensor], memory: HostMemory) -> Tensor:
    """All of them one behind the other, (bytes,), as they are now."""
    on_gpu = any(flat.is_cuda for flat in flats)
    target = memory.of(sum(map(bytes_of, flats)), pinned=on_gpu)
    begin = 0
    for dtype, group in groupby(flats, key=lambda flat: flat.dtype):  # few calls: hundreds of tensors are copied
        alike = list(group)
        end = begin + sum(map(bytes_of, alike))
        places = target[begin:end].view(dtype).split([flat.numel() for flat in alike])
        torch._foreach_copy_(places, alike, non_blocking=True)
        begin = end
    if on_gpu:
        torch.cuda.current_stream().synchronize()
    return target


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def type_name(tensor: Tensor) -> str:
    """`float32`, as manifests have it."""
    return _NAMES[tensor.dtype]


def _held(views: list[View]) -> dict[str, Any]:
    """Shape, and type by key, of each tensor that this rank holds a part of."""
    tensors: dict[str, Any] = {}
    for view in views:
        entry = tensors.setdefault(view.name, {"shape": list(view.shape), "keys": {}})
        entry["keys"][view.key] = type_name(view.flat)
    return tensors
