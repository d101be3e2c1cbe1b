"""The starts of a run in `starts.jsonl`, and when another one would be in vain. Free of torch.

A start that ends early, or that is ended without a word (a node lost), is worth another one as long as the run comes on: its
newest checkpoint is another one than before. Without that, a poison step would be tried for ever. What a person changes in
the recipe, or the file's removal, begins the count anew.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from lm_train.errors import ExitCode, NoProgressError, OutputError
from lm_train.failures import Report
from lm_train.runs import RunFolder, read_jsonl, write_atomically

MOST_STOPS = 10
"""Starts in a row that a signal may end before they come on: being preempted is not the run's fault."""
_OUTSIDE = ("was ended by SIGKILL", "it is stopped (SIGSTOP)", "waited for rank")
"""Failures that come from outside: that two are alike means nothing."""


class Start(NamedTuple):
    """One start of the run, as the file tells it."""

    number: int
    step: int
    """Of the checkpoint that it began from; 0 without one."""
    changed: bool
    """Whether a person gave another recipe than before."""
    code: int | None = None
    """What it ended with; None: without a word."""
    reached: int = -1
    """Steps that the rank which failed had completed."""
    failure: str = ""
    """Of which rank what, where it did not end by a signal."""
    stopped: bool = False
    """A signal asked for its end."""

    @property
    def cause(self) -> str:
        """In words."""
        if self.failure:
            return self.failure
        if self.code is None:
            return "it ended without a word, as when its node is lost"
        return "a signal stopped it before it could save anything new" if self.stopped else f"exit code {self.code}"


def begin(folder: RunFolder, step: int, limit: int | None, changed: bool) -> Start:
    """Writes that a start begins.

    Args:
        step: of the checkpoint it goes on from; 0 without one.
        limit: the recipe's; None: any number.
        changed: whether the recipe is another one than before.

    Raises:
        NoProgressError: if the starts before were in vain.
        OutputError: if the file cannot be written.
    """
    before = read(folder)
    if not changed:
        _refuse(folder, before, step, limit)
    row = {"event": "began", "step": step, "changed": changed, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    start = Start(before[-1].number + 1 if before else 1, step, changed)
    _append(folder, start.number, row)
    return start


def end(folder: RunFolder, start: Start, code: int, failure: Report | None, step: int, limit: int | None) -> str | None:
    """Writes how a start ended.

    Args:
        failure: what ended it, where that was no signal.
        step: of the run's newest checkpoint now.

    Returns:
        Why another start would be in vain, or None.
    """
    told = (
        {"reached": failure.step, "failure": f"rank {failure.rank}: {failure.message}"} if failure is not None else {}
    )
    row: dict[str, Any] = {"event": "ended", "code": int(code), "saved": step, "stopped": failure is None, **told}
    with contextlib.suppress(OutputError):  # what matters is said anyway
        _append(folder, start.number, row)
    if code != ExitCode.REQUEUE:
        return None
    try:
        _refuse(folder, read(folder), step, limit)
    except NoProgressError as error:
        return str(error)
    return None


def read(folder: RunFolder) -> list[Start]:
    """All starts so far."""
    found: dict[int, Start] = {}
    for row in read_jsonl(folder.starts):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            number = int(row["start"])
            if row["event"] == "began":
                found[number] = Start(number, int(row["step"]), bool(row["changed"]))
            elif number in found:
                found[number] = found[number]._replace(
                    code=int(row["code"]),
                    reached=int(row.get("reached", -1)),
                    failure=str(row.get("failure", "")),
                    stopped=bool(row["stopped"]),
                )
    return list(found.values())


def in_vain(starts: Sequence[Start], step: int) -> list[Start]:
    """The last starts that all began where the run still stands and asked for another one, or ended without a word."""
    found: list[Start] = []
    for start in reversed(starts):
        if start.step != step or start.code not in (None, ExitCode.REQUEUE, ExitCode.INTERRUPTED):
            break
        if start.code != ExitCode.INTERRUPTED:  # somebody's will
            found.insert(0, start)
        if start.changed:
            break
    return found


def _refuse(folder: RunFolder, starts: Sequence[Start], step: int, limit: int | None) -> None:
    """Raises NoProgressError where another start would be in vain."""
    if limit is None:
        return
    vain = in_vain(starts, step)
    failed = [start for start in vain if not start.stopped]
    where = f"step {step}" if step else "the beginning"
    if len(failed) > 1 and _alike(failed[-1], failed[-2]):
        what = f"twice the same failure after step {failed[-1].reached}, from {where}"
    elif len(failed) > limit or len(vain) > max(MOST_STOPS, limit):
        what = f"{len(vain)} starts from {where} without a new checkpoint"
    else:
        return
    raise NoProgressError(
        f"{folder.root}: {what}; the last: {vain[-1].cause}. Not started again: mend the cause, then remove {folder.starts}, or "
        "give trainer.restarts_without_progress=null"
    )


def _alike(one: Start, other: Start) -> bool:
    """Whether two starts met the same failure at the same step, and one that the run itself brings about."""
    if not one.failure or one.reached < 0 or one.reached != other.reached:
        return False
    if any(words in one.failure and "out of memory" not in one.failure for words in _OUTSIDE):
        return False
    kinds = [re.sub(r"\d+(\.\d+)?", "N", start.failure.partition(";")[0]) for start in (one, other)]
    return kinds[0] == kinds[1]


def _append(folder: RunFolder, number: int, row: dict[str, Any]) -> None:
    """Rewrites the short file, so that a start is in it or not."""
    rows = [*read_jsonl(folder.starts), {"start": number, **row}]
    try:
        write_atomically(folder.starts, "".join(json.dumps(each) + "\n" for each in rows[-200:]))
    except OSError as error:
        raise OutputError(f"{folder.starts}: {error.strerror}") from None
