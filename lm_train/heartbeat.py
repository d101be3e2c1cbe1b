"""A rank's sign of life: what it is at, which step it has done, and when it last came on, in memory that its supervisor reads.

Nothing here runs by itself: a beat comes from the training's own progress, so that a rank whose loop stands still, whatever
else of it still runs, is silent. Outside of a rank that a supervisor has started every call does nothing.

    heartbeat.mark(Phase.STEP)              all ranks pass here equally often: whoever has passed less often holds the others up
    heartbeat.alive()                       this rank has come on inside its phase
    with heartbeat.during(Phase.SAVE): ...  a part that takes its own time; what follows is the phase before

A beat costs about a microsecond and asks the system for nothing but the time. Free of torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import signal
import struct
import tempfile
import threading
import time
from collections.abc import Iterator, MutableMapping
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

VARIABLE = "LM_TRAIN_HEARTBEAT"
"""`BOARD:STACKS`, two open files that a rank is born with."""
STACK_SIGNAL = signal.SIGUSR2
"""Writes the Python stacks of all threads, also while other code holds the interpreter."""
_LAYOUT = struct.Struct("=QQQqqQ")
"""Number of the write, monotonic ns of the last beat, count of marks since the step, step, phase, ns of the phase's pace."""
_READY_AT = 256
_SIZE = 4096
_FORGETS = 0.99
"""Of a phase's longest beat, with every later one."""


class Phase(IntEnum):
    """What a rank is at. How long each may last without a beat: `lm_train.watchdog`."""

    START = 0
    """Python and the libraries are loading."""
    MEET = 1
    PREPARE = 2
    """The data."""
    BUILD = 3
    """Network, strategy, optimizer."""
    RESTORE = 4
    DATA = 5
    """Waiting for a micro batch."""
    STEP = 6
    """Forward, backward, update of a micro batch."""
    BOUNDARY = 7
    """What follows a step: metrics, agreements."""
    COMPILE = 8
    VALIDATION = 9
    TEST = 10
    EVALUATE = 11
    """The end of an evaluation: its metrics over all ranks."""
    SAVE = 12
    SAMPLE = 13
    FINISH = 14
    """After the last step: loggers close, files are written."""
    WAIT = 15
    """For something outside that may take long: a download, a file server."""

    @property
    def in_words(self) -> str:
        return self.name.lower().replace("_", " ")


class Beat(NamedTuple):
    """The last sign of a rank."""

    at: float
    """Seconds on the monotonic clock, which all processes of a machine share."""
    marks: int
    """How often it has passed `mark` since it completed `step`."""
    step: int
    """Optimizer steps completed; -1: no training loop yet."""
    phase: Phase
    pace: float
    """Seconds that a beat of this phase took lately at the longest; 0: none has ended yet."""
    dumps: bool
    """Whether the rank can write its stacks."""


class Board:
    """The supervisor's side: memory and a file for stacks that one rank is given, and that vanish with the processes."""

    def __init__(self) -> None:
        self._file, self._stacks = _anonymous("lm-train-beat"), _anonymous("lm-train-stacks")
        os.truncate(self._file, _SIZE)
        self._memory = mmap.mmap(self._file, _SIZE)
        self.inherited = (self._file, self._stacks)
        """Descriptors for the rank, under the same numbers."""
        _write(self._memory, 1, time.monotonic_ns(), 0, -1, Phase.START, 0)

    @property
    def variable(self) -> dict[str, str]:
        """For the rank's environment."""
        return {VARIABLE: f"{self._file}:{self._stacks}"}

    def read(self) -> Beat:
        for _ in range(8):
            content = self._memory[: _READY_AT + 1]
            if content[:8] == self._memory[:8]:  # else one was written in between
                break
        return _parsed(content)

    def stacks(self) -> str:
        """What the rank has written of its stacks, asked for or at a crash."""
        size = os.fstat(self._stacks).st_size
        return os.pread(self._stacks, min(size, 1 << 20), 0).decode(errors="replace")

    def close(self) -> None:
        self._memory.close()
        for descriptor in self.inherited:
            os.close(descriptor)


