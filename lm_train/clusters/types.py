"""What a cluster is, as far as planning needs it: devices, links, prices, and the site's own words for Slurm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Numbers = Literal["fp32", "tf32", "bf16", "fp16"]
"""Types in which a device multiplies matrices."""


class Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Device(Facts):
    """One GPU, or without GPUs one CPU process' share of a node."""

    name: str
    accelerator: Literal["gpu", "cpu"]
    memory_bytes: Annotated[int, Field(ge=0)]
    """What a process can have of it; 0: unknown."""
    peak_flops: Mapping[Numbers, Positive]
    """Dense matrix FLOP/s by the data sheet, without sparsity; for a CPU as well, where known."""
    achievable: Mapping[Numbers, Annotated[float, Field(gt=0, le=1)]]
    """Share of the peak that large matrix products reach."""
    memory_bandwidth: Positive
    """Bytes/s of the device's own memory."""
    achievable_bandwidth: Annotated[float, Field(gt=0, le=1)] = 0.8
    launch_seconds: Positive = 5e-6
    """Host time of one kernel launch: a step takes at least this for each of its operations."""
    power_watts: NonNegative
    """Rated power, with its share of the node where that is known."""
    compute_capability: tuple[int, int] | None = None
    known: bool = True
    """False: an unknown device with conservative figures in place of facts."""


class Link(Facts):
    """Between the devices of one node, or between nodes."""

    name: str
    bandwidth: Positive
    """Bytes/s that one device sends, and receives at the same time."""
    latency_seconds: NonNegative


class Site(Facts):
    """How this cluster's Slurm is asked; None leaves a line out of the job file."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gres: str = "gpu"
    """Slurm's name of a GPU: `gpu`, or with the type `gpu:h100`."""
    modules: tuple[str, ...] = ()
    """Loaded before the run."""
    container: str | None = None
    """Words put before the command on each node, such as `apptainer exec --nv image.sif`."""
    max_hours: Positive | None = None
    """Longest job of the partition."""


class Cluster(Facts):
    """Equal nodes of equal devices."""

    name: str
    device: Device
    devices_per_node: Annotated[int, Field(ge=1)]
    nodes: Annotated[int, Field(ge=1)]
    intra_node: Link
    inter_node: Link | None = None
    """None for a single node."""
    cpu_cores_per_node: Annotated[int, Field(ge=1)]
    host_memory_bytes: Annotated[int, Field(ge=0)]
    """Of each node; 0: unknown."""
    disk_bandwidth: Positive
    """Bytes/s of one node's writes to where runs lie."""
    price_per_gpu_hour: NonNegative | None = None
    """None where nobody has said."""
    currency: str = "USD"
    start_seconds: NonNegative = 30.0
    """From the launch to the first step: imports, building the model, opening the data."""
    site: Site = Site()
    here: bool = False
    """This machine or allocation itself, not a description of another one."""
    sources: Mapping[str, str] = {}
    """Where each fact comes from, by its key."""
