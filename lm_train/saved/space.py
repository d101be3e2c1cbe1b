"""Whether a checkpoint fits on its disk, and what to do where it does not."""

from __future__ import annotations

import os
from pathlib import Path

from lm_train.errors import OutputError
from lm_train.saved.places import checkpoints_in

SPARE_BYTES = 1 << 20
"""For the small files of a run beside its checkpoints, and what a file system keeps to itself."""


def size_of(n_bytes: float) -> str:
    """`12.3 MB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes / 1e3:.0f} kB"


def check_space(folder: Path, n_bytes: int, n_files: int, what: str) -> None:
    """That so much fits where `folder` will be; a quota is not seen here, and shows when it is met.

    Args:
        folder: of the checkpoints; need not exist yet.
        n_bytes: to be written.
        n_files: to be made, folders included.
        what: is to be written, for the message.

    Raises:
        OutputError: saying how much is missing, and what may go.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        disk = os.statvfs(place)
    except OSError:
        return  # whoever writes will see
    free = disk.f_bavail * disk.f_frsize
    if free < n_bytes + SPARE_BYTES:
        missing = n_bytes + SPARE_BYTES - free
        raise OutputError(
            f"{folder}: {what} need{'s' if what.startswith('a ') else ''} {size_of(n_bytes)}, {size_of(free)} are free; free "
            f"{size_of(missing)} there{_candidates(folder)}, or name another place with runs_dir=DIR"
        )
    if disk.f_files and disk.f_favail < n_files:
        raise OutputError(
            f"{folder}: {what} need{'s' if what.startswith('a ') else ''} {n_files} files, the file system has room for "
            f"{disk.f_favail} more; remove some there, or name another place with runs_dir=DIR"
        )


def disk_is_full(folder: Path) -> str:
    """What to tell where a write has met the end of the disk."""
    return f"the disk is full; free space there{_candidates(folder)}, or name another place with runs_dir=DIR"


def _candidates(folder: Path) -> str:
    """This run's older checkpoints, which a person may decide to give up."""
    older = sorted(checkpoints_in(folder)[1:], key=lambda path: path.name)
    if not older:
        return ""
    sizes = []
    for path in older[:4]:
        try:
            sizes.append(f"{path.name} {size_of(sum(file.stat().st_size for file in path.iterdir()))}")
        except OSError:
            continue
    return f" (older checkpoints of this run: {', '.join(sizes)})"
