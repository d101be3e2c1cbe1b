"""A thread that writes checkpoints while the training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from lm_train.checkpoint.saving import Published


class Writer:
    """At most one write at a time. What goes wrong in it is raised where its owner next looks."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._done: tuple[Published, float] | None = None

    def begin(self, work: Callable[[], Published]) -> None:
        """Starts a write; the one before must have been taken by `finish` or `ready`."""
        assert self._thread is None, "a write is under way"
        began = time.monotonic()
        goes_on = threading.Event()

        def run() -> None:
            goes_on.wait()  # else this thread keeps the interpreter, and whoever started it waits for it
            try:
                self._done = work(), time.monotonic() - began
            except BaseException as error:
                self._error = error

        # a daemon: a process whose training has failed does not wait for ranks that are no more
        self._thread = threading.Thread(target=run, name="checkpoint writer", daemon=True)
        self._thread.start()
        goes_on.set()

    @property
    def is_busy(self) -> bool:
        """Whether a write was begun that nobody has taken yet."""
        return self._thread is not None

    def ready(self) -> tuple[Published, float] | None:
        """A write that has ended since the last look, with its seconds; None if none has. Does not wait.

        Raises:
            OutputError: if it could not be written.
        """
        return None if self._thread is None or self._thread.is_alive() else self.finish()

    def finish(self, timeout_s: float | None = None) -> tuple[Published, float] | None:
        """Waits for the write under way.

        Args:
            timeout_s: None: as long as it takes.

        Returns:
            As `ready`; None also when the time is over.
        """
        if self._thread is None:
            return None
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return None
        self._thread = None
        done, error, self._done, self._error = self._done, self._error, None, None
        if error is not None:
            raise error
        return done
