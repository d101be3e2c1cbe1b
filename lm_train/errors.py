"""One family of errors, one exit code per kind of failure.

Every message is written for the person who typed the command: what is wrong, where, what was expected, what came,
and what to do next. The command line prints the message alone; tracebacks go to the run folder's ``errors/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """What a finished process says to the shell, the batch script and the scheduler."""

    DONE = 0
    """Finished, already finished, or the budget is reached."""
    USAGE = 2
    """Wrong command or recipe; nothing was started."""
    BAD_CHECKPOINT = 65
    BAD_DATA = 66
    """Bad data content, or a data source out of reach."""
    BUG = 70
    """A fault of our own (or of a library underneath)."""
    CANNOT_WRITE = 73
    REQUEUE = 75
    """Stopped early and worth starting again: preempted, or a rank was lost."""
    NO_PROGRESS = 76
    """Started again and again without coming on, or the same failure again: another start would be in vain."""
    INTERRUPTED = 130
    """Ctrl-C; the run was saved first."""


class LMTrainError(Exception):
    """Base of every error that is reported without a traceback."""

    exit_code = ExitCode.BUG


class UsageError(LMTrainError, ValueError):
    """A wrong command, recipe or plan: one or more problems, one line each, found before anything was started."""

    exit_code = ExitCode.USAGE

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(LMTrainError, ValueError):
    """Data whose content is wrong (file and row named), or a source that cannot be reached."""

    exit_code = ExitCode.BAD_DATA


class CheckpointError(LMTrainError, ValueError):
    """A checkpoint that is missing, damaged, or of another model."""

    exit_code = ExitCode.BAD_CHECKPOINT


class OutputError(LMTrainError, OSError):
    """A folder or file that cannot be written."""

    exit_code = ExitCode.CANNOT_WRITE


class NoProgressError(LMTrainError):
    """A run that would fail again."""

    exit_code = ExitCode.NO_PROGRESS


class RollBack(LMTrainError):
    """All ranks agree to go on from the run's newest checkpoint, in new processes; the supervisor starts them."""

    exit_code = ExitCode.REQUEUE


class StopRequested(LMTrainError):
    """A signal arrived before the training loop could take it at a step boundary."""

    def __init__(self, exit_code: ExitCode) -> None:
        self.exit_code = exit_code
        super().__init__("stopped before the first step; nothing to save")
