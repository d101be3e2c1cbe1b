"""Signals only set a flag here; the training loop acts on it at a step boundary, where all ranks can agree.

Anything that works for long before the loop (tokenising, waiting for data) calls `check` between pieces.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

from lm_train.errors import ExitCode, StopRequested

_EXIT_CODES = {
    signal.SIGTERM: ExitCode.REQUEUE,
    signal.SIGUSR1: ExitCode.REQUEUE,
    signal.SIGINT: ExitCode.INTERRUPTED,
}
HANDLED = tuple(_EXIT_CODES)
_requested: ExitCode | None = None


def listen() -> None:
    """From now on SIGTERM, SIGUSR1 and SIGINT ask for a stop instead of ending the process."""
    for number in HANDLED:
        signal.signal(number, _on_signal)


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
    """Raises StopRequested if a stop was asked for."""
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
