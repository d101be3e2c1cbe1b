"""The loader around a data set of micro batches: its processes and their signals, and how long the training waited for it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue

import torch
from torch.utils.data import DataLoader, Dataset

from lm_train import heartbeat, signals
from lm_train.data.batches import Batch
from lm_train.errors import DataError
from lm_train.heartbeat import Phase
from lm_train.plan import Plan

_IN_TRACEBACK = f"{DataError.__module__}.{DataError.__qualname__}: "
_AHEAD = 2
"""Batches that are ready or being made while the training is at its step."""


class TimedLoader:
    """A loader that adds up how long the training loop waited for its batches.

    Args:
        loader: of micro batches.
        ahead: make the next batches in a thread beside the training loop; a small network's step takes little longer than
            making its batch.
    """

    def __init__(self, loader: DataLoader[Batch], ahead: bool = False) -> None:
        self.loader, self.ahead = loader, ahead
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        with signals.blocked():  # the workers stay so; see _leave_signals_to_the_rank
            batches: Iterator[Batch] = iter(self.loader)
        if self.ahead:
            batches = made_ahead(batches)
        while True:
            heartbeat.mark(Phase.DATA)
            before = time.perf_counter()
            try:
                batch = next(batches, None)
            except DataError as error:  # a worker's comes wrapped in its traceback, the message at the end
                raise DataError(str(error).strip().splitlines()[-1].removeprefix(_IN_TRACEBACK)) from None
            self.wait_seconds += time.perf_counter() - before
            if batch is None:
                return
            yield batch


def made_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, made by a thread that stays a little ahead; what it raises is raised at the place of its batch."""
    room: SimpleQueue[bool] = SimpleQueue()  # a permission for each batch to be made; False: no more
    made: SimpleQueue[Batch | BaseException | None] = SimpleQueue()

    def make() -> None:
        torch.set_num_threads(1)  # of this thread: the step beside it has the cores
        while room.get():
            try:
                batch = next(batches, None)
            except BaseException as error:
                made.put(error)
                return
            made.put(batch)
            if batch is None:
                return

    torch.get_num_threads()  # settles this thread's own number, which `make` would otherwise decide along with its own
    thread = threading.Thread(target=make, name="batches", daemon=True)
    with signals.blocked():  # they are for the main thread, which may be waiting
        thread.start()
    try:
        for _ in range(_AHEAD):
            room.put(True)
        while (batch := made.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            room.put(True)
            yield batch
    finally:
        with suppress(Empty):
            while True:
                room.get_nowait()
        room.put(False)
        thread.join()


def make_loader(batches: Dataset[Batch], plan: Plan, num_workers: int, may_wait: bool = False) -> DataLoader[Batch]:
    """A loader of finished micro batches, in their order.

    Args:
        batches: has a length, and a micro batch for each number below it.
        plan: says whether there is a GPU to copy to.
        num_workers: processes; 0 makes the batches in the rank itself.
        may_wait: a batch may take long to come (a stream, which has a patience of its own).
    """
    return DataLoader(
        batches,
        batch_size=None,
        sampler=range(len(batches)),  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=plan.accelerator == "gpu",
        persistent_workers=num_workers > 0,
        timeout=60 if num_workers > 0 and not may_wait else 0,
        worker_init_fn=_leave_signals_to_the_rank,
    )


def _leave_signals_to_the_rank(worker: int) -> None:
    """A scheduler signals every process of a job; the rank still needs its batches to reach a step boundary.

    Signals are blocked since the worker's start; SIGTERM still ends it when its own rank sends it, as the loader and
    multiprocessing do to clean up.
    """
    signals.forget()
    if sys.platform == "linux":
        threading.Thread(target=_end_when_the_rank_asks, daemon=True).start()
    else:  # cannot tell who sent it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_when_the_rank_asks() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
