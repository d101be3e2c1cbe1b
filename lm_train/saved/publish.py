"""The last steps of a save, by one process: a complete folder gets its name, `latest` follows, what is old goes."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from lm_train.errors import CheckpointError
from lm_train.saved.durable import sync
from lm_train.saved.places import BEST, LATEST, checkpoints_in, hidden, leftovers, point, pointed, step_of

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class Keeping(NamedTuple):
    """Which checkpoints stay."""

    last: int
    """So many of the newest."""
    every_n_steps: int | None = None
    """Those whose step is a multiple, for ever."""


def put_in_place(partial: Path, final: Path) -> None:
    """Gives a complete and synced folder its final name; one that has the name is never missed.

    Raises:
        OSError: if the file system refuses.
    """
    if final.exists():
        if not _exchanged(partial, final):
            old = hidden(final, "replaced")
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)  # found under that name by `checkpoints_in` until the next line
            partial.rename(final)
    else:
        partial.rename(final)
    sync(final.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges two names at once, where the system can (renameat2 of Linux, not on every file system)."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def remove_old(newest: Path, keeping: Keeping) -> list[Path]:
    """Removes what a run no longer keeps, after its newest checkpoint was published and is the latest.

    Those of a higher step lie on a way that the run has left, by going back to an earlier one: it will come by again.

    Returns:
        What was removed.
    """
    folder, step = newest.parent, step_of(newest)
    best = best_of(folder)
    if best is not None and best > step:
        (folder / BEST).unlink(missing_ok=True)
        best = None
    saved = checkpoints_in(folder)
    keep = set(kept([step_of(path) for path in saved], step, keeping, best))
    gone = [path for path in saved if step_of(path) not in keep]
    for old in gone:
        # renamed first: a removal that is cut off leaves nothing that looks like a damaged checkpoint
        removed = folder / f".step-{step_of(old)}.removed"
        shutil.rmtree(removed, ignore_errors=True)
        old.rename(removed)
    for path in leftovers(folder):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return gone


def kept(steps: Collection[int], latest: int, keeping: Keeping, best: int | None) -> dict[int, list[str]]:
    """Of these steps those that stay, each with its reasons: `latest`, `last`, `best`, `every`."""
    newest = sorted((step for step in steps if step <= latest), reverse=True)
    reasons: dict[int, list[str]] = {}
    for number, step in enumerate(newest):
        why = ["latest"] if step == latest else ["last"] if number < keeping.last else []
        if step == best:
            why.append("best")
        if keeping.every_n_steps is not None and step % keeping.every_n_steps == 0:
            why.append(f"every {keeping.every_n_steps}")
        if why:
            reasons[step] = why
    return reasons


def best_of(folder: Path) -> int | None:
    """The step that `best` points to; None where it points to none, or is damaged."""
    try:
        best = pointed(folder, BEST)
    except CheckpointError:
        return None
    return None if best is None else int(best["step"])


def make_latest(newest: Path) -> None:
    """A resume goes on from here, from now on."""
    point(newest.parent, LATEST, newest)
