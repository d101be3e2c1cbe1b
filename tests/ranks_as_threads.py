"""Ranks of a save that are threads of one process: what each writes and says to the others is real, only the way is short."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

from lm_train.checkpoint import Group


class Threads(Group):
    """Ranks that are threads of this process."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.values: dict[str, Any] = {}
        self.barrier = threading.Barrier(world, timeout=20)

    def gather(self, value: Any) -> list[Any]:
        self.values[threading.current_thread().name] = value
        self.barrier.wait()
        told = [json.loads(json.dumps(self.values[name])) for name in sorted(self.values)]
        self.barrier.wait()
        return told


def on_ranks(world: int, work: Callable[[int, Group], Any]) -> list[Any]:
    """What `work` gives on each of so many ranks; an error of it is its answer."""
    group, answers = Threads(world), [None] * world

    def run(rank: int) -> None:
        try:
            answers[rank] = work(rank, group)
        except Exception as error:
            answers[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank:03}") for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers
