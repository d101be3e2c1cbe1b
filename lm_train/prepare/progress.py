"""What a person sees while text is prepared: share, rate and time left, on standard error."""

from __future__ import annotations

import sys
import time

LINE_EVERY_S = 10.0
_REDRAW_S = 0.2


class Progress:
    """One stage. In a terminal its line is drawn again and again; elsewhere a line comes every ten seconds.

    Args:
        stage: what is being done.
        total: bytes (or units) of the whole stage, as far as known; it may be an estimate.
        unit: `B` for bytes of text, else the name of what is counted.
    """

    def __init__(self, stage: str, total: int | None, unit: str = "B") -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.out = sys.stderr
        self.done = self.before = 0
        self._started = self._shown = time.monotonic()
        self._terminal = self.out.isatty()

    def skip(self, amount: int) -> None:
        """Counts what an earlier start has done: it says nothing of the rate."""
        self.before += amount
        self._show()

    def add(self, amount: int) -> None:
        self.done += amount
        self._show()

    def line(self, text: str) -> None:
        """Shows a line of its own."""
        clear = "\r\x1b[K" if self._terminal else ""
        print(f"{clear}{text}", file=self.out, flush=True)

    def close(self, said: str) -> None:
        """Ends the stage with a line that says what came of it."""
        seconds = time.monotonic() - self._started
        self.line(f"{self.stage}: {said} in {clock(seconds)}")

    def text(self) -> str:
        """The line as it is now."""
        seconds = max(1e-9, time.monotonic() - self._started)
        rate, reached = self.done / seconds, self.before + self.done
        amount = f"{reached / 1e6:,.1f} MB" if self.unit == "B" else f"{reached:,} {self.unit}"
        speed = f"{rate / 1e6:.2f} MB/s" if self.unit == "B" else f"{rate:,.1f} {self.unit}/s"
        if not self.total:
            return f"{self.stage}: {amount}, {speed}"
        share = min(1.0, reached / self.total)
        left = f", about {clock(max(0, self.total - reached) / rate)} left" if self.done else ""
        return f"{self.stage}: {share:.0%}, {amount}, {speed}{left}"

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._shown < (_REDRAW_S if self._terminal else LINE_EVERY_S):
            return
        self._shown = now
        if self._terminal:
            print(f"\r\x1b[K{self.text()}", end="", file=self.out, flush=True)
        else:
            print(self.text(), file=self.out, flush=True)


def clock(seconds: float) -> str:
    """3:07 or 1:03:07; below a minute with a tenth of a second."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
