"""Finds ranks that stand still, from outside their processes, and which of them holds the others up. Free of torch.

A rank is silent since its last beat (`lm_train.heartbeat`). How long it may be depends on what it is at: parts that take
their own time (loading, compiling, saving) have a multiple of `trainer.hang_timeout_s`; steps and evaluation batches have
that time, or a multiple of what they took lately, where that is longer. Only time counts in which this process ran as well:
a machine that sleeps, or a job that Slurm has suspended, is nobody's fault.

One rank that stands still makes all others wait. So a rank is at fault only if none has come less far than it, and the
Python stacks decide among those that stand at the same place.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lm_train.failures import frames, innermost
from lm_train.heartbeat import STACK_SIGNAL, Board, Phase
from lm_train.runs import write_atomically

MARGIN_S = 4.0
"""So much before its time a hang is looked into, at most a sixth of the time: stacks are asked for, other nodes heard."""
OWN_TIME = {
    Phase.START: 20, Phase.MEET: 20, Phase.PREPARE: 20, Phase.BUILD: 20, Phase.RESTORE: 20, Phase.COMPILE: 20,
    Phase.EVALUATE: 10, Phase.SAVE: 20, Phase.SAMPLE: 10, Phase.FINISH: 20, Phase.WAIT: 20,
}  # fmt: skip
"""Patience with phases of no known pace, in multiples of the time-out: 10 minutes and 5 at the default of 30 s."""
FIRST_TIME = 10
"""The same for the first batch of a phase, in which libraries load and memory is first touched."""
PACES = 4.0
"""Patience with a phase, in multiples of the longest batch lately."""
TICK_S = 0.6
"""Longest time between two looks that counts: more, and this process did not run either."""
ANSWER_S = 5.0
"""How long the supervisors of a run wait for one another's view."""
DUMP_S = 1.5
_WAITING = ("torch/distributed/", "deepspeed/comm/", "fabric/utilities/distributed")
"""Files of frames that wait for other ranks."""
_BACKWARD = "_engine_run_backward"
"""Where a backward pass does its work, and waits for the gradients of other ranks."""


class Sight(NamedTuple):
    """What can be seen of a rank from outside."""

    rank: int
    phase: str
    step: int
    """Optimizer steps completed."""
    marks: int
    """Places passed since."""
    silent: float
    """Seconds without a beat, as far as this process ran meanwhile."""
    patience: float
    state: str = "S"
    """The kernel's letter: R runs, S sleeps, D waits for a disk, T is stopped."""
    where: str = ""
    """Innermost Python frames, once they are known."""
    waits: bool = False
    """Whether these wait for other ranks."""
    stopped_child: int | None = None
    """A process that it has started and that a signal has halted: of a loader, say, in the midst of handing over a batch."""

    @property
    def progress(self) -> tuple[int, int]:
        return self.step, self.marks


def stands_still(sights: Sequence[Sight], limit: float) -> bool:
    """Whether the run hangs, and does not only wait for a rank that takes its own time.

    Args:
        sights: of all ranks that still run.
        limit: seconds that a stopped process may be silent, whatever it is at.
    """
    if any(sight.state == "T" and sight.silent > limit for sight in sights):
        return True
    least = min((sight.progress for sight in sights), default=(0, 0))
    behind = [sight for sight in sights if sight.progress == least]
    overdue = [sight for sight in behind if sight.silent > sight.patience]
    if not overdue:
        return False
    shortest = min(sight.patience for sight in overdue)
    return not any(sight not in overdue and sight.patience > shortest for sight in behind)


def at_fault(sights: Sequence[Sight], limit: float) -> list[Sight]:
    """The ranks for whose sake a run stands still, the first cause first; several where they wait for one another.

    Args:
        sights: of all ranks that still run, with their stacks.
        limit: as above.
    """
    stopped = [sight for sight in sights if sight.state == "T" and sight.silent > limit]
    if stopped:
        return stopped
    silent = [sight for sight in sights if sight.silent > min(limit, sight.patience)]
    idle = sorted((sight for sight in silent if not sight.waits), key=lambda sight: sight.progress)
    if idle:
        return [sight for sight in idle if sight.progress == idle[0].progress]
    places = Counter(sight.progress for sight in silent)  # all wait: the odd one out has left a collective out
    rarest = min(places.values(), default=0)
    odd = [sight for sight in silent if places[sight.progress] == rarest]
    return odd if len(odd) < len(silent) else silent


