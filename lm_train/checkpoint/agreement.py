"""How the ranks speak about checkpoints: over a group of their own, so that a writer's words never stand in the way of the
training's collectives, and as JSON, since torch's `all_gather_object` would pickle them."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(hours=1)
"""A rank that writes for so much longer than another is given up."""


class Group:
    """All ranks, for one of their threads at a time.

    Args:
        world: number of ranks; with more than one, all of them make their groups in the same order.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT) if world > 1 else None

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in the order of ranks; all ranks call it."""
        text = json.dumps(value).encode()
        if self.world == 1:
            return [json.loads(text)]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([len(text)]), group=self.group)
        longest = max(int(length) for length in lengths)
        own = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(texts, own, group=self.group)
        return [json.loads(text.numpy().tobytes()) for text in texts]


_groups: dict[int, tuple[Any, Group]] = {}


def group_of_all() -> Group:
    """The group of this process' training, made when it is first asked for: by all ranks at the same place."""
    if not (dist.is_available() and dist.is_initialized()):
        return Group(1)
    whole = dist.group.WORLD
    if id(whole) not in _groups:
        _groups[id(whole)] = (whole, Group(dist.get_world_size()))
    return _groups[id(whole)][1]
