"""Names in a run's `checkpoints` folder, and the small files that point to one of them.

step-N/              published: complete from the instant that it has this name
latest, best         sealed JSON: {"checkpoint": "step-N", "step": N, ...}
.step-N.partial/     being written; whoever finds one and does not write it may remove it
.step-N.replaced/    what step-N was, while another takes its name on a file system that cannot exchange the two
.step-N.removed/     being removed
.latest.123          what a process was about to make the new `latest`
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lm_train.errors import CheckpointError
from lm_train.saved.durable import sync, write_atomically
from lm_train.saved.sealed import read_sealed, sealed

LATEST, BEST = "latest", "best"
_STEP = re.compile(r"step-(0|[1-9][0-9]{0,11})")
_HIDDEN = re.compile(rf"\.({_STEP.pattern})\.(partial|replaced|removed)")
_TORN = re.compile(rf"\.({LATEST}|{BEST})\.[0-9]+")


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name; -1 where the name is another one."""
    name = _HIDDEN.fullmatch(checkpoint.name)
    match = _STEP.fullmatch(name[1] if name else checkpoint.name)
    return int(match[1]) if match else -1


def hidden(checkpoint: Path, what: str) -> Path:
    """`.step-N.partial` and the like, beside `step-N`."""
    return checkpoint.with_name(f".{checkpoint.name}.{what}")


def checkpoints_in(folder: Path) -> list[Path]:
    """What was published in a run's `checkpoints` folder, the highest step first."""
    try:
        names = [path for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []
    found = {path.name: path for path in names if _STEP.fullmatch(path.name)}
    for path in names:
        match = _HIDDEN.fullmatch(path.name)
        if match and match[3] == "replaced":  # its successor was never put in place
            found.setdefault(match[1], path)
    return sorted(found.values(), key=step_of, reverse=True)


def leftovers(folder: Path) -> list[Path]:
    """What saves and removals that were cut off have left, and nobody needs."""
    try:
        names = [path for path in folder.iterdir() if _HIDDEN.fullmatch(path.name) or _TORN.fullmatch(path.name)]
    except OSError:
        return []
    needed = set(checkpoints_in(folder))
    return [path for path in names if path not in needed]


def point(folder: Path, name: str, checkpoint: Path, **more: Any) -> None:
    """Makes `latest` or `best` say this checkpoint.

    Raises:
        OSError: if it cannot be written; the old one stays.
    """
    write_atomically(folder / name, sealed({"checkpoint": checkpoint.name, "step": step_of(checkpoint), **more}))
    sync(folder)


def pointed(folder: Path, name: str) -> dict[str, Any] | None:
    """What `latest` or `best` says, with `step` and the name `checkpoint`; None where there is none.

    Raises:
        CheckpointError: if it is damaged.
    """
    try:
        content = read_sealed(folder / name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    checkpoint, step = content.get("checkpoint"), content.get("step")
    if not isinstance(checkpoint, str) or not _STEP.fullmatch(checkpoint) or checkpoint != f"step-{step}":
        raise CheckpointError(f"{folder / name}: expected the name of a checkpoint, found {str(checkpoint)[:80]!r}")
    return content
