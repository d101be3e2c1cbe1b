"""The supervisor: plans once, makes the run folder, starts the ranks of this machine and watches them. Free of torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from lm_train import runs, signals
from lm_train.errors import ExitCode, OutputError, UsageError
from lm_train.hardware import this_machine
from lm_train.plan import Plan, make_plan
from lm_train.recipe import Recipe
from lm_train.runs import RunFolder

GRACE_S = 5.0
"""How long the other ranks may take to notice that one died before they are killed."""
_GOOD = (ExitCode.DONE, ExitCode.REQUEUE, ExitCode.INTERRUPTED)
"""What a rank that stands with the others at a step boundary ends with."""


class Failure(NamedTuple):
    """The rank that ended badly first, and what is known of it."""

    rank: int
    code: int
    message: str


def train(recipe: Recipe) -> int:
    """Trains as the recipe says, on this machine.

    Returns:
        The exit code of the run; see `ExitCode`.

    Raises:
        LMTrainError: if it cannot be started.
    """
    plan = make_plan(recipe, this_machine())
    earlier = runs.existing(recipe)
    if earlier is not None and recipe.resume == "auto" and runs.is_finished(recipe, earlier):
        _say(
            f"{earlier.root} is finished already; give another name= to train anew, or a larger trainer.max_steps to go on"
        )
        print(earlier.root)
        return ExitCode.DONE
    checkpoint = runs.checkpoint_to_resume(recipe, earlier)
    step = runs.check_resumable(checkpoint, recipe, plan) if checkpoint is not None else 0
    if step > plan.max_steps:
        raise UsageError(
            f"trainer.max_steps: {checkpoint} is at step {step} already, trainer.max_steps={plan.max_steps} lies before it; "
            f"give a larger one, or start a new run with another name="
        )
    if earlier is not None:
        for difference in runs.recipe_differences(earlier, recipe):
            _say(f"{earlier.root}: the recipe has changed: {difference}")
    folder = runs.create(recipe, plan)
    runs.cut_jsonl(folder.metrics, step)
    _say(f"run folder {folder.root}\nplan\n{plan.table()}")
    with _signals_forwarded(recipe.debug) as supervisor:
        code = supervisor.run(folder, plan, checkpoint)
    try:
        folder.write_outcome(code)
    except OutputError as error:
        _say(f"lm-train: {error}")
    if code in (ExitCode.REQUEUE, ExitCode.INTERRUPTED) and supervisor.stopping:
        saved = "stopped without saving" if supervisor.at_once else "stopped"
        _say(f"{saved}; go on with the same command and name={folder.name}")
    print(folder.root, flush=True)
    return code


class _Supervisor:
    """Starts and watches ranks. `stop` may be called from a signal handler at any time."""

    def __init__(self, debug: bool) -> None:
        self.debug = debug
        self.ranks: list[subprocess.Popen[bytes]] = []
        self._chosen_port: int | None = None
        self.stopping: signal.Signals | None = None
        self.at_once = False

    def run(self, folder: RunFolder, plan: Plan, checkpoint: Path | None) -> int:
        """Runs all ranks to their end and returns the run's exit code."""
        try:
            for rank in range(plan.world_size):
                with signals.blocked():  # until the rank listens; here, until it is in the list
                    self.ranks.append(_start(rank, plan, folder, checkpoint, self._port(plan)))
                if self.stopping and len(self.ranks) < plan.world_size:
                    return _code_of(self.stopping)  # the ranks so far would wait for the others
            failure = self._watch(folder)
        finally:
            self._kill()
        if self.at_once:
            return _code_of(signal.SIGINT)
        if failure is not None:
            _report(failure, folder, self.debug)
            return failure.code
        return max(_meaning(rank.returncode) for rank in self.ranks)

    def _port(self, plan: Plan) -> int:
        if self._chosen_port is None:
            self._chosen_port = _free_port() if plan.world_size > 1 else 0
        return self._chosen_port

    def _watch(self, folder: RunFolder) -> Failure | None:
        """Waits for all ranks; when one ends badly, gives the others a moment and ends them."""
        deadline = float("inf")
        together = (None, *_GOOD)
        while any(rank.poll() is None for rank in self.ranks) and not self.at_once:
            if deadline == float("inf") and any(rank.returncode not in together for rank in self.ranks):
                deadline = time.monotonic() + GRACE_S
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        # a rank that a signal stopped outside the loop may have cut the others off
        return None if any(_stopped_outside(rank.returncode) for rank in self.ranks) else self._first_failure(folder)

    def _first_failure(self, folder: RunFolder) -> Failure | None:
        """The cause among the ranks that ended badly: the one that wrote its own error rather than one that was cut off."""
        bad = [(i, rank.returncode) for i, rank in enumerate(self.ranks) if rank.returncode not in (None, *_GOOD)]
        failures = []
        for i, status in bad:
            reported = _read_error(folder, i)
            if status < 0:
                failures.append((0, Failure(i, ExitCode.REQUEUE, f"was ended by {signal.Signals(-status).name}")))
            elif reported is not None:
                cut_off = any(
                    words in reported["message"] for words in ("Connection closed", "Connection reset", "pair closure")
                )
                failures.append((2 if cut_off else 1, Failure(i, reported["exit_code"], reported["message"])))
            else:
                code = ExitCode(status) if status in list(ExitCode) else ExitCode.BUG
                failures.append((1, Failure(i, code, f"ended with exit code {status} and left no message")))
        return min(failures)[1] if failures else None

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Asks all ranks to stop at a step boundary; a second Ctrl-C kills them."""
        asked = signal.Signals(number)
        if asked == signal.SIGINT and self.stopping == signal.SIGINT:
            self.at_once = True  # the watching loop kills: Popen's lock may be held by what this handler interrupted
            return
        if asked == signal.SIGINT:
            os.write(2, b"\nstopping at the next step boundary and saving; Ctrl-C again to stop at once\n")
        self.stopping = asked
        self._signal(asked)

    def _signal(self, number: signal.Signals) -> None:
        for rank in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.send_signal(number)

    def _kill(self) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                rank.kill()
        for rank in self.ranks:
            rank.wait()


@contextlib.contextmanager
def _signals_forwarded(debug: bool) -> Iterator[_Supervisor]:
    supervisor = _Supervisor(debug)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, supervisor.stop) for number in numbers}
    try:
        yield supervisor
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(rank: int, plan: Plan, folder: RunFolder, checkpoint: Path | None, port: int) -> subprocess.Popen[bytes]:
    """Starts one rank in a process group of its own, so that a terminal's Ctrl-C reaches the supervisor alone."""
    environment = {
        **os.environ,
        "LM_TRAIN_STARTED": str(time.time()),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % plan.devices),
        "NODE_RANK": str(rank // plan.devices),
        "WORLD_SIZE": str(plan.world_size),
        "LOCAL_WORLD_SIZE": str(plan.devices),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "KINETO_LOG_LEVEL": os.environ.get("KINETO_LOG_LEVEL", "9"),  # the profiler's remarks about itself
        # threads that spin while they wait make a step many times slower as soon as anything else wants a core
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(plan.threads_per_rank)),
    }
    command = [sys.executable, "-m", "lm_train.rank", str(folder.root), *([str(checkpoint)] if checkpoint else [])]
    if rank == 0:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0)
    with (folder.errors / f"rank-{rank}.log").open("wb") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _stopped_outside(status: int | None) -> bool:
    return status in (signals.OUTSIDE_THE_LOOP + ExitCode.REQUEUE, signals.OUTSIDE_THE_LOOP + ExitCode.INTERRUPTED)


def _meaning(status: int) -> int:
    """The run's exit code as one rank has it; a rank that was killed while another stopped adds nothing."""
    if _stopped_outside(status):
        return status - signals.OUTSIDE_THE_LOOP
    return status if status in _GOOD else ExitCode.DONE


def _code_of(number: signal.Signals) -> ExitCode:
    return ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.REQUEUE


def _read_error(folder: RunFolder, rank: int) -> dict[str, Any] | None:
    try:
        return json.loads((folder.errors / f"rank-{rank}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _report(failure: Failure, folder: RunFolder, debug: bool) -> None:
    ours = failure.code not in (ExitCode.BUG, ExitCode.REQUEUE)
    head = "" if ours else f"rank {failure.rank} on {socket.gethostname()}: "
    trace = folder.errors / f"rank-{failure.rank}.traceback"
    if debug and trace.exists():
        _say(trace.read_text(encoding="utf-8"))
    _say(f"lm-train: {head}{failure.message}")
    if failure.code == ExitCode.BUG and not debug:
        _say(f"lm-train: traceback and logs of all ranks: {folder.errors}; debug=true prints the traceback here")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
