"""`lm-train doctor`: what this machine lacks, each problem with its fix."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement

from lm_train.clusters import device_of, find
from lm_train.data.cache import cache_folder
from lm_train.errors import ExitCode, UsageError
from lm_train.hardware import Machine, this_machine
from lm_train.recipe import ClusterSection
from lm_train.slurm import current_allocation

LOW_DISK_BYTES = 5 << 30


class Finding(NamedTuple):
    state: Literal["ok", "note", "FAIL"]
    what: str
    fix: str = ""


def examine() -> int:
    """Prints every finding; returns 0 if nothing keeps a run from starting, else 2."""
    findings = [finding for check in (_versions, _devices, _slurm, _wandb, _hub, _paths) for finding in check()]
    for finding in findings:
        print(f"{finding.state:<5} {finding.what}" + (f"\n      fix: {finding.fix}" if finding.fix else ""))
    failed = sum(f.state == "FAIL" for f in findings)
    print(f"{failed} problems" if failed else "ready to train")
    return ExitCode.USAGE if failed else ExitCode.DONE


def _versions() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("ok", f"python {version}")
    for needed in map(Requirement, metadata.requires("lm-train") or []):
        if needed.marker is not None:  # tools of the tests
            continue
        try:
            found = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            yield Finding("FAIL", f"{needed.name} is not installed", "launch/setup.sh")
            continue
        if needed.specifier.contains(found, prereleases=True):
            yield Finding("ok", f"{needed.name} {found}")
        else:
            yield Finding("FAIL", f"{needed.name} {found} is not {needed.specifier}", "launch/setup.sh")


def _devices() -> Iterator[Finding]:
    machine = this_machine()
    yield Finding("ok", f"{machine.cpu_cores} CPU cores")
    for gpu in machine.gpus:
        yield Finding("ok", f"GPU {gpu.name}, {gpu.memory_bytes / 2**30:.0f} GiB")
        if not device_of(gpu).known:
            yield Finding("note", f"peak FLOP/s of {gpu.name} unknown: no MFU will be reported")
    yield _cluster(machine)
    if not machine.gpus:
        yield Finding(
            "note", "no GPU: training runs on the CPU", "" if shutil.which("nvidia-smi") is None else "check nvidia-smi"
        )
        return
    import torch

    if not torch.cuda.is_available():
        yield Finding(
            "FAIL", f"torch {torch.__version__} sees no GPU", "install a CUDA build of torch that fits the driver"
        )


def _cluster(machine: Machine) -> Finding:
    """What cluster=auto means here."""
    try:
        found = find(ClusterSection(), machine, current_allocation(), for_planning=True)
    except UsageError as error:
        return Finding("note", f"cluster=auto: {error}")
    each = f"{found.devices_per_node} x {found.device.name}" if machine.gpus or not found.here else found.device.name
    many = f"{found.nodes} nodes of " if found.nodes > 1 else ""
    memory = f"{found.host_memory_bytes / 2**30:.0f} GiB of memory" if found.host_memory_bytes else "memory unknown"
    rates = "facts of its data sheet" if found.device.accelerator == "gpu" and found.device.known else "estimated rates"
    return Finding("ok", f"cluster=auto: {found.name}, {many}{each}, {memory} a node, {rates}", found.device.warning)


def _slurm() -> Iterator[Finding]:
    if shutil.which("sinfo") is None:
        yield Finding("note", "no Slurm on this machine")
        return
    if os.environ.get("SLURM_JOB_ID"):
        step = current_allocation()
        where = f", {step}: {step.nodes} nodes with {step.tasks_per_node} tasks each" if step else ""
        yield Finding("ok", f"inside Slurm job {os.environ['SLURM_JOB_ID']}{where}")
    # partition, nodes up and down of all, GPUs of a node, time limit
    command = ["sinfo", "--noheader", "--format=%R|%F|%G|%l"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        yield Finding("note", "Slurm's commands are here, its controller does not answer", "run sinfo to see why")
        return
    for line in lines:
        partition, nodes, gpus, limit = line.split("|", 3)
        _, idle, _, total = nodes.split("/")
        shown = "no GPUs" if gpus == "(null)" else gpus
        yield Finding("ok", f"Slurm partition {partition}: {idle} of {total} nodes idle, {shown} a node, limit {limit}")


def _wandb() -> Iterator[Finding]:
    if os.environ.get("WANDB_API_KEY"):
        host = (
            (os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
            .split("://")[-1]
            .split("/")[0]
            .rpartition("@")[2]
        )
        reached = _reachable(host)
        yield (
            Finding("ok", "W&B key found")
            if reached
            else Finding(
                "note",
                f"W&B key found, {host} out of reach: runs track offline",
                "afterwards: wandb sync runs/RUN/wandb/offline-run-*",
            )
        )
    else:
        yield Finding(
            "note", "no W&B key: runs track offline", "export WANDB_API_KEY=... (from your W&B settings page)"
        )


def _hub() -> Iterator[Finding]:
    host = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").split("://")[-1].split("/")[0].rpartition("@")[2]
    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True"):
        yield Finding("note", "HF_HUB_OFFLINE is set: only cached hub data", "unset HF_HUB_OFFLINE")
    elif _reachable(host):
        yield Finding("ok", f"hub {host} reached")
    else:
        yield Finding("note", f"hub {host} out of reach", "train on files (data.path=FILES) or data=embedded")


def _reachable(host: str) -> bool:
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), timeout=3).close()
    except OSError:
        return False
    return True


def _paths() -> Iterator[Finding]:
    for folder, fix in ((Path("runs"), "choose another with runs_dir=DIR"), (cache_folder(), "set XDG_CACHE_HOME")):
        standing = folder
        while not standing.exists():
            standing = standing.parent
        try:
            with tempfile.NamedTemporaryFile(dir=standing):
                pass
        except OSError as error:
            yield Finding("FAIL", f"{folder} cannot be written: {error.strerror}", fix)
            continue
        free = shutil.disk_usage(standing).free
        if free < LOW_DISK_BYTES:
            yield Finding("note", f"{folder}: only {free / 2**30:.1f} GiB free", fix)
        else:
            yield Finding("ok", f"{folder} can be written, {free / 2**30:.0f} GiB free")
