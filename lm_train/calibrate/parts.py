"""What a calibration hands to the processes that measure. Free of torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Work(BaseModel):
    """Of one process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    ranks: int
    """Of all nodes together."""
    nodes: int
    threads: int
    gpu: int | None
    """Number of the own one."""
    quick: bool
    operations: bool
    """Whether operations and updates are measured, or collectives alone."""
    training: bool
    """Whether the training loop and saving are, too."""
    store: str
    """A file in which the ranks meet."""
    place: str
    """Folder in which saves are tried."""
