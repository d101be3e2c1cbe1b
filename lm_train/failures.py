"""How a rank ended, told among the supervisors of a run, and what can be said of a death that left no message. Free of torch."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from pathlib import Path
from typing import NamedTuple

from lm_train.errors import ExitCode
from lm_train.heartbeat import Beat
from lm_train.runs import RunFolder, write_atomically

_CUT_OFF = ("Connection closed", "Connection reset", "pair closure")
"""Words of the error that a rank gets when another one has gone."""
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)
_FRAME = re.compile(r'^\s+File "(.+)", line (\d+) in (.+)$')


class Report(NamedTuple):
    """How a rank ended, in `errors/rank-N.json` of the run folder: written by itself, or by its supervisor."""

    rank: int
    exit_code: int
    message: str
    stopped: bool = False
    """Told to stop where the ranks do not agree: no failure, but the others may wait for it."""
    step: int = -1
    """Optimizer steps that it had completed; -1: it never came to its first."""
    phase: str = ""
    """What it was at."""
    waited: bool = False
    """It only waited for another rank, until it was given up."""

    @property
    def is_cut_off(self) -> bool:
        """Whether the message only says that another rank went away."""
        return self.waited or any(words in self.message for words in _CUT_OFF)

    @property
    def place(self) -> str:
        """`, after step 120 (validation)`, where a heartbeat has told it."""
        if not self.phase:
            return ""
        return (
            f", before its first step ({self.phase})" if self.step < 0 else f", after step {self.step} ({self.phase})"
        )

    def at(self, beat: Beat) -> Report:
        """With what the rank's heartbeat said last."""
        return self._replace(step=beat.step, phase=beat.phase.in_words)

    def write(self, folder: RunFolder) -> None:
        """Tells the other supervisors."""
        with contextlib.suppress(OSError):  # a full disk is often the very error
            write_atomically(folder.errors / f"rank-{self.rank}.json", json.dumps(self._asdict()))


def read_report(folder: RunFolder, rank: int) -> Report | None:
    """What a rank, or its supervisor, has told of its end."""
    try:
        content = json.loads((folder.errors / f"rank-{rank}.json").read_text(encoding="utf-8"))
        return Report(**{key: value for key, value in content.items() if key in Report._fields})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def reports(folder: RunFolder) -> list[Report]:
    """Of all ranks that have told one."""
    numbers = (file.stem.removeprefix("rank-") for file in folder.errors.glob("rank-*.json"))
    found = (read_report(folder, int(number)) for number in sorted(numbers) if number.isdigit())
    return [report for report in found if report is not None]


def describe_death(rank: int, status: int, beat: Beat, stacks: str, held_bytes: int, out_of_memory: bool) -> Report:
    """Of a rank that ended without a message.

    Args:
        status: its exit code, or minus the signal.
        beat: its last.
        stacks: that it wrote as it crashed.
        held_bytes: memory that it held at most, as far as seen; 0: unknown.
        out_of_memory: whether the kernel has killed processes of this host for want of memory since the start.
    """
    if status >= 0:
        code = ExitCode(status) if status in list(ExitCode) else ExitCode.BUG
        return Report(rank, code, f"ended with exit code {status} and left no message").at(beat)
    number = -status
    name = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
    hint = ""
    if number == signal.SIGKILL and out_of_memory:
        held = f" (it held {held_bytes / 1e9:.1f} GB)" if held_bytes else ""
        hint = (
            f"; the kernel was out of memory and killed processes of this host{held}: ask for more memory, or give a smaller "
            "data.micro_batch_size"
        )
    elif number in _CRASHES:
        where = innermost(stacks)
        hint = f", a crash in compiled code{f', called at {where}' if where else ''}"
    return Report(rank, ExitCode.REQUEUE, f"was ended by {name}{hint}").at(beat)


def innermost(stacks: str, most: int = 4) -> str:
    """`model.py:12 in forward < base.py:80 in loss`: the innermost frames of the thread that was at work."""
    return " < ".join(f"{Path(file).name}:{line} in {name}" for file, line, name in frames(stacks)[:most])


def frames(stacks: str) -> list[tuple[str, str, str]]:
    """File, line and function of the main thread's frames, the innermost first, from what faulthandler wrote."""
    blocks = [block for block in re.split(r"\n\s*\n", stacks) if "most recent call first" in block]
    current = [block for block in blocks if re.search(r"^Current thread", block, re.MULTILINE)]
    if not blocks:
        return []
    chosen = (current or blocks)[-1]
    return [match.groups() for line in chosen.splitlines() if (match := _FRAME.match(line))]  # type: ignore[misc]


def times_out_of_memory() -> int:
    """How often this host's kernel has killed a process for want of memory since it began; 0 where it does not tell."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text(encoding="utf-8").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def peak_memory(pid: int) -> int:
    """Bytes that a process has held at most; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
