"""What a cluster is, as far as planning needs it: devices, links, prices, and the site's own words for Slurm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lm_train.recipe.text import WrittenFloat, WrittenInt


def _as_text(value: object) -> object:
    """`account: 1234` in a file is a name, as it was written."""
    return value.text if isinstance(value, WrittenInt | WrittenFloat) else value


Text = Annotated[str, BeforeValidator(_as_text), Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Numbers = Literal["fp32", "tf32", "bf16", "fp16"]
"""Types in which a device multiplies matrices."""


class Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Device(Facts):
    """One GPU, or without GPUs one CPU process' share of a node."""

    name: Text
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
    host_bandwidth: Positive = 24e9
    """Bytes/s between host memory and the device, each way: what offloading and pinned copies go through."""
    power_watts: NonNegative
    """Rated power, with its share of the node where that is known."""
    compute_capability: Annotated[tuple[int, int] | None, Field(strict=False)] = None
    known: bool = True
    """False: an unknown device with conservative figures in place of facts."""
    warning: str = ""
    """For a person, where the device is unknown: what was assumed, and how to do better."""
    sources: Mapping[str, str] = {}
    """Where each fact comes from, by its key."""


class Link(Facts):
    """Between the devices of one node, or between nodes."""

    name: Text
    bandwidth: Positive
    """Bytes/s that one device sends, and receives at the same time, in large messages of a collective: below the line rate."""
    latency_seconds: NonNegative
    """Of one hop of a ring."""


class Site(Facts):
    """How this cluster's Slurm is asked; None leaves a line out of the job file."""

    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    gres: Text = "gpu"
    """Slurm's name of a GPU: `gpu`, or with the type `gpu:h100`."""
    modules: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Loaded before the run."""
    container: Text | None = None
    """Words put before the command on each node, such as `apptainer exec --nv image.sif`."""
    max_hours: Positive | None = None
    """Longest job of the partition."""
    max_nodes: Annotated[int, Field(ge=1)] | None = None
    """Most nodes of a job of the partition."""


class Cluster(Facts):
    """Equal nodes of equal devices."""

    name: Text
    device: Device
    devices_per_node: Annotated[int, Field(ge=1)]
    """GPUs, or processes that divide the CPU's cores and memory among them."""
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
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"
    """ISO 4217 code of the price."""
    start_seconds: NonNegative = 30.0
    """From the launch to the first step: imports, building the model, opening the data."""
    site: Site = Site()
    here: bool = False
    """This machine or allocation itself, not a description of another one."""
    sources: Mapping[str, str] = {}
    """Where each fact comes from, by its key."""

    @property
    def devices(self) -> int:
        """Of all nodes together."""
        return self.nodes * self.devices_per_node

    def source_of(self, key: str) -> str | None:
        """Where a fact comes from, by its key, such as `device.peak_flops`; None where nobody has said."""
        if key in self.sources or not key.startswith("device."):
            return self.sources.get(key)
        return self.device.sources.get(key.removeprefix("device."))

    def divided(self, processes: int) -> Cluster:
        """This cluster of CPUs with so many processes on each node, each with an equal share of what the node has."""
        assert self.device.accelerator == "cpu", "GPUs are not divided"
        share = self.devices_per_node / processes
        device = self.device.model_copy(
            update={
                "memory_bytes": int(self.device.memory_bytes * share),
                "peak_flops": {numbers: flops * share for numbers, flops in self.device.peak_flops.items()},
                "memory_bandwidth": self.device.memory_bandwidth * share,
                "host_bandwidth": self.device.host_bandwidth * share,
                "power_watts": self.device.power_watts * share,
            }
        )
        return self.model_copy(update={"device": device, "devices_per_node": processes})
