"""Where a plan is for: the facts of the devices, and what this process sees of them."""

from __future__ import annotations

from dataclasses import dataclass

from lm_train.clusters import Cluster
from lm_train.hardware import GPU, Machine
from lm_train.slurm import Allocation


@dataclass(frozen=True)
class Target:
    """A cluster to plan for; on the cluster itself with the machine and the Slurm step around this process."""

    cluster: Cluster
    machine: Machine
    allocation: Allocation | None = None

    @classmethod
    def described(cls, cluster: Cluster) -> Target:
        """A cluster that this process is not on."""
        device = cluster.device
        gpus: tuple[GPU, ...] = ()
        if device.accelerator == "gpu":
            gpu = GPU(device.name, device.memory_bytes, device.compute_capability or (0, 0))
            gpus = (gpu,) * cluster.devices_per_node
        return cls(cluster, Machine(cluster.cpu_cores_per_node, gpus))

    def cluster_for(self, devices: int) -> Cluster:
        """The cluster as so many ranks a node see it: without GPUs they share what the node has."""
        if self.machine.gpus or devices == self.cluster.devices_per_node:
            return self.cluster
        return self.cluster.divided(devices)

    @property
    def is_fixed(self) -> bool:
        """Whether nodes and processes are given already: in a Slurm step, or without GPUs."""
        return self.allocation is not None or not self.machine.gpus
