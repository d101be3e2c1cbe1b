"""The loader around a data set of micro batches: its processes and their signals, and how long the training waited for it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from torch.utils.data import DataLoader, Dataset

from lm_train import signals
from lm_train.data.batches import Batch
from lm_train.errors import DataError
from lm_train.plan import Plan

_IN_TRACEBACK = f"{DataError.__module__}.{DataError.__qualname__}: "


class TimedLoader:
    """A loader that adds up how long the training loop waited for its batches."""

    def __init__(self, loader: DataLoader[Batch]) -> None:
        self.loader = loader
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        with signals.blocked():  # the workers stay so; see _leave_signals_to_the_rank
            batches = iter(self.loader)
        while True:
            before = time.perf_counter()
            try:
                batch = next(batches, None)
            except DataError as error:  # a worker's comes wrapped in its traceback, the message at the end
                raise DataError(str(error).strip().splitlines()[-1].removeprefix(_IN_TRACEBACK)) from None
            self.wait_seconds += time.perf_counter() - before
            if batch is None:
                return
            yield batch


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
