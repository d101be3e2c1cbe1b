"""What `lm-train calibrate` has measured on a machine, as a file; where such files lie, and which one suits. Free of torch."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lm_train.clusters.types import Cluster
from lm_train.errors import UsageError
from lm_train.plan.rates.base import Collective
from lm_train.plan.rates.tables import Curve, Point, Tables

VERSION: Literal[1] = 1
"""Of the file's form."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Sum(_Frozen):
    """One collective of all ranks."""

    kind: Collective
    bytes: float
    seconds: float


class Pass(_Frozen):
    """One pass of an optimizer, or of the gradient's norm, over one fp32 tensor among many."""

    name: str
    """Of the optimizer; `norm`, or `clip` for the norm and scaling by it."""
    elements: int
    seconds: float


class Setting(_Frozen):
    """What one rank measured while so many did the same on its node, each with so many threads."""

    ranks: int
    threads: int
    nodes: int = 1
    points: tuple[Point, ...]
    forward_overhead: float
    """Seconds that an operation takes in a network beyond its own, in the forward pass: modules, the dispatcher, autograd."""
    backward_overhead: float
    passes: tuple[Pass, ...]
    collectives: tuple[Sum, ...] = ()
    noise: float
    """Median over the operations of the relative spread between repeats."""

    @cached_property
    def tables(self) -> Tables:
        return Tables(self.points)

    def curve_of_pass(self, name: str) -> Curve | None:
        """Seconds over elements."""
        return self._curves.get(name)

    def curve_of_collective(self, kind: Collective) -> Curve | None:
        """Seconds over bytes."""
        return self._curves.get(kind)

    @cached_property
    def _curves(self) -> dict[str, Curve]:
        points: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for each in self.passes:
            points[each.name].append((each.elements, each.seconds))
        for collective in self.collectives:
            points[collective.kind].append((collective.bytes, collective.seconds))
        return {name: Curve(own) for name, own in points.items()}


class Training(_Frozen):
    """Of real training runs of tiny networks: seconds of what is not the network's own."""

    step: float
    micro_batch: float
    row: float
    strategies: dict[str, tuple[float, float]] = {}
    """By name, of a step and of each unit or parameter in it; see `StrategyCost`."""
    start_seconds: float
    """From the command to the first step."""


class Disk(_Frozen):
    save_seconds: float
    """Of a save that writes next to nothing."""
    bandwidth: float
    """Bytes/s of saving a large state, checksums included, by one process."""


class Calibration(_Frozen):
    """Everything that was measured on one machine or allocation."""

    version: Literal[1] = VERSION
    device: str
    """Its name as `lm_train.clusters` finds it."""
    processor: str
    cores: int
    """Of a node."""
    torch: str
    versions: dict[str, str]
    date: str
    quick: bool
    noise: float
    settings: tuple[Setting, ...]
    training: Training
    disk: Disk
    offload_bandwidth: float | None = None
    """Bytes/s between host and device; None without a GPU."""
    sample_seconds: dict[str, float] = {}
    """Of one core, until one sample, or one token of running text, is ready; by kind of data."""

    @property
    def title(self) -> str:
        return f"calibration of {self.device} ({self.processor}), {self.date}"

    def setting(self, ranks: int, threads: int) -> Setting:
        """The one that comes nearest: first as many ranks, then as many threads."""
        return min(
            self.settings, key=lambda each: (abs(each.ranks - ranks), abs(each.threads - threads), each.ranks < ranks)
        )

    @classmethod
    def read(cls, file: Path) -> Calibration:
        """
        Raises:
            UsageError: if it is no calibration.
        """
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(
                f"cluster.calibration: {file}: {error.strerror}; lm-train calibrate out={file} writes one"
            ) from None
        except (ValidationError, UnicodeDecodeError):
            raise UsageError(
                f"cluster.calibration: {file} is no calibration of this version; lm-train calibrate out={file} writes one anew"
            ) from None


def calibrations_folder() -> Path:
    """Of this user."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "lm_train" / "calibrations"


def torch_version() -> str:
    """As installed, without importing it; empty where there is none."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def processor() -> str:
    """The CPU's model name, as Linux tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def file_name(device: str, cores: int, torch: str, processor_name: str) -> str:
    words = (device, processor_name, f"{cores} cores", f"torch {torch}")
    return re.sub(r"[^A-Za-z0-9.+]+", "-", "_".join(words)).strip("-") + ".json"


def find_calibration(cluster: Cluster) -> Path | None:
    """The user's calibration of this very machine, or None.

    It counts for the same device, as many cores, the same processor and the same torch; the newest file of that name is the
    only one.
    """
    if not cluster.here:
        return None
    file = calibrations_folder() / file_name(
        cluster.device.name, cluster.cpu_cores_per_node, torch_version(), processor()
    )
    return file if file.is_file() else None
