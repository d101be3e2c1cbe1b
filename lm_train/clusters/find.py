"""Which cluster a recipe means: this machine, a Slurm step, a partition, or a description."""

from __future__ import annotations

import os

from lm_train.clusters.descriptions import cluster_named, is_path
from lm_train.clusters.devices import device_of, device_of_slurm, link_of
from lm_train.clusters.machine import DISK_BANDWIDTH, LOOPBACK, cpu_device, this_cluster
from lm_train.clusters.partitions import NoSlurmError, Partition, partition_named, partitions, slurm_is_here
from lm_train.clusters.types import Cluster, Link, Site
from lm_train.errors import UsageError
from lm_train.hardware import Machine
from lm_train.recipe import ClusterSection
from lm_train.slurm import Allocation

_SAME_MEMORY = 0.9
"""A GPU is the described one if it has at least this share of the described memory, where its name does not tell."""


def find(
    section: ClusterSection, machine: Machine, allocation: Allocation | None, for_planning: bool = False
) -> Cluster:
    """The cluster that a recipe's section means, with what the section itself says in place of the description's.

    Args:
        section: `name` is auto, a shipped description, or the path of a YAML file.
        machine: what this process may use.
        allocation: the Slurm step around it, if there is one.
        for_planning: nothing will be started here: on a login node `auto` is a partition of its Slurm.

    Raises:
        UsageError: with every fault of the name, the file or the section, one line each.
    """
    if section.name != "auto":
        cluster = _with_section(cluster_named(section.name), section)
        return _limited(_with_limits(cluster) if for_planning else cluster, section)
    if allocation is None and for_planning and slurm_is_here():
        name = section.partition or os.environ.get("SLURM_JOB_PARTITION")  # the shell of salloc names its own
        nodes = os.environ.get("SLURM_JOB_NUM_NODES") if section.partition is None else None
        try:
            cluster = _of_partition(partition_named(name), int(nodes) if nodes else None)
            return _limited(_with_section(cluster, section), section)
        except NoSlurmError:
            if name is not None:  # else nobody speaks of Slurm: its commands lie here, and no cluster is behind them
                raise
    if allocation is None and for_planning and section.partition is not None:
        raise UsageError(
            f"cluster.partition={section.partition}: no Slurm answers here; plan on a login node, or give cluster=NAME|FILE "
            "with what its nodes have"
        )
    return _limited(_with_section(this_cluster(machine, allocation), section), section)


def check_here(
    cluster: Cluster, section: ClusterSection, machine: Machine, allocation: Allocation | None = None
) -> Cluster:
    """This machine or step with the prices, power and rates of a description that it matches.

    Args:
        cluster: as `find` gave it; what is here already stays as it is.
        section: of the same recipe.
        machine: what this process may use.
        allocation: the Slurm step around it, if there is one.

    Raises:
        UsageError: if this is another machine than described.
    """
    if cluster.here:
        return cluster
    here = this_cluster(machine, allocation)
    has = f"{len(machine.gpus)} x {machine.gpus[0].name}" if machine.gpus else f"no GPU, {here.device.name}"
    if not _same_device(cluster, machine):
        where = "this machine" if allocation is None else str(allocation)
        raise UsageError(
            f"cluster: {section.name} has {cluster.device.name}, {where} has {has}; train with cluster=auto, or plan for "
            f"another machine with lm-train plan cluster={section.name} sbatch=JOBFILE"
        )
    if cluster.device.accelerator == "gpu":
        device = cluster.device.model_copy(
            update={
                "memory_bytes": min(cluster.device.memory_bytes or here.device.memory_bytes, here.device.memory_bytes)
            }
        )
    elif is_path(section.name):
        device = cluster.device.model_copy(update={"memory_bytes": here.device.memory_bytes})
    else:
        device = here.device  # how fast some laptop is says nothing of this one
    found = cluster.model_copy(
        update={
            "device": device,
            "devices_per_node": here.devices_per_node,
            "nodes": here.nodes,
            "inter_node": here.inter_node if cluster.inter_node is None or here.nodes == 1 else cluster.inter_node,
            "cpu_cores_per_node": here.cpu_cores_per_node,
            "host_memory_bytes": here.host_memory_bytes,
            "here": True,
        }
    )
    return _limited(found, section)


def _same_device(cluster: Cluster, machine: Machine) -> bool:
    if cluster.device.accelerator == "cpu" or not machine.gpus:
        return cluster.device.accelerator == "cpu" and not machine.gpus
    for gpu in machine.gpus:
        device = device_of(gpu)
        if device.known and device.name == cluster.device.name:
            continue
        named = cluster.device.name.lower() in gpu.name.lower() or gpu.name.lower() in cluster.device.name.lower()
        if not named or gpu.memory_bytes < cluster.device.memory_bytes * _SAME_MEMORY:
            return False
    return True


