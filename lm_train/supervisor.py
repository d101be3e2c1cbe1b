"""Starts the ranks of one supervisor, forwards signals, watches them, and finds out who failed first. Free of torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from lm_train import signals
from lm_train.attempt import Attempt
from lm_train.budget import Spending
from lm_train.errors import ExitCode
from lm_train.failures import Report, describe_death, peak_memory, read_report, reports, times_out_of_memory
from lm_train.heartbeat import Board
from lm_train.interpreter import python
from lm_train.plan import Place, Plan
from lm_train.redaction import redacted
from lm_train.runs import RunFolder
from lm_train.slurm import TimeLimit
from lm_train.watchdog import Sight, Watchdog, in_words

GRACE_S = 3.5
"""How long the other ranks may take to notice that one died before they are killed; with `LOOK_S` it makes less than 5 s."""
CAUSE_S = 5.0
"""How long a supervisor whose ranks were only cut off waits for another one to tell the cause."""
LOOK_S = 0.5
"""How often the reports of other supervisors' ranks are looked for, and the own ranks' heartbeats."""
KILL_S = 5.0
"""How long a killed rank may take to be gone; one that waits for a file server may never be, and is left to the kernel."""
_GOOD = (ExitCode.DONE, ExitCode.REQUEUE, ExitCode.INTERRUPTED, signals.ROLL_BACK)
"""What a rank that stands with the others at a step boundary ends with."""


class Supervisor:
    """Runs the ranks of `places`. `stop` may be called from a signal handler at any time.

    Args:
        folder: of the run.
        plan: of all ranks.
        places: the ranks of this supervisor.
        node_name: for messages.
        spending: of this start, where this supervisor counts it; when it is over, the ranks are ended by force.
        hang_timeout_s: after which a rank without progress is given up; None: never.
        time_limit: of the Slurm job, where this supervisor minds it.
    """

    def __init__(
        self,
        folder: RunFolder,
        plan: Plan,
        places: Sequence[Place],
        node_name: str,
        spending: Spending | None = None,
        hang_timeout_s: float | None = None,
        time_limit: TimeLimit | None = None,
    ) -> None:
        self.folder, self.plan, self.places, self.node_name, self.spending = folder, plan, places, node_name, spending
        self.hang_timeout_s, self.time_limit = hang_timeout_s, time_limit
        self.alone = len(places) == plan.world_size
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.boards: list[Board] = []
        self.stopping: signal.Signals | None = None
        self.at_once = False
        self.at_limit = False
        """The budget was used up before the ranks had ended."""
        self._held_bytes = [0] * len(places)
        self._out_of_memory = times_out_of_memory()

    def run(self, attempt: Attempt, checkpoint: Path | None) -> tuple[int, Report | None]:
        """Runs the ranks to their end; may be called again when they have asked for it with `signals.ROLL_BACK`.

        Returns:
            The exit code; and the failure that is this supervisor's to tell, if there was one.
        """
        self.ranks, self.boards = [], [Board() for _ in self.places]
        watchdog = self._watchdog(attempt)
        try:
            for place in self.places:
                with signals.blocked():  # until the rank listens; here, until it is in the list
                    self.ranks.append(self._start(place, self.boards[len(self.ranks)], attempt, checkpoint))
                if self.stopping and len(self.ranks) < len(self.places):
                    return self._stopped(_code_of(self.stopping)), None  # the ranks so far would wait for the others
                if self.stopping:  # this one did not live yet when the signal came
                    self.ranks[-1].send_signal(self.stopping)
            failure = self._watch(watchdog)
        finally:
            self._kill()
            for board in self.boards:
                board.close()
        if self.at_once:
            return self._stopped(_code_of(signal.SIGINT)), None
        if self.at_limit:
            return self._stopped(ExitCode.DONE), None
        outside = [rank.returncode for rank in self.ranks if _stopped_outside(rank.returncode)]
        if outside:
            return self._stopped(max(map(_meaning, outside))), None
        if not self.alone and (failure is None or failure.is_cut_off):
            other = self._cause_elsewhere(failure)
            if other is not None:
                return other.exit_code, None
            if failure is not None:
                lost = f"lost the other ranks, of whose end nothing is known ({failure.message})"
                failure = failure._replace(exit_code=ExitCode.REQUEUE, message=lost)
        if failure is not None:
            return failure.exit_code, failure
        return max(_meaning(rank.returncode) for rank in self.ranks), None

    def _start(self, place: Place, board: Board, attempt: Attempt, checkpoint: Path | None) -> subprocess.Popen[bytes]:
        """Starts one rank in a process group of its own, so that a terminal's Ctrl-C reaches the supervisor alone."""
        environment = {
            **os.environ,
            **board.variable,
            **(self.spending.variable if self.spending is not None else {}),
            "LM_TRAIN_ATTEMPT": str(attempt.folder.resolve()),
            "RANK": str(place.rank),
            "LOCAL_RANK": str(place.local_rank),
            "NODE_RANK": str(place.node_rank),
            "WORLD_SIZE": str(self.plan.world_size),
            "LOCAL_WORLD_SIZE": str(place.local_world_size),
            "KINETO_LOG_LEVEL": os.environ.get("KINETO_LOG_LEVEL", "9"),  # the profiler's remarks about itself
            # threads that spin while they wait make a step many times slower as soon as anything else wants a core
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self.plan.threads_per_rank)),
        }
        command = [
            *python(),
            "-m",
            "lm_train.rank",
            str(self.folder.root),
            *([str(checkpoint)] if checkpoint else []),
        ]
        with contextlib.ExitStack() as stack:
            log = None if place.rank == 0 else stack.enter_context(self._log_of(place.rank).open("wb"))
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
                pass_fds=board.inherited,
            )

    def _log_of(self, rank: int) -> Path:
        """Where a rank's output goes that nobody sees; rank 0's goes to the terminal."""
        return self.folder.errors / f"rank-{rank}.log"

    def _watchdog(self, attempt: Attempt) -> Watchdog:
        prediction = self.plan.prediction
        return Watchdog(
            [place.rank for place in self.places],
            self.boards,
            self.hang_timeout_s,
            self.plan.world_size,
            attempt.folder,
            0.0 if prediction is None else prediction.checkpoint_seconds.high,
        )

    def _watch(self, watchdog: Watchdog) -> Report | None:
        """Waits for all ranks; when one ends badly, here or elsewhere, gives the others a moment.

        Returns:
            The failure among the ranks of this supervisor that stands nearest to the cause.
        """
        deadline = float("inf")
        look = beat = 0.0
        together = (None, *_GOOD)
        while any(rank.poll() is None for rank in self.ranks) and not self.at_once:
            now = time.monotonic()
            if self.spending is not None:
                self.spending.tick()
                if self.spending.is_over:
                    self.at_limit = True
                    return None
            if self.time_limit is not None and not self.stopping and self.time_limit.is_near():
                say("lm-train: the job's time limit is near: stopping at the next step boundary and saving")
                self.stop(signal.SIGUSR1, None)
            if now > beat and deadline == float("inf") and len(self.ranks) == len(self.places):
                beat = now + LOOK_S
                sights = watchdog.look(self._pids())
                if sights:
                    return self._hang(watchdog, sights)
            if deadline == float("inf"):
                bad = any(rank.returncode not in together for rank in self.ranks)
                if not bad and not self.alone and now > look:
                    reports, look = self._reports_elsewhere(), now + LOOK_S
                    if any(report.stopped and report.exit_code == ExitCode.DONE for report in reports):
                        return None  # the budget is used up: nothing is held any longer
                    bad = bool(reports)
                if bad:
                    self._first_failure()  # tells the other supervisors
                    deadline = now + GRACE_S
            if now > deadline:
                break
            time.sleep(0.02)
        # a rank that a signal stopped outside the loop may have cut the others off
        return None if any(_stopped_outside(rank.returncode) for rank in self.ranks) else self._first_failure()

    def _first_failure(self) -> Report | None:
        """The cause among the ranks that ended badly: the one that wrote its own error rather than one that was cut off."""
        failures = []
        for index, (place, rank) in enumerate(zip(self.places, self.ranks, strict=False)):
            if rank.returncode in (None, *_GOOD):
                continue
            if _stopped_outside(rank.returncode):
                self._stopped(_meaning(rank.returncode))
                continue
            board = self.boards[index]
            report = read_report(self.folder, place.rank)
            if report is None:
                held, out = self._held_bytes[index], times_out_of_memory() > self._out_of_memory
                report = describe_death(place.rank, rank.returncode, board.read(), board.stacks(), held, out)
                report.write(self.folder)
                self._keep_stacks(index)
            elif not report.phase and board.read().step >= 0:
                report = report.at(board.read())
            failures.append((0 if rank.returncode < 0 else 2 if report.is_cut_off else 1, report))
        return min(failures)[1] if failures else None

    def _pids(self) -> list[int | None]:
        """Of the ranks that still run; looks at what they hold, for the case that the kernel ends them for it."""
        pids = [rank.pid if rank.poll() is None else None for rank in self.ranks]
        for index, pid in enumerate(pids):
            if pid is not None:
                self._held_bytes[index] = max(peak_memory(pid), self._held_bytes[index])
        return pids

    def _hang(self, watchdog: Watchdog, sights: Sequence[Sight]) -> Report:
        """The report of the rank that hangs, if it is one of this supervisor's, else of one that waits for it."""
        own = watchdog.stacks(self._pids(), on_cpu=self.plan.accelerator == "cpu")
        for index in range(len(self.ranks)):
            self._keep_stacks(index)
        guilty = watchdog.judge(own) or list(sights)
        mine = [sight for sight in guilty if any(sight.rank == place.rank for place in self.places)]
        if mine:
            message = f"{in_words(mine[0], guilty)}; stacks of all ranks: {self.folder.errors}/rank-*.stack"
            report = Report(mine[0].rank, ExitCode.REQUEUE, message, step=mine[0].step, phase=mine[0].phase)
            report.write(self.folder)
            return report
        waited = f"waited for rank {guilty[0].rank}, which hangs"
        return Report(own[0].rank, ExitCode.REQUEUE, waited, step=own[0].step, phase=own[0].phase, waited=True)

    def _keep_stacks(self, index: int) -> None:
        text = self.boards[index].stacks()
        if text:
            with contextlib.suppress(OSError):
                file = self.folder.errors / f"rank-{self.places[index].rank}.stack"
                file.write_text(text, encoding="utf-8")

    def _stopped(self, code: int) -> int:
        """Tells the other supervisors that ranks were stopped where they do not agree."""
        if not self.alone:
            Report(self.places[0].rank, code, "stopped", stopped=True).write(self.folder)
        return code

    def _cause_elsewhere(self, own: Report | None) -> Report | None:
        """What ranks of other supervisors died of, if that explains what happened here, once it has been told there."""
        if own is None and not self._reports_elsewhere():
            return None
        causes: list[Report] = []

        def found() -> bool:
            causes[:] = [report for report in self._reports_elsewhere() if not report.is_cut_off]
            return bool(causes)

        if not within(CAUSE_S, found):
            if own is not None:
                return None
            causes = self._reports_elsewhere()
        if not causes[0].stopped:
            # its supervisor tells it; a task that leaves earlier with an error may have Slurm kill that one
            within(GRACE_S + CAUSE_S, self.folder.exit_code.exists)
        return causes[0]

    def _reports_elsewhere(self) -> list[Report]:
        own = {place.rank for place in self.places}
        return [report for report in reports(self.folder) if report.rank not in own]

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Asks all ranks to stop at a step boundary; a second Ctrl-C kills them."""
        asked = signal.Signals(number)
        if asked == signal.SIGINT and self.stopping == signal.SIGINT:
            self.at_once = True  # the watching loop kills: Popen's lock may be held by what this handler interrupted
            return
        if asked == signal.SIGINT and self.places[0].rank == 0:
            os.write(2, b"\nstopping at the next step boundary and saving; Ctrl-C again to stop at once\n")
        self.stopping = asked
        for rank in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.send_signal(asked)

    def _kill(self) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                rank.kill()
        deadline = time.monotonic() + KILL_S
        for rank in self.ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(max(0.0, deadline - time.monotonic()))

    def tell(self, failure: Report, debug: bool) -> None:
        """Prints a failure for the person who waits."""
        ours = failure.exit_code not in (ExitCode.BUG, ExitCode.REQUEUE)
        head = "" if ours else f"rank {failure.rank} on {self.node_name}{failure.place}: "
        trace = self.folder.errors / f"rank-{failure.rank}.traceback"
        if debug and trace.exists():
            say(trace.read_text(encoding="utf-8"))
        say(f"lm-train: {head}{failure.message}")
        if failure.exit_code == ExitCode.BUG and not debug:
            say(
                f"lm-train: traceback and logs of all ranks: {self.folder.errors}; debug=true prints the traceback here"
            )


@contextlib.contextmanager
def signals_forwarded(supervisor: Supervisor) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 of this process go to the ranks."""
    before = {number: signal.signal(number, supervisor.stop) for number in signals.HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    print(redacted(text), file=sys.stderr, flush=True)


def within(seconds: float, so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _stopped_outside(status: int | None) -> bool:
    return status in (signals.OUTSIDE_THE_LOOP + ExitCode.REQUEUE, signals.OUTSIDE_THE_LOOP + ExitCode.INTERRUPTED)


def _meaning(status: int) -> int:
    """The run's exit code as one rank has it; a rank that was killed while another stopped adds nothing."""
    if _stopped_outside(status):
        return status - signals.OUTSIDE_THE_LOOP
    return status if status in _GOOD else ExitCode.DONE


def _code_of(number: signal.Signals) -> ExitCode:
    return ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.REQUEUE
