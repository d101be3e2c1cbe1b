"""Networks that stand still, die or take long on one rank at one step, for tests of the supervisor."""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lm_train.plan import DataFacts
from tests.custom_parts import Plain


class Faulty(Plain):
    """Does things on `rank`, each in the forward pass of its number, from 1, of the training or of evaluations."""

    def __init__(self, train: dict[int, str], evaluate: dict[int, str], rank: int, **options: Any) -> None:
        super().__init__(**options)
        self.faults = {True: train, False: evaluate}
        self.calls = {True: 0, False: 0}
        self.here = int(os.environ["RANK"]) == rank
        self.group = dist.new_group() if "leave_out" in train.values() else None

    def forward(self, x: Tensor) -> Tensor:
        self.calls[self.training] += 1
        what = self.faults[self.training].get(self.calls[self.training])
        if what == "leave_out" and not self.here:
            dist.all_reduce(torch.zeros(1), group=self.group)
        elif what in FAULTS and self.here:
            FAULTS[what]()
        return super().forward(x)


def hold_the_interpreter() -> None:
    """For ever, as a lock of compiled code may."""
    lock = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(lock)


def sleep() -> None:
    time.sleep(1000)


def take_long() -> None:
    time.sleep(8)


def crash() -> None:
    ctypes.string_at(0)


def leave() -> None:
    os._exit(3)


FAULTS = {
    "hold_the_interpreter": hold_the_interpreter,
    "sleep": sleep,
    "take_long": take_long,
    "crash": crash,
    "leave": leave,
}


def faulty(facts: DataFacts, train: str = "", evaluate: str = "", rank: int = 1) -> Faulty:
    assert facts.vocab_size is not None
    return Faulty(_table(train), _table(evaluate), rank, vocab_size=facts.vocab_size, width=16)


def _table(text: str) -> dict[int, str]:
    return {int(number): what for what, _, number in (part.partition("@") for part in text.split())}


def words(train: str = "", evaluate: str = "", rank: int = 1) -> tuple[str, str]:
    """For a command line: what happens, as `crash@20`, in which forward pass."""
    args = f"{{train: '{train}', evaluate: '{evaluate}', rank: {rank}}}"
    return (
        "plugins=tests",
        f'model={{kind: custom, factory: "tests.faulty_parts:faulty", args: {args}, block_size: 16}}',
    )
