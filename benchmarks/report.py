"""Writes a benchmark's result as JSON with the machine and the versions it was measured on."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Iterable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from lm_train.hardware import this_machine

RESULTS = Path(__file__).resolve().parent / "results"


def write_results(benchmark: str, result: dict[str, Any], name: str | None = None) -> Path:
    machine = this_machine()
    content = {
        "benchmark": benchmark,
        "date": date.today().isoformat(),
        "machine": {"cpu": _cpu_name(), "cores": machine.cpu_cores, "gpus": [gpu.name for gpu in machine.gpus]},
        "versions": {"python": platform.python_version()}
        | {
            package: metadata.version(package)
            for package in ("lm-train", "torch", "lightning", "deepspeed", "tokenizers")
        },
        "result": result,
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name or benchmark}.json"
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written {file}")
    return file


def errors(pairs: Iterable[tuple[float, float]]) -> dict[str, float] | None:
    """Of predictions: relative errors (predicted - measured) / measured.

    Args:
        pairs: predicted and measured.

    Returns:
        Their number, mean of the absolute ones, signed mean and median, 95th percentile and worst of the absolute ones; None
        without pairs.
    """
    signed = [(predicted - measured) / measured for predicted, measured in pairs]
    if not signed:
        return None
    absolute = sorted(map(abs, signed))
    return {
        "n": len(signed),
        "mean_absolute": statistics.fmean(absolute),
        "mean": statistics.fmean(signed),
        "median": statistics.median(signed),
        "p95": absolute[math.ceil(0.95 * len(absolute)) - 1],
        "worst": max(signed, key=abs),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
