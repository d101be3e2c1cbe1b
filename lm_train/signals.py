"""Signals only set a flag here; the training loop acts on it at a step boundary, where all ranks can agree.

Anything that works for long before the loop (tokenising, waiting for data) calls `check` between pieces.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from lm_train import heartbeat
from lm_train.errors import ExitCode, StopRequested

_EXIT_CODES = {
    signal.SIGTERM: ExitCode.REQUEUE,
    signal.SIGUSR1: ExitCode.REQUEUE,
    signal.SIGINT: ExitCode.INTERRUPTED,
}
HANDLED = tuple(_EXIT_CODES)
OUTSIDE_THE_LOOP = 100
"""Added to the exit code by a rank that a signal stopped where the ranks do not agree: the others may wait for it."""
ROLL_BACK = 120
"""A rank's exit code that asks its supervisor to start all ranks again from the run's newest checkpoint."""
_requested: ExitCode | None = None


def listen() -> None:
    """From now on SIGTERM, SIGUSR1 and SIGINT ask for a stop instead of ending the process.

    The supervisor starts ranks with these signals blocked (`blocked`), so that none falls into the gap before this call.
    """
    for number in HANDLED:
        signal.signal(number, _on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Holds the signals back, for this process until the end of the block, for one started inside until it listens."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = max(_requested or ExitCode.DONE, _EXIT_CODES[signal.Signals(number)])


def requested() -> ExitCode | None:
    """The exit code that the signals so far ask for: 130 after Ctrl-C, 75 after SIGTERM or SIGUSR1, else None."""
    return _requested


def forget() -> None:
    """Clears the request, for a process that runs several trainings."""
    global _requested
    _requested = None


def check() -> None:
    """Raises StopRequested if a stop was asked for; else the work between two calls counts as progress."""
    heartbeat.alive()
    if _requested is not None:
        raise StopRequested(_requested)


def die_with_parent() -> None:
    """On Linux, asks the kernel to kill this process when its parent dies, however the parent dies (prctl(2))."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        parent = os.getppid()
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if parent == 1 or os.getppid() != parent:  # the parent died in between
            os._exit(ExitCode.REQUEUE)
