"""From what nvidia-smi or Slurm calls a GPU to its facts; an unknown one gets conservative figures and a warning."""

from __future__ import annotations

import re

from lm_train.clusters.descriptions import cluster_named, device_named, shipped_clusters, shipped_devices
from lm_train.clusters.types import Device, Link, Numbers
from lm_train.hardware import BF16_SINCE, GPU

_NAMES = (
    (r"\bB200\b", "b200"),
    (r"\bH200\b(?! NVL)", "h200"),
    (r"\bH100 NVL\b", "h100_nvl"),
    (r"\bH100 PCIe\b", "h100_pcie"),
    (r"\bH100\b", "h100"),
    (r"\bA100\b.*\b80 ?GB PCIe\b", "a100_80_pcie"),
    (r"\bA100\b.*\b80 ?GB\b", "a100_80"),
    (r"\bA100[ -]PCIe\b", "a100_40_pcie"),
    (r"\bA100\b", "a100_40"),
    (r"\bL40S\b", "l40s"),
    (r"\bRTX ?4090(?! D\b| Laptop)", "rtx4090"),
)
"""Patterns of the names that nvidia-smi reports, and the shipped device; the first match counts."""
_SLURM_NAMES = {"a100": "a100_40", "a100_40gb": "a100_40", "a100_80gb": "a100_80", "4090": "rtx4090"}
"""What sites call a GPU in Slurm's gres beside our own names; of an A100 without its memory, the smaller one."""
_USABLE = 0.98
"""Share of the memory in nvidia-smi's list that CUDA gives out: 0.985 to 0.993 for the shipped devices."""
_ASSUMED_MEMORY = 16 * 10**9
"""Bytes, where nobody tells an unknown GPU's memory: what the smallest GPUs of clusters have (T4, V100)."""


def device_of(gpu: GPU) -> Device:
    """The facts of a GPU that nvidia-smi lists; its memory is never more than is listed."""
    name = _shipped_name(gpu.name)
    if name is None:
        return _unknown(gpu.name, int(gpu.memory_bytes * _USABLE), gpu.compute_capability)
    device = device_named(name)
    usable = min(device.memory_bytes, int(gpu.memory_bytes * _USABLE) if gpu.memory_bytes else device.memory_bytes)
    if usable >= device.memory_bytes * 0.97:  # the card itself; the list's figure is the coarser one
        return device
    return device.model_copy(update={"memory_bytes": usable})


def device_of_slurm(gres_type: str) -> Device:
    """The facts of a GPU by its type in Slurm's gres, such as `h100` or `nvidia_h100_80gb_hbm3`; empty: no type given."""
    plain = gres_type.lower()
    if plain in shipped_devices():
        return device_named(plain)
    name = _SLURM_NAMES.get(plain) or _shipped_name(plain.replace("_", " "))
    return (
        device_named(name) if name else _unknown(gres_type or "without a type in Slurm's gres", _ASSUMED_MEMORY, None)
    )


def peak_flops(gpu: GPU) -> float | None:
    """Dense bf16 FLOP/s by the data sheet; None for an unknown GPU."""
    name = _shipped_name(gpu.name)
    return None if name is None else device_named(name).peak_flops["bf16"]


def link_of(device: Device) -> Link:
    """Between GPUs of this sort in one node: as its shipped cluster has it, else PCIe."""
    for name in shipped_clusters():
        cluster = cluster_named(name)
        if cluster.device.name == device.name:
            return cluster.intra_node
    return Link(name="PCIe 4.0 x16, assumed", bandwidth=20e9, latency_seconds=5.7e-6)


def _shipped_name(text: str) -> str | None:
    return next((name for pattern, name in _NAMES if re.search(pattern, text, re.IGNORECASE)), None)


def _unknown(name: str, memory: int, capability: tuple[int, int] | None) -> Device:
    """Below what any GPU of its capability from the last years reaches, so that a plan rather takes longer than it says."""
    old = capability is not None and capability < BF16_SINCE
    peak: dict[Numbers, float] = {"fp32": 8e12, "fp16": 60e12} if old else {"fp32": 15e12, "bf16": 60e12, "fp16": 60e12}
    told = f"{memory / 2**30:.0f} GiB" if memory else "unknown memory"
    return Device(
        name=name,
        accelerator="gpu",
        memory_bytes=memory,
        peak_flops=peak,
        achievable=dict.fromkeys(peak, 0.5),
        memory_bandwidth=300e9,
        launch_seconds=1e-5,
        host_bandwidth=12e9,
        power_watts=400,
        compute_capability=capability,
        known=False,
        warning=(
            f"unknown GPU {name}: counting with {told}, 60 TFLOP/s and 300 GB/s, which is low; lm-train calibrate measures it, "
            "or give cluster=FILE.yaml with device: {base: h100, name: ..., memory_bytes: ...}"
        ),
        sources={"memory_bytes": "nvidia-smi, or assumed", "peak_flops": "assumed, conservative"},
    )