class Watchdog:
    """Watches the ranks of one supervisor.

    Args:
        ranks: their numbers.
        boards: theirs, in the same order.
        timeout_s: the recipe's; None: nobody is ever found to hang.
        world_size: ranks of the whole run.
        meeting: folder in which the supervisors of several tasks exchange what they see.
        save_seconds: what a checkpoint is predicted to take at the longest.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        boards: Sequence[Board],
        timeout_s: float | None,
        world_size: int,
        meeting: Path,
        save_seconds: float = 0.0,
    ) -> None:
        self.ranks, self.boards, self.timeout_s, self.world_size = ranks, boards, timeout_s, world_size
        self.meeting, self.save_seconds = meeting, save_seconds
        self.alone = len(ranks) == world_size
        self.limit = float("inf") if timeout_s is None else timeout_s - min(MARGIN_S, timeout_s / 6)
        self._silent = [0.0] * len(ranks)
        self._beats = [board.read().at for board in boards]
        self._looked: float | None = None
        self._posted = False
        self._heard: dict[str, tuple[str, float]] = {}
        self._since: float | None = None

    def look(self, pids: Sequence[int | None]) -> list[Sight]:
        """What all ranks are at, those of other supervisors where these have told, if the run hangs; else nothing.

        Args:
            pids: of the ranks that still run, None in place of the others.
        """
        if self.timeout_s is None:
            return []
        now = time.monotonic()
        passed = min(now - self._looked, TICK_S) if self._looked is not None else 0.0
        self._looked = now
        for index, board in enumerate(self.boards):
            at = board.read().at
            self._silent[index] = self._silent[index] + passed if at == self._beats[index] else 0.0
            self._beats[index] = at
        asking = max(self._silent, default=0.0) > self.limit / 2
        if self.alone and not asking:
            return []
        sights = self.sights(pids)
        everyone = sights if self.alone else [*sights, *self._elsewhere(sights, asking)]
        if not stands_still(everyone, self.limit):
            self._since = None
            return []
        self._since = self._since or now
        if len(everyone) < self.world_size and now - self._since < ANSWER_S and not self.alone:
            return []  # who has not answered yet
        return everyone

    def sights(self, pids: Sequence[int | None]) -> list[Sight]:
        """Of the own ranks that still run."""
        found = []
        for rank, board, silent, pid in zip(self.ranks, self.boards, self._silent, pids, strict=True):
            if pid is not None:
                beat, (state, excused) = board.read(), _state_of(pid)
                quiet = 0.0 if excused else silent
                patience = self._patience(beat.phase, beat.pace)
                found.append(Sight(rank, beat.phase.in_words, beat.step, beat.marks, quiet, patience, state))
        return found

    def _patience(self, phase: Phase, pace: float) -> float:
        assert self.timeout_s is not None
        if phase in OWN_TIME:
            longer = PACES * self.save_seconds if phase is Phase.SAVE else 0.0
            return max(OWN_TIME[phase] * self.timeout_s, longer)
        return max(self.limit, PACES * pace) if pace else FIRST_TIME * self.timeout_s

    def judge(self, own: Sequence[Sight]) -> list[Sight]:
        """The ranks at fault, once all supervisors have told what the stacks of theirs say."""
        everyone = list(own)
        deadline = time.monotonic() + ANSWER_S
        while not self.alone and time.monotonic() < deadline:
            everyone = [*own, *self._elsewhere(own, asking=True)]
            if len(everyone) == self.world_size and all(sight.where or sight.state in "TD" for sight in everyone):
                break
            time.sleep(0.2)
        return at_fault(everyone, self.limit)

    def _elsewhere(self, own: Sequence[Sight], asking: bool) -> list[Sight]:
        """What other supervisors see; tells them what this one sees while one of them, or this one, has a silent rank."""
        found: list[Sight] = []
        asked, now = False, time.monotonic()
        mine = f"sight-{self.ranks[0]}.json"
        for file in self.meeting.glob("sight-*.json"):
            if file.name == mine:
                continue
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                text = file.read_text(encoding="utf-8")
                before = self._heard.get(file.name)
                if before is None or before[0] != text:
                    self._heard[file.name] = (text, now)
                if now - self._heard[file.name][1] < ANSWER_S:
                    content = json.loads(text)
                    asked |= content["asks"]
                    found += [Sight(**sight) for sight in content["sights"]]
        if asking or asked or self._posted:
            self.tell(own, asking)
            self._posted = asking or asked
        return found

    def tell(self, sights: Sequence[Sight], asks: bool) -> None:
        """Lets the other supervisors see what this one sees; `at` makes each text another one."""
        content = {"asks": asks, "at": time.monotonic(), "sights": [sight._asdict() for sight in sights]}
        with contextlib.suppress(OSError):
            write_atomically(self.meeting / f"sight-{self.ranks[0]}.json", json.dumps(content))

    def stacks(self, pids: Sequence[int | None], on_cpu: bool) -> list[Sight]:
        """Asks the own ranks for their Python stacks, stopped ones included, and reads them.

        Args:
            on_cpu: a rank that uses the processor does not wait for others, as it may with GPUs.
        """
        sights = self.sights(pids)
        asked = []
        for board, pid in zip(self.boards, pids, strict=True):
            if pid is not None and board.read().dumps:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, STACK_SIGNAL)
                    os.kill(pid, signal.SIGCONT)  # a stopped one takes the signal that waits as it goes on
                    asked.append(board)
        deadline = time.monotonic() + DUMP_S
        while time.monotonic() < deadline and not all(board.stacks().count("thread") for board in asked):
            time.sleep(0.05)
        time.sleep(0.1)  # for the rest of what is being written
        texts = {rank: board.stacks() for rank, board in zip(self.ranks, self.boards, strict=True)}
        children = {rank: _stopped_child(pid) for rank, pid in zip(self.ranks, pids, strict=True) if pid is not None}
        return [
            sight._replace(
                where=innermost(texts[sight.rank]),
                waits=_waits(texts[sight.rank], sight, on_cpu),
                stopped_child=children.get(sight.rank),
            )
            for sight in sights
        ]


def in_words(sight: Sight, at_fault: Sequence[Sight]) -> str:
    """What is said of a rank that hangs.

    Args:
        at_fault: it, and those that hang as well.
    """
    facts = [f"hangs: no progress for {sight.silent:.0f} s"]
    if sight.state in "TD":
        facts.append({"T": "it is stopped (SIGSTOP)", "D": "it waits for a disk or file server"}[sight.state])
    elif sight.waits:
        facts.append("it waits for ranks that wait elsewhere" if len(at_fault) > 1 else "it left a collective out")
    if sight.stopped_child is not None:
        facts.append(f"its child (process {sight.stopped_child}) is stopped (SIGSTOP)")
    facts.append(f"at {sight.where}" if sight.where else "its Python stack could not be had")
    others = [f"rank {o.rank} after step {o.step} ({o.phase}) at {o.where}" for o in at_fault if o.rank != sight.rank]
    if others:
        facts.append(f"likewise {'; '.join(others[:3])}{' ...' if len(others) > 3 else ''}")
    return "; ".join(facts)


def _waits(stacks: str, sight: Sight, on_cpu: bool) -> bool:
    """Whether a rank waits for others, so that it is not the one that they wait for."""
    if sight.state in "TD" or (on_cpu and sight.state == "R"):
        return False
    found = frames(stacks)
    if not found:
        return False
    inner = found[0]
    return inner[2] == _BACKWARD or any(part in file for file, _, _ in found[:4] for part in _WAITING)


def _state_of(pid: int) -> tuple[str, bool]:
    """The kernel's letter for a process; and whether its silence is somebody's will: a debugger holds it, or whoever reads its
    output does not read on (proc(5))."""
    try:
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        )
        state, traced = fields["State"].split()[0], int(fields.get("TracerPid", "0")) != 0
    except (OSError, ValueError, KeyError, IndexError):
        return "S", False
    return state, traced or state == "t" or _writes_to_a_reader(pid)


def _stopped_child(pid: int) -> int | None:
    for file in Path(f"/proc/{pid}/task").glob("*/children"):  # each thread has its own
        with contextlib.suppress(OSError):  # the thread's end
            for child in map(int, file.read_text(encoding="ascii").split()):
                if _state_of(child)[0] == "T":
                    return child
    return None


def _writes_to_a_reader(pid: int) -> bool:
    """Whether it is inside of write(2) to its standard output or error: a terminal that is held (Ctrl-S), a full pipe."""
    with contextlib.suppress(OSError, IndexError):
        words = Path(f"/proc/{pid}/syscall").read_text(encoding="utf-8").split()
        return words[0] in ("1", "64") and words[1] in ("0x1", "0x2")  # write on x86-64, on arm64
    return False
