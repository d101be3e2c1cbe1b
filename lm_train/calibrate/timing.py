"""Times calls so that other work on the machine shows as noise and not as the result."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

Call = Callable[[], object]


@dataclass
class Case:
    """One thing to time; its tensors exist only while it is timed."""

    name: str
    make: Callable[[], Call]
    """Gives what is called again and again."""
    copies: int = 1
    """How often it is made: as many sets of tensors are taken in turns, so that they do not stay in a cache."""
    collective: bool = False
    """All processes call it, and must do so equally often."""
    rounds: list[float] = field(default_factory=list)
    """Seconds of one call, a figure a round."""

    @property
    def seconds(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Of the rounds, relative to the median."""
        return (max(self.rounds) - min(self.rounds)) / self.seconds if len(self.rounds) > 1 else 0.0


@dataclass(frozen=True)
class Patience:
    """How long is measured."""

    rounds: int
    seconds: float
    """Of one case in one round, about."""
    largest: float
    """Work that a case may have, as a share of what a full calibration measures."""


FULL = Patience(rounds=2, seconds=0.006, largest=1.0)
ONCE = Patience(rounds=1, seconds=0.006, largest=1.0)
"""For the settings after the first, which has shown how noisy the machine is."""
HELD = 1 << 25
"""Bytes of results that stay alive: above the caches of a CPU, and as a network keeps them."""
QUICK = Patience(rounds=1, seconds=0.004, largest=0.05)


def time_all(cases: Sequence[Case], patience: Patience, device: torch.device) -> None:
    """Round after round through all cases, so that a disturbance spoils one figure of several cases, not all of one.

    A round's figure is the lower quartile of its calls on a CPU, where whatever else runs only ever adds; on a GPU the mean of
    calls that are queued one behind the other. On a CPU tensors are not found in the caches as they would be after a call with
    the same ones: several sets of inputs are taken in turns, and results stay alive. Where several processes measure at once,
    they begin each case together.
    """
    for turn in range(patience.rounds):
        order = cases if turn % 2 == 0 else list(reversed(cases))
        for case in order:
            calls = [case.make() for _ in range(case.copies if device.type == "cpu" else 1)]
            made = calls[0]()
            if dist.is_initialized():
                dist.barrier()
            if device.type == "cuda":
                case.rounds.append(_on_gpu(calls[0], patience, case.collective))
            elif case.collective:
                case.rounds.append(_together(calls[0], patience))
            else:
                case.rounds.append(_on_cpu(calls, patience, max(1, min(64, HELD // max(1, _size(made))))))
            del calls, made


def _on_cpu(calls: Sequence[Call], patience: Patience, held: int) -> float:
    """Of one call, with the last `held` results alive, as a network keeps them for its backward pass."""
    results: deque[object] = deque(maxlen=held)
    for call in calls:
        results.append(call())
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < 3 or time.perf_counter() - began < patience.seconds:
        call = calls[len(seconds) % len(calls)]
        before = time.perf_counter()
        results.append(call())
        seconds.append(time.perf_counter() - before)
    return sorted(seconds)[len(seconds) // 4]


def _together(call: Call, patience: Patience) -> float:
    """Of one call of a collective."""
    seconds = sorted(_seconds_of(call) for _ in range(_agreed(_seconds_of(call), patience)))
    return seconds[len(seconds) // 4]


def _seconds_of(call: Call) -> float:
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def _agreed(each: float, patience: Patience) -> int:
    """How often all processes call what takes one of them about `each` seconds."""
    slowest = torch.tensor(each, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return max(3, min(2000, int(patience.seconds / max(slowest.item(), 1e-6))))


def _size(made: object) -> int:
    """Bytes of the tensors that a call gave."""
    if isinstance(made, torch.Tensor):
        return made.nbytes
    return sum(map(_size, made)) if isinstance(made, tuple | list) else 0


def _on_gpu(call: Call, patience: Patience, collective: bool) -> float:
    torch.cuda.synchronize()
    before = time.perf_counter()
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    each = (time.perf_counter() - before) / 3
    calls = _agreed(each, patience) if collective else max(3, min(2000, int(patience.seconds / max(each, 1e-6))))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def warm_up(device: torch.device, seconds: float) -> None:
    """Brings the clock to where long work has it, and the libraries to where they have chosen their kernels."""
    x = torch.full((512, 512), 0.01, device=device)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize()