def _with_limits(cluster: Cluster) -> Cluster:
    """What this Slurm says of the description's partition and its nodes, if it is one of its own.

    Raises:
        UsageError: if no node of the partition has the described GPUs.
    """
    name = cluster.site.partition
    if name is None or not slurm_is_here():
        return cluster
    try:
        partition = partitions().get(name)
    except NoSlurmError:
        return cluster
    if partition is None:  # perhaps another cluster's; lm-train submit looks again
        return cluster
    gpus = cluster.devices_per_node if cluster.device.accelerator == "gpu" else 0
    kinds = [kind for kind in partition.kinds if kind.gpus >= gpus and (not gpus or _may_be(kind.gpu_type, cluster))]
    if partition.kinds and not kinds:
        has = " or ".join(f"{kind.gpus} x {kind.gpu_type or 'GPU'}" for kind in partition.kinds)
        raise UsageError(
            f"cluster.partition: nodes of {name} have {has}, {cluster.name} is {gpus} x {cluster.device.name}; plan with "
            f"cluster=auto cluster.partition={name}, or take another partition"
        )
    limits: dict[str, object] = {"max_hours": partition.max_hours, "max_nodes": partition.max_nodes}
    limits = {key: value for key, value in limits.items() if value is not None and getattr(cluster.site, key) is None}
    changes: dict[str, object] = {}
    if kinds:
        kind = max(kinds, key=lambda each: partition.kinds[each])
        if kind.gpu_type and cluster.site.gres == "gpu":
            limits["gres"] = f"gpu:{kind.gpu_type}"
        changes = {"cpu_cores_per_node": max(1, kind.cpus), "host_memory_bytes": kind.memory_bytes}
    return cluster.model_copy(update={**changes, "site": cluster.site.model_copy(update=limits)})


def _may_be(gres_type: str, cluster: Cluster) -> bool:
    """Whether Slurm's word for a GPU can mean the described one; a word that nobody knows can."""
    device = device_of_slurm(gres_type)
    return not device.known or device.name == cluster.device.name


def _of_partition(partition: Partition, most: int | None) -> Cluster:
    """Equal nodes of a partition: the kind of which it has most, where it has several; at most so many."""
    what = f"partition {partition.name}"
    if not partition.kinds:
        raise UsageError(
            f"cluster.partition: {what} has no node that takes jobs now (sinfo --partition={partition.name})"
        )
    kind = partition.main_kind
    nodes = min(filter(None, (partition.kinds[kind], partition.max_nodes, most)))
    cores = max(1, kind.cpus)
    source = f"sinfo and scontrol, {what}"
    site = Site(
        partition=partition.name,
        gres=f"gpu:{kind.gpu_type}" if kind.gpu_type else "gpu",
        max_hours=partition.max_hours,
        max_nodes=partition.max_nodes,
    )
    if kind.gpus:
        device = device_of_slurm(kind.gpu_type)
        count, intra, network = kind.gpus, link_of(device), 100.0
    else:
        device = cpu_device(cores, kind.memory_bytes, frozenset(), 2500.0)
        count, intra, network = 1, LOOPBACK, 10.0
    inter = Link(
        name=f"{network:g} Gb/s a node, assumed", bandwidth=network * 1e9 / 8 / count * 0.9, latency_seconds=20e-6
    )
    return Cluster(
        name=what,
        device=device,
        devices_per_node=count,
        nodes=nodes,
        intra_node=intra,
        inter_node=inter if nodes > 1 else None,
        cpu_cores_per_node=cores,
        host_memory_bytes=kind.memory_bytes,
        disk_bandwidth=DISK_BANDWIDTH,
        site=site,
        sources={
            "nodes": source,
            "devices_per_node": source,
            "cpu_cores_per_node": source,
            "host_memory_bytes": source,
            "intra_node": "as the GPU's shipped description, else an estimate",
            "inter_node": "estimate; give cluster=FILE.yaml with inter_node, or measure it with lm-train calibrate",
            "disk_bandwidth": "estimate",
        },
    )


def _with_section(cluster: Cluster, section: ClusterSection) -> Cluster:
    """The section's price and Slurm words in place of the cluster's."""
    given = {key: value for key in ("partition", "account", "qos") if (value := getattr(section, key)) is not None}
    changes: dict[str, object] = {"site": cluster.site.model_copy(update=given)} if given else {}
    if section.price_per_gpu_hour is not None:
        changes["price_per_gpu_hour"] = section.price_per_gpu_hour
        changes["sources"] = {**cluster.sources, "price_per_gpu_hour": "the recipe"}
    if section.currency is not None:
        if section.price_per_gpu_hour is None and cluster.price_per_gpu_hour and section.currency != cluster.currency:
            raise UsageError(
                f"cluster.currency: {section.currency}, but {cluster.name} has its price in {cluster.currency}; give "
                "cluster.price_per_gpu_hour as well"
            )
        changes["currency"] = section.currency
    return cluster.model_copy(update=changes) if changes else cluster


def _limited(cluster: Cluster, section: ClusterSection) -> Cluster:
    """At most so many nodes and devices as the section says."""
    problems = []
    nodes, devices = section.nodes, section.devices_per_node
    if nodes != "auto" and nodes > cluster.nodes:
        own = (
            f", or a YAML file with base: {section.name}, nodes: {nodes} and inter_node"
            if section.name != "auto"
            else ""
        )
        problems.append(f"cluster.nodes: {nodes} asked, {cluster.name} has {cluster.nodes}; try {cluster.nodes}{own}")
    gpus = cluster.device.accelerator == "gpu"
    most = cluster.devices_per_node if gpus else cluster.cpu_cores_per_node
    if devices != "auto" and devices > most:
        what = "GPUs" if gpus else "CPU cores"
        problems.append(
            f"cluster.devices_per_node: {devices} asked, a node of {cluster.name} has {most} {what}; try {most}"
        )
    if problems:
        raise UsageError(problems)
    if nodes != "auto":
        cluster = cluster.model_copy(update={"nodes": nodes})
    if devices != "auto" and gpus:
        cluster = cluster.model_copy(update={"devices_per_node": devices})
    elif devices != "auto":
        cluster = cluster.divided(devices)
    return cluster
