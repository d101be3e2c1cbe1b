"""The loader around a data set of micro batches: its processes and their signals, and how long the training waited for it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lm_train import heartbeat, signals
from lm_train.data.batches import Batch
from lm_train.errors import DataError, ExitCode, LMTrainError, OutputError
from lm_train.heartbeat import Phase
from lm_train.plan import Plan

_AHEAD = 2
"""Batches that are ready or being made while the training is at its step."""
LOOK_S = 2.0
"""How often a wait for a batch is broken off to look at the processes that make them."""
PATIENCE_S = 60.0
"""So long one batch may take, unless its data may have to be waited for."""


class WorkerLost(LMTrainError):
    """A loader process that died, was stopped, or gives nothing: the run is worth starting again."""

    exit_code = ExitCode.REQUEUE


class TimedLoader:
    """A loader that adds up how long the training loop waited for its batches.

    Args:
        loader: of micro batches.
        ahead: make the next batches in a thread beside the training loop; a small network's step takes little longer than
            making its batch.
        patience: seconds that a batch of loader processes may take; None: as long as they live.
    """

    def __init__(self, loader: DataLoader[Batch], ahead: bool = False, patience: float | None = PATIENCE_S) -> None:
        self.loader, self.ahead, self.patience = loader, ahead, patience
        self.wait_seconds = 0.0
        self.replaced = 0
        """Samples of the batches so far in whose place others stood, since they are damaged."""

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        in_main_thread = threading.current_thread() is threading.main_thread()
        on_child = signal.getsignal(signal.SIGCHLD)
        works = isinstance(self.loader, DataLoader) and self.loader.num_workers > 0
        if works:
            self.loader.timeout = LOOK_S
        with signals.blocked():  # the workers stay so; see _leave_signals_to_the_rank
            batches: Iterator[Batch] = iter(self.loader)
        if in_main_thread and signal.getsignal(signal.SIGCHLD) is not on_child:
            # torch's own would raise wherever this thread is, in the midst of a step or a save; the next wait finds it too
            signal.signal(signal.SIGCHLD, on_child)
        if works:
            batches = watched(batches, self.patience)
        if self.ahead:
            batches = made_ahead(batches)
        while True:
            heartbeat.mark(Phase.DATA)
            before = time.perf_counter()
            try:
                batch = next(batches, None)
            except (
                DataError,
                OutputError,
            ) as error:  # a worker's comes wrapped in its traceback, the message at the end
                name = f"{type(error).__module__}.{type(error).__qualname__}: "
                raise type(error)(str(error).strip().splitlines()[-1].removeprefix(name)) from None
            self.wait_seconds += time.perf_counter() - before
            if batch is None:
                return
            self.replaced += batch.pop("replaced", 0)
            yield batch


def watched(batches: Iterator[Batch], patience: float | None) -> Iterator[Batch]:
    """The same batches; a wait for one ends when a process that makes them is gone or does not come on.

    Args:
        batches: torch's iterator over loader processes, whose timeout is `LOOK_S`.
        patience: seconds that one batch may take; None: as long as they live.

    Raises:
        WorkerLost: naming the process.
    """
    while True:
        began = time.monotonic()
        stopped: tuple[int, int] | None = None
        while True:
            try:
                batch = next(batches)
                break
            except StopIteration:
                return
            except (ConnectionError, EOFError):  # it died while it handed over a batch
                raise WorkerLost(_gone(batches)) from None
            except RuntimeError as error:
                if " exited unexpectedly" in str(error) and str(error).startswith("DataLoader worker"):
                    raise WorkerLost(_gone(batches)) from None
                if not str(error).startswith("DataLoader timed out"):
                    raise
            stopped_before, stopped = stopped, _stopped(batches)
            if (
                stopped is not None and stopped == stopped_before
            ):  # twice: not the whole machine that was halted for a while
                number, process = stopped
                os.kill(process, signal.SIGKILL)  # it could not take the loader's request to end
                raise WorkerLost(f"loader worker {number} (process {process}) of {_here()} was stopped from outside")
            waited = time.monotonic() - began
            if patience is not None and waited > patience:
                number, process = _awaited(batches)
                doing = _doing(process)
                os.kill(process, signal.SIGKILL)
                raise WorkerLost(
                    f"loader worker {number} (process {process}) of {_here()} gave no batch for {waited:.0f} s; it was {doing}"
                )
            heartbeat.alive()
        yield batch


def _here() -> str:
    return f"rank {os.environ.get('RANK', 0)} on {socket.gethostname()}"


def _gone(batches: Any) -> str:
    for number, worker in enumerate(batches._workers):
        if not worker.is_alive():
            code = worker.exitcode
            how = (
                f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
            )
            hint = "; out of memory?" if code == -signal.SIGKILL else ""
            return f"loader worker {number} (process {worker.pid}) of {_here()} {how}{hint}"
    return f"a loader worker of {_here()} ended"


def _stopped(batches: Any) -> tuple[int, int] | None:
    """Number and process of a worker that a signal has halted."""
    for number, worker in enumerate(batches._workers):
        if _state(worker.pid) in ("T", "t"):
            return number, worker.pid
    return None


def _awaited(batches: Any) -> tuple[int, int]:
    """Number and process of the worker that owes the next batch."""
    number = batches._task_info[batches._rcvd_idx][0]
    return number, batches._workers[number].pid


def _state(process: int) -> str:
    """One letter, as proc(5) has it; nothing where the system does not tell."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _doing(process: int) -> str:
    names = {"R": "computing", "S": "waiting for something", "D": "waiting for a disk or a file server"}
    return names.get(_state(process), "alive")


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


def make_loader(batches: Dataset[Batch], plan: Plan, num_workers: int) -> DataLoader[Batch]:
    """A loader of finished micro batches, in their order.

    Args:
        batches: has a length, and a micro batch for each number below it.
        plan: says whether there is a GPU to copy to.
        num_workers: processes; 0 makes the batches in the rank itself.
    """
    return DataLoader(
        batches,
        batch_size=None,
        sampler=range(len(batches)),  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=plan.accelerator == "gpu",
        persistent_workers=num_workers > 0,
        timeout=PATIENCE_S if num_workers > 0 else 0,
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
