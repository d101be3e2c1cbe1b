"""This machine, or this Slurm step, as a cluster: what it has as facts, and what only a measurement could tell as estimates."""

from __future__ import annotations

import re
from pathlib import Path

from lm_train.clusters.devices import device_of, link_of
from lm_train.clusters.types import Cluster, Device, Link, Numbers
from lm_train.hardware import Machine
from lm_train.slurm import Allocation, tasks_see_their_own_gpus

_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60
"""A limit of this size is none: version 1 of cgroups writes the largest multiple of a page."""
_ESTIMATE = "estimate; lm-train calibrate measures it"
LOOPBACK = Link(name="loopback", bandwidth=2e9, latency_seconds=50e-6)
"""An estimate for gloo between processes of one machine."""
DISK_BANDWIDTH = 5e8
"""Bytes/s, an estimate for a shared file system seen from one node."""


def this_cluster(machine: Machine, allocation: Allocation | None) -> Cluster:
    """What this process may use: all GPUs of the machine or step, else the CPU."""
    nodes = allocation.nodes if allocation is not None else 1
    tasks = allocation.tasks_per_node if allocation is not None else 1
    cores = allocation.cpus_on_node if allocation is not None else None
    name = "this machine" if allocation is None else str(allocation)
    memory = host_memory()
    sources = {
        "host_memory_bytes": "/proc/meminfo and the control group's limit",
        "cpu_cores_per_node": "the cores that this process may use",
        "disk_bandwidth": _ESTIMATE,
        "intra_node": _ESTIMATE,
        "inter_node": "/sys/class/infiniband and /sys/class/net, else an estimate",
    }
    if machine.gpus:
        device = min(map(device_of, machine.gpus), key=lambda each: each.memory_bytes)
        count = len(machine.gpus)
        if allocation is not None and tasks_see_their_own_gpus(machine, allocation):
            count *= tasks
        return Cluster(
            name=name,
            device=device,
            devices_per_node=count,
            nodes=nodes,
            intra_node=link_of(device),
            inter_node=_network(count) if nodes > 1 else None,
            cpu_cores_per_node=cores or machine.cpu_cores,
            host_memory_bytes=memory,
            disk_bandwidth=DISK_BANDWIDTH,
            here=True,
            sources=sources,
        )
    whole = Cluster(
        name=name,
        device=cpu_device(cores or machine.cpu_cores, memory, _flags(), _megahertz()),
        devices_per_node=1,
        nodes=nodes,
        intra_node=LOOPBACK,
        inter_node=_network(tasks) if nodes > 1 else None,
        cpu_cores_per_node=cores or machine.cpu_cores,
        host_memory_bytes=memory,
        disk_bandwidth=DISK_BANDWIDTH,
        start_seconds=15.0,
        here=True,
        sources=sources,
    )
    return whole.divided(tasks)


def cpu_device(cores: int, memory_bytes: int, flags: frozenset[str], megahertz: float) -> Device:
    """All the cores as one device, with rates by a rule of thumb.

    Args:
        cores: hardware threads; two of them share the arithmetic of a core.
        memory_bytes: 0: unknown.
        flags: instruction sets by the names of /proc/cpuinfo; empty: unknown.
        megahertz: the clock.
    """
    each = 32 if "avx512f" in flags else 16 if "avx2" in flags or not flags else 8
    fp32 = cores * megahertz * 1e6 * each
    times = 8 if "amx_bf16" in flags else 2 if "avx512_bf16" in flags else 0.5
    peak: dict[Numbers, float] = {"fp32": fp32, "bf16": fp32 * times}
    return Device(
        name=f"{cores} CPU core{'s' if cores > 1 else ''}",
        accelerator="cpu",
        memory_bytes=memory_bytes,
        peak_flops=peak,
        achievable={"fp32": 0.6, "bf16": 0.5},
        memory_bandwidth=min(10e9 * cores, 200e9),
        achievable_bandwidth=0.7,
        launch_seconds=5e-6,
        host_bandwidth=min(10e9 * cores, 200e9),
        power_watts=5.0 * cores,
        sources={
            "memory_bytes": "/proc/meminfo and the control group's limit",
            "peak_flops": f"estimate, {each} fp32 operations a cycle and hardware thread by the instruction sets",
            "achievable": _ESTIMATE,
            "memory_bandwidth": _ESTIMATE,
            "achievable_bandwidth": _ESTIMATE,
            "launch_seconds": _ESTIMATE,
            "host_bandwidth": "the same memory",
            "power_watts": "estimate, 5 W a hardware thread of a server processor",
        },
    )


def host_memory(proc: Path = Path("/proc"), cgroups: Path = _CGROUPS) -> int:
    """Bytes that this process may have: the machine's, or the tightest limit of its control groups; 0: unknown."""
    try:
        match = re.search(r"^MemTotal:\s+(\d+) kB", (proc / "meminfo").read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        match = None
    found = [int(match[1]) << 10] if match else []
    return min([*found, *_limits(proc, cgroups)], default=0)


def available_host_memory(proc: Path = Path("/proc"), cgroups: Path = _CGROUPS) -> int:
    """Bytes that are free, or would be without the cache of files, within the limits of the control groups; 0: unknown."""
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", (proc / "meminfo").read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        match = None
    found = [int(match[1]) << 10] if match else []
    for limit, group in _limited(proc, cgroups):
        for usage in ("memory.current", "memory.usage_in_bytes"):
            try:
                used = int((group / usage).read_text(encoding="ascii"))
                cached = re.search(
                    r"^(?:total_)?inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE
                )
            except (OSError, ValueError):
                continue
            found.append(max(0, limit - used + (int(cached[1]) if cached else 0)))
    return min(found, default=0)


def _limits(proc: Path, cgroups: Path) -> list[int]:
    """Memory limits of the groups around this process."""
    return [limit for limit, _ in _limited(proc, cgroups)]


def _limited(proc: Path, cgroups: Path) -> list[tuple[int, Path]]:
    """The groups around this process that limit its memory; inside a container their upper part may be out of sight."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    limits = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            try:
                text = (folder / name).read_text(encoding="ascii").strip()
            except (OSError, ValueError):
                text = ""
            if text.isdigit() and int(text) < _UNLIMITED:
                limits.append((int(text), folder))
            if folder == root:
                break
    return limits


def _network(devices: int) -> Link:
    """Between the nodes, for one of so many devices: the active InfiniBand ports of this one, else its fastest card."""
    gigabits = sum(_rates("/sys/class/infiniband", "*/ports/*/rate"))
    name = "InfiniBand"
    if not gigabits:
        name, gigabits = "Ethernet", max(_rates("/sys/class/net", "*/speed"), default=0) / 1000
    if not gigabits:
        name, gigabits = "Ethernet, assumed", 10.0
    share = gigabits * 1e9 / 8 / devices
    return Link(
        name=f"{name}, {gigabits:g} Gb/s a node",
        bandwidth=share * 0.9,
        latency_seconds=14e-6 if name == "InfiniBand" else 100e-6,
    )


def _rates(folder: str, files: str) -> list[float]:
    rates = []
    for file in Path(folder).glob(files):
        try:
            match = re.match(r"\d+(\.\d+)?", file.read_text(encoding="ascii"))
        except (OSError, ValueError):  # a card without a cable has no speed
            continue
        if match:
            rates.append(float(match[0]))
    return rates


def _cpuinfo(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    match = re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE)
    return match[1] if match else ""


def _flags() -> frozenset[str]:
    return frozenset(_cpuinfo("flags").split())


def _megahertz() -> float:
    text = _cpuinfo("cpu MHz")
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) and float(text) > 0 else 2500.0
