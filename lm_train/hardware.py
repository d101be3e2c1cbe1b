"""What this machine has. Free of torch, so that a login node can ask."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from lm_train.errors import UsageError

BF16_SINCE = (8, 0)
"""Compute capability with native bf16 (Ampere; CUDA C++ Programming Guide, table of arithmetic instructions)."""


@dataclass(frozen=True)
class GPU:
    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    cpu_cores: int
    gpus: tuple[GPU, ...]


def this_machine() -> Machine:
    """The cores and GPUs that this process may use (CPU affinity and CUDA_VISIBLE_DEVICES count)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(cpu_cores=cores, gpus=_visible_gpus())


_NO_DEVICES = ("", "-1", "NoDevFiles")
"""CUDA_VISIBLE_DEVICES of a process that is to see none; the last is Slurm's, in a job without GPUs."""


def _visible_gpus() -> tuple[GPU, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None or visible in _NO_DEVICES:
        return ()
    query = "--query-gpu=index,uuid,name,memory.total,compute_cap"
    try:
        answer = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    listed = [gpu for gpu in map(_listed, answer.splitlines()) if gpu is not None]
    if visible is None:
        return tuple(gpu for _, _, gpu in listed)
    chosen: list[GPU] = []
    for wish in map(str.strip, visible.split(",")):
        found = [gpu for index, uuid, gpu in listed if wish and (index == wish or uuid.startswith(wish))]
        if not found:  # CUDA stops at the first entry that it does not know
            break
        chosen.append(found[0])
    if listed and not chosen and visible not in _NO_DEVICES:
        raise UsageError(
            f"CUDA_VISIBLE_DEVICES={visible} names none of the {len(listed)} GPUs that nvidia-smi lists (MIG slices are not "
            "supported); give their numbers or UUIDs, or set it empty to train on the CPU"
        )
    return tuple(chosen)


def _listed(line: str) -> tuple[str, str, GPU] | None:
    """Index, uuid and facts from one line of nvidia-smi's answer; None for a line that is no GPU.

    A GPU that shares the host's memory answers [N/A] for its own: it counts as 0, unknown.
    """
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != 5:
        return None
    index, uuid, name, mebibytes, capability = parts
    major, _, minor = capability.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        return None
    memory = int(mebibytes) << 20 if mebibytes.isdigit() else 0
    return index, uuid, GPU(name, memory, (int(major), int(minor)))
