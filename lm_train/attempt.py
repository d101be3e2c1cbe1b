"""How the supervisors of one start find one another: a small folder inside the run folder. Free of torch.

    RUN/.start/JOB.STEP.RESTART-RANDOM/
      word.json   the primary's word: go on (with the checkpoint to resume), or end with this exit code
      task-N      made by each other supervisor as it takes the word; no task can take the same word twice
      address     where rank 0 waits for the other ranks

The folder's name holds the job, its step and how often it was requeued, so that the word of an earlier start is never taken.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from lm_train.errors import ExitCode, LMTrainError, OutputError, UsageError
from lm_train.runs import LEAVING_S, RunFolder, write_atomically
from lm_train.slurm import Allocation

JOIN_TIMEOUT_S = 60.0
"""How long a supervisor waits for the primary's word; what the primary does before takes a second or two."""
WRONG_S = 10.0
"""How long a task that finds the command wrong leaves it to the primary to say so: with `--kill-on-bad-exit` the first task
that ends with an error ends the others."""
POLL_S = 0.1


class NotJoined(LMTrainError):
    """The primary's word did not come."""

    exit_code = ExitCode.CANNOT_WRITE


class Attempt:
    """The folder of one start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = folder / "address"

    def word(self) -> tuple[int | None, Path | None]:
        """The exit code to end with at once, or None; and the checkpoint to go on from, or None."""
        content = json.loads((self.folder / "word.json").read_text(encoding="utf-8"))
        checkpoint = content["checkpoint"]
        return content["exit_code"], Path(checkpoint) if checkpoint else None


def publish(
    run: RunFolder,
    allocation: Allocation | None,
    checkpoint: Path | None = None,
    exit_code: int | None = None,
) -> Attempt:
    """The primary's word to all other supervisors, which may read it as soon as it is there.

    Raises:
        OutputError: if the run folder cannot be written to.
    """
    key = allocation.attempt if allocation is not None else "local"
    starts = run.root / ".start"
    partial = starts / f".{secrets.token_hex(4)}"
    try:
        if exit_code is None:
            shutil.rmtree(starts, ignore_errors=True)
        partial.mkdir(parents=True)
        word = {"exit_code": exit_code, "checkpoint": str(checkpoint) if checkpoint else None}
        write_atomically(partial / "word.json", json.dumps(word) + "\n")
        return Attempt(partial.rename(starts / f"{key}-{secrets.token_hex(4)}"))
    except OSError as error:
        raise OutputError(f"cannot write {error.filename or starts}: {error.strerror}") from None


def join(run: RunFolder, allocation: Allocation, timeout_s: float | None = None) -> Attempt:
    """Waits for the primary's word and takes it.

    Args:
        timeout_s: seconds; None: `LM_TRAIN_MEETING_TIMEOUT`, else a minute, and after a requeue what the primary may wait
            for its earlier start.

    Raises:
        NotJoined: if it does not come.
    """
    if timeout_s is None:
        timeout_s = meeting_timeout() + (LEAVING_S if allocation.restart_count else 0)
    deadline = time.monotonic() + timeout_s
    mine = f"task-{allocation.node_rank}-{allocation.local_task}"
    while time.monotonic() < deadline:
        for folder in (run.root / ".start").glob(f"{allocation.attempt}-*"):
            try:
                os.close(os.open(folder / mine, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                return Attempt(folder)
            except OSError:  # taken in an earlier start of the same step, or cleared away at this moment
                continue
        time.sleep(POLL_S)
    raise NotJoined(
        f"{allocation.node_name} saw no start of {run.root} within {timeout_s:g} s; runs_dir={run.root.parent} must be on a "
        "file system that all nodes share, and its first node may have ended (see above)"
    )


def goes_on_without(words: Sequence[str], allocation: Allocation, timeout_s: float = WRONG_S) -> bool:
    """Whether the primary has started with the command that this task finds wrong, as when a file is missing on its node.

    The recipe is not known here, so the start is looked for in all runs of the folder that the words name.
    """
    runs_dir = next((word.partition("=")[2] for word in words if word.startswith("runs_dir=")), "runs")
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for folder in Path(runs_dir).glob(f"*/.start/{allocation.attempt}-*"):
            return Attempt(folder).word()[0] is None
        time.sleep(5 * POLL_S)
    return False


def meeting_timeout() -> float:
    """Seconds that supervisors and ranks wait for one another at the start."""
    text = os.environ.get("LM_TRAIN_MEETING_TIMEOUT") or str(JOIN_TIMEOUT_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UsageError(f"LM_TRAIN_MEETING_TIMEOUT={text[:80]!r}: expected seconds, such as 60")
    return seconds
