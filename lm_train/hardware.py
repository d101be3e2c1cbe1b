"""What this machine has, and facts of GPUs with their sources. Free of torch, so that a login node can ask."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from lm_train.errors import UsageError

DENSE_BF16_FLOPS = {
    r"\bB200\b": 2250e12,
    r"\bH200\b(?! NVL)": 989.4e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    r"\bH100\b": 989.4e12,
    r"\bA100\b": 312e12,
    r"\bL40S\b": 362.05e12,
    r"RTX 4090(?! D\b| Laptop)": 165.2e12,
}
"""Peak dense bf16 FLOP/s with fp32 accumulation, by a pattern of the name that nvidia-smi reports; first match counts.

Source: NVIDIA's data sheets of each product (figures "with sparsity" halved): DGX B200; H200 Tensor Core GPU; H100 Tensor
Core GPU (SXM, NVL, PCIe columns); A100; L40S; Ada GPU Architecture white paper, appendix A (RTX 4090).
"""

BF16_SINCE = (8, 0)
"""Compute capability with native bf16 (Ampere; CUDA C++ Programming Guide, table of arithmetic instructions)."""


@dataclass(frozen=True)
class GPU:
    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]

    @property
    def peak_flops(self) -> float | None:
        """Dense bf16 FLOP/s, or None for a GPU that is not in the table."""
        return next((flops for part, flops in DENSE_BF16_FLOPS.items() if re.search(part, self.name)), None)


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
