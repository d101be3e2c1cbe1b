"""Seconds of operations, collectives, updates and disk writes on one rank."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from lm_train.clusters.types import Cluster
from lm_train.errors import UsageError
from lm_train.plan.layout import Layout
from lm_train.plan.rates.base import Collective, Loop, Rates
from lm_train.plan.rates.calibration import Calibration, calibrations_folder, find_calibration
from lm_train.plan.rates.facts import FactRates
from lm_train.plan.rates.measured import MeasuredRates


def from_facts(cluster: Cluster, layout: Layout) -> Rates:
    """By data sheets."""
    return FactRates(cluster, layout)


def from_calibration(file: Path, cluster: Cluster, layout: Layout) -> Rates:
    """By what `lm-train calibrate` has measured.

    Raises:
        UsageError: if the file is no calibration, or that of another device.
    """
    found = _read(file, file.stat().st_mtime_ns if file.exists() else 0)
    if found.device != cluster.device.name:
        raise UsageError(
            f"cluster.calibration: {file} was measured on {found.device}, {cluster.name} has {cluster.device.name}; give a "
            "calibration made there (lm-train calibrate out=FILE), or leave it out"
        )
    return MeasuredRates(found, cluster, layout)


def rates_of(cluster: Cluster, layout: Layout, calibration: str | None = None) -> Rates:
    """The best there are: a calibration that is named, else this machine's own, else data sheets.

    Args:
        calibration: the recipe's `cluster.calibration`.

    Raises:
        UsageError: as `from_calibration`.
    """
    file = find_calibration(cluster) if calibration is None else Path(calibration)
    return from_facts(cluster, layout) if file is None else from_calibration(file, cluster, layout)


@lru_cache(maxsize=4)
def _read(file: Path, changed: int) -> Calibration:
    """Once for the hundreds of layouts that a search asks about."""
    return Calibration.read(file)


__all__ = [
    "Calibration",
    "Collective",
    "FactRates",
    "Loop",
    "MeasuredRates",
    "Rates",
    "calibrations_folder",
    "find_calibration",
    "from_calibration",
    "from_facts",
    "rates_of",
]
