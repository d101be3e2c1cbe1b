"""A fault inside a rank at a chosen beat of its heart: the beats come from the training's own progress.

    {"rank": 1, "beat": 217, "delay_us": 340, "signal": 9, "to": "self"}   after the rank's 217th beat
    {"rank": 0, "phase": "save", "step": 20, "nth": 1, "signal": 15, "to": [0, 1]}   at the first beat in that phase from step 20
    {"rank": 0, "phase": "save", "step": 20, "call": 7, "signal": 9}         from there on before the 7th call to the file system

    {"agree_every_s": 0.02}   the ranks ask one another so often whether to stop
    {"note": FILE}            made as a fault strikes
    {"spoil": [3, 7], "what": "nan", "rank": 1}   the loss of these steps; see tests/anomaly_cases.py
    {"flip": 30, "bit": 1234, "rank": 1}          a bit of a parameter, after this step

`to`: self, all (every rank), supervisor, or a list of ranks. A SIGKILL to itself after a delay is a timer of the kernel's, which
strikes wherever the process is at that moment; other delays are slept in the rank.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from lm_train import heartbeat
from lm_train.heartbeat import Phase

TRACE = "LM_CHAOS_TRACE"
"""A folder: each rank writes its beats there as it ends by itself, `rank-N.json`."""


def arm(faults: list[dict[str, Any]]) -> None:
    """Has the faults that are this rank's strike once each."""
    rank = int(os.environ["RANK"])
    waiting = [dict(fault) for fault in faults if "signal" in fault and fault.get("rank", rank) == rank]
    add_callbacks(faults, rank)
    for setting in faults:
        if "agree_every_s" in setting:
            from lm_train.callbacks.stopping import StopAgreement

            StopAgreement.__init__.__defaults__ = (setting["agree_every_s"],)
        if "note" in setting:
            for fault in waiting:
                fault["note"] = setting["note"]
    trace = os.environ.get(TRACE)
    if not waiting and trace is None:
        return
    original = heartbeat._Pulse.beat
    count = 0
    beats: list[tuple[int, str, float]] = []

    def beat(self: Any, phase: Phase, ended: bool) -> None:
        nonlocal count
        original(self, phase, ended)
        count += 1
        if trace is not None:
            beats.append((self.step, phase.in_words, time.monotonic()))
            if phase is Phase.FINISH:
                Path(trace, f"rank-{rank}.json").write_text(json.dumps(beats))
        for fault in list(waiting):
            if _is_due(fault, count, phase, self.step):
                waiting.remove(fault)
                if "call" in fault:
                    strike_before_call(fault)
                else:
                    strike(fault)

    heartbeat._Pulse.beat = beat  # type: ignore[method-assign]


def add_callbacks(faults: list[dict[str, Any]], rank: int) -> None:
    """Those of bad numbers, on the rank that they are for."""
    if not any("spoil" in fault or "flip" in fault for fault in faults):
        return
    from lm_train import train
    from tests.anomaly_cases import Spoil
    from tests.chaos.values import Flip

    callbacks: list[Any] = [Spoil(f["spoil"], f["what"], f["rank"]) for f in faults if "spoil" in f]
    callbacks += [Flip(f["flip"], f["bit"]) for f in faults if "flip" in f and f["rank"] == rank]
    inner = train.train
    train.train = lambda folder, resume_from=None: inner(folder, resume_from, callbacks)  # type: ignore[assignment]


def _is_due(fault: dict[str, Any], count: int, phase: Phase, step: int) -> bool:
    if "beat" in fault:
        return count >= fault["beat"]
    if phase.in_words != fault["phase"] or step < fault.get("step", -1):
        return False
    fault["nth"] = fault.get("nth", 1) - 1
    return fault["nth"] == 0


CALLS = ("open", "close", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


def strike_before_call(fault: dict[str, Any]) -> None:
    """From now on counts what this process asks of the file system through `os`, in whichever thread."""
    left = fault["call"]

    def counted(original: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                strike(fault)
            return original(*args, **options)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def strike(fault: dict[str, Any]) -> None:
    number, to, delay = fault["signal"], fault.get("to", "self"), fault.get("delay_us", 0)
    if "note" in fault:
        Path(fault["note"]).touch()
    if to == "self" and number == signal.SIGKILL:
        kill_me_after(delay)
        return
    time.sleep(delay / 1e6)
    supervisor = os.getppid()
    if to == "supervisor":
        os.kill(supervisor, number)
        return
    pids = [os.getpid()] if to == "self" else ranks_of(supervisor)
    if isinstance(to, list):
        pids = [pids[rank] for rank in to]
    for pid in sorted(pids, key=lambda pid: pid == os.getpid()):  # itself last
        os.kill(pid, number)


def ranks_of(supervisor: int) -> list[int]:
    """Process ids of the ranks, in their order: children, by the time they were started."""
    text = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text()
    return sorted(map(int, text.split()), key=lambda pid: (started(pid), pid))


def started(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


class _Event(ctypes.Structure):
    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("pad", ctypes.c_int * 12),
    ]


class _Times(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns")]


def kill_me_after(microseconds: int) -> None:
    """SIGKILL by a timer of the kernel's (timer_create(2)), which no code of this process can delay or notice."""
    if microseconds <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
    libc = ctypes.CDLL(None, use_errno=True)
    event, timer = _Event(signo=signal.SIGKILL, notify=0), ctypes.c_void_p()
    times = _Times(0, 0, microseconds // 1_000_000, microseconds % 1_000_000 * 1000)
    made = libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer))
    assert made == 0, os.strerror(ctypes.get_errno())
    assert libc.timer_settime(timer, 0, ctypes.byref(times), None) == 0
