"""Times calls so that other work on the machine shows as noise and not as the result."""

from __future__ import annotations

import statistics
import time
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


FULL = Patience(rounds=3, seconds=0.02, largest=1.0)
QUICK = Patience(rounds=1, seconds=0.004, largest=0.05)


def time_all(cases: Sequence[Case], patience: Patience, device: torch.device) -> None:
    """Round after round through all cases, so that a disturbance spoils one figure of several cases, not all of one.

    A round's figure is its fastest call on a CPU, where whatever else runs only ever adds; on a GPU the mean of calls that are
    queued one behind the other. Where several processes measure at once, they begin each case together.
    """
    for turn in range(patience.rounds):
        order = cases if turn % 2 == 0 else list(reversed(cases))
        for case in order:
            call = case.make()
            call()
            if dist.is_initialized():
                dist.barrier()
            case.rounds.append(_on_gpu(call, patience) if device.type == "cuda" else _on_cpu(call, patience))
            del call


def _on_cpu(call: Call, patience: Patience) -> float:
    fastest, began, calls = float("inf"), time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - began < patience.seconds:
        before = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - before)
        calls += 1
    return fastest


def _on_gpu(call: Call, patience: Patience) -> float:
    torch.cuda.synchronize()
    before = time.perf_counter()
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    each = (time.perf_counter() - before) / 3
    calls = max(3, min(2000, int(patience.seconds / max(each, 1e-6))))
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
