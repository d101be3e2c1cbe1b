"""The user's cache folder: where it is, whole-or-nothing writes, locks, and errors that say what to do about the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lm_train import signals
from lm_train.errors import OutputError


def cache_folder() -> Path:
    """What belongs to the user and not to a run: $XDG_CACHE_HOME/lm_train, by default ~/.cache/lm_train."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lm_train"


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turns what goes wrong while `file` is written into an OutputError."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        hint = "; the cache lies under $XDG_CACHE_HOME, set it to a place with room"
        raise OutputError(f"{file}: {why}{hint if file.is_relative_to(cache_folder()) else ''}") from None


def write_text(file: Path, text: str) -> None:
    """Writes a small file so that any other process sees all of it or nothing."""
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """Holds a lock file, waiting for it as long as it takes; the kernel frees it when its holder dies."""
    with writing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        opened = lock.open("a")
    with opened:
        while not _lock(opened.fileno(), lock):
            signals.check()
            time.sleep(0.05)
        yield


@contextmanager
def locked_if_free(lock: Path) -> Iterator[bool]:
    """Holds a lock file if nobody else does; yields whether it does."""
    with writing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        opened = lock.open("a")
    with opened:
        yield _lock(opened.fileno(), lock)


def _lock(descriptor: int, lock: Path) -> bool:
    with writing(lock):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
