"""Writes a benchmark's result as JSON with the machine and the versions it was measured on."""

from __future__ import annotations

import json
import platform
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


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
