"""Which checkpoint a run goes on from: the newest, or where that is damaged, the one before it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lm_train.errors import CheckpointError
from lm_train.saved.manifest import open_manifest, read_state
from lm_train.saved.places import LATEST, checkpoints_in, pointed, step_of


class Choice(NamedTuple):
    """What was found, and what was found wrong on the way, a line each."""

    checkpoint: Path | None
    skipped: list[str]


def newest_good(folder: Path, damaged: tuple[Path, CheckpointError] | None = None) -> Choice:
    """The newest checkpoint of a run as far as can be told without reading its tensors.

    Args:
        folder: the run's `checkpoints`.
        damaged: one that was found to be, and how: only those before it are looked at.

    Returns:
        None for a run that has not saved yet.

    Raises:
        CheckpointError: if there are checkpoints, and none is good.
    """
    skipped: list[str] = []
    published = checkpoints_in(folder)
    try:
        latest = pointed(folder, LATEST)
    except CheckpointError as error:
        skipped.append(f"{error}; the newest checkpoint beside it counts")
        latest = None
    else:
        if latest is None and published and damaged is None:
            skipped.append(f"{folder / LATEST}: missing; the newest checkpoint beside it counts")
    lost_from = None
    if damaged is not None:
        lost_from = step_of(damaged[0])
        skipped = [str(damaged[1])]
        published = [path for path in published if step_of(path) < lost_from]
    elif latest is not None:
        # one with a higher step was published, but never became the latest
        named = int(latest["step"])
        published = [path for path in published if step_of(path) <= named]
        if not published or step_of(published[0]) != named:
            lost_from = named
            skipped.append(f"{folder / latest['checkpoint']}: missing, but the newest according to {folder / LATEST}")
    if not published and not skipped:
        return Choice(None, [])
    for path in published:
        try:
            read_state(path, open_manifest(path))
        except CheckpointError as error:
            lost_from = lost_from or step_of(path)
            skipped.append(str(error))
            continue
        if lost_from is not None:
            lost = lost_from - step_of(path)
            skipped.append(
                f"going on from {path.name}; {lost} step{'s are' if lost != 1 else ' is'} lost and done again"
            )
        return Choice(path, skipped)
    raise CheckpointError(
        f"{skipped[0]}; no good checkpoint is left in {folder}: name one of another place with resume=PATH, or start anew with "
        "another name="
    )