def seen(supervisor: int, rank: int) -> Beat | None:
    """The last sign of a rank, for a process that is neither the rank nor its supervisor; on Linux, None elsewhere.

    Args:
        supervisor, rank: process ids, of this user.
    """
    try:
        environment = Path(f"/proc/{rank}/environ").read_bytes().split(b"\0")
        given = next((e for e in environment if e.startswith(VARIABLE.encode() + b"=")), b"=")
        board = given.partition(b"=")[2].partition(b":")[0].decode()
        content = Path(f"/proc/{supervisor}/fd/{board}").read_bytes()
    except OSError:
        return None
    return _parsed(content) if len(content) > _READY_AT else None


def _parsed(content: bytes) -> Beat:
    _, at, marks, step, phase, pace = _LAYOUT.unpack_from(content)
    return Beat(at / 1e9, marks, step, Phase(phase), pace / 1e9, content[_READY_AT] == 1)


class _Pulse:
    """The rank's side."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory, self.thread = memory, threading.get_ident()
        self.number, self.marks, self.step, self.phase = 2, 0, -1, Phase.START
        self.last = time.monotonic_ns()
        self.paces = [0] * len(Phase)

    def beat(self, phase: Phase, ended: bool) -> None:
        now = time.monotonic_ns()
        if ended:
            before = self.phase
            self.paces[before] = max(now - self.last, int(self.paces[before] * _FORGETS))
        self.last, self.phase = now, phase
        self.number += 1
        _write(self.memory, self.number, now, self.marks, self.step, phase, self.paces[phase])


_pulse: _Pulse | None = None


def join(environ: MutableMapping[str, str] = os.environ) -> None:
    """In a rank, first of all: takes the memory it was given, and has crashes and `STACK_SIGNAL` write its stacks.

    The variable is taken out of the environment: what the rank starts has no part in it.
    """
    global _pulse
    given = environ.pop(VARIABLE, None)
    if given is None:
        return
    board, stacks = map(int, given.split(":"))
    memory = mmap.mmap(board, _SIZE)
    os.close(board)
    os.set_inheritable(stacks, False)
    faulthandler.enable(file=stacks, all_threads=True)
    faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True, chain=False)
    memory[_READY_AT] = 1
    _pulse = _Pulse(memory)


def here() -> dict[str, int | str]:
    """What this rank's last beat said, for its own report of an error; nothing before the training."""
    return {} if _pulse is None or _pulse.step < 0 else {"step": _pulse.step, "phase": _pulse.phase.in_words}


def leave() -> None:
    """No more beats of this process; for what is forked from a rank."""
    global _pulse
    _pulse = None


os.register_at_fork(after_in_child=leave)


def mark(phase: Phase, step: int | None = None) -> None:
    """This rank enters `phase` at a place that all ranks pass equally often.

    Args:
        phase: what follows.
        step: optimizer steps completed so far, where that is known here.
    """
    pulse = _mine()
    if pulse is None:
        return
    if step is not None and step != pulse.step:
        pulse.step, pulse.marks = step, 0
    pulse.marks += 1
    pulse.beat(phase, ended=True)


def alive() -> None:
    """This rank has come on inside its phase."""
    pulse = _mine()
    if pulse is not None:
        pulse.beat(pulse.phase, ended=True)


@contextlib.contextmanager
def during(phase: Phase) -> Iterator[None]:
    """Some or all ranks do something that has a patience of its own; then they go on with what they were at."""
    pulse = _mine()
    if pulse is None:
        yield
        return
    before = pulse.phase
    pulse.beat(phase, ended=False)
    try:
        yield
    finally:
        pulse.beat(before, ended=True)


def enter(phase: Phase) -> None:
    """This rank goes on to `phase`; for places that not all ranks pass."""
    pulse = _mine()
    if pulse is not None:
        pulse.beat(phase, ended=True)


def _mine() -> _Pulse | None:
    """Only the main thread's progress counts: others go on while it stands still."""
    return _pulse if _pulse is not None and threading.get_ident() == _pulse.thread else None


def _write(memory: mmap.mmap, number: int, at: int, marks: int, step: int, phase: Phase, pace: int) -> None:
    _LAYOUT.pack_into(memory, 0, number, at, marks, step, phase, pace)


def _anonymous(name: str) -> int:
    """An open file without a name, in memory where the system has that."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
