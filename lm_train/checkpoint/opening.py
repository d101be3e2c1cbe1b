"""All ranks open the same checkpoint: each compares the checksums of its share of the files, and what one finds all know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lm_train.checkpoint.agreement import Group
from lm_train.checkpoint.reader import CheckpointReader
from lm_train.errors import CheckpointError
from lm_train.saved import newest_good, open_manifest, verify


def open_agreed(
    checkpoint: Path, rank: int, group: Group, strict: bool, say: Callable[[str], object]
) -> CheckpointReader:
    """The checkpoint, or where it is damaged the newest good one before it; all ranks call it before they load anything.

    Args:
        checkpoint: the newest, as far as the supervisor could tell.
        rank: of this process.
        group: of all ranks.
        strict: take this one or none.
        say: told on rank 0 what was found wrong, a line each.

    Raises:
        CheckpointError: if none is good.
    """
    while True:
        found: str | None = None
        try:
            manifest = open_manifest(checkpoint)
            names = sorted(manifest.files)
            verify(checkpoint, manifest, names[rank :: group.world])
        except CheckpointError as error:
            found = str(error)
        problems = [problem for problem in group.gather(found) if problem]
        if not problems:
            return CheckpointReader(checkpoint, verified=True)
        if strict:
            raise CheckpointError(problems[0])
        chosen: list[str | None] = [None, None]
        if rank == 0:
            try:
                choice = newest_good(checkpoint.parent, damaged=(checkpoint, CheckpointError(problems[0])))
                assert choice.checkpoint is not None, "what was damaged makes it an error"
                chosen = [str(choice.checkpoint), None]
                for line in choice.skipped:
                    say(line)
            except CheckpointError as error:
                chosen = [None, str(error)]
        path, why = group.gather(chosen)[0]  # rank 0's reading counts: a file server may show others an older folder
        if path is None:
            raise CheckpointError(why)
        checkpoint = Path(path)
