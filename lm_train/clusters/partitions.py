"""Slurm's partitions: their limits and nodes, as `scontrol` and `sinfo` report them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lm_train.errors import UsageError
from lm_train.recipe.explain import nearest

ANSWER_S = 10.0
"""How long Slurm's controller is waited for."""
_GONE = ("DOWN", "DRAIN", "FAIL", "MAINT", "NO_RESPOND", "POWERED_DOWN", "UNKNOWN", "FUTURE")
"""States, or parts of them, of nodes that take no jobs; a reboot or a drain may end, an allocation certainly does."""


class NoSlurmError(UsageError):
    """Slurm's commands are not here, or its controller does not answer."""


class NodeKind(NamedTuple):
    """Equal nodes."""

    cpus: int
    memory_bytes: int
    gpus: int
    gpu_type: str
    """As in gres; empty where the site gives none."""


@dataclass(frozen=True)
class Partition:
    name: str
    is_default: bool
    up: bool
    max_hours: float | None
    """None: no limit."""
    max_nodes: int | None
    kinds: Mapping[NodeKind, int]
    """How many nodes there are of each kind, those that take no jobs left out."""
    accounts: tuple[str, ...] = ()
    """Which may use it; empty: all."""
    qos: tuple[str, ...] = ()
    """Which it takes; empty: all."""

    @property
    def main_kind(self) -> NodeKind:
        """The nodes that together have most GPUs, else most cores."""
        return max(self.kinds, key=lambda kind: (kind.gpus * self.kinds[kind], kind.cpus * self.kinds[kind]))

    def kinds_like(self, asked: NodeKind) -> dict[NodeKind, int]:
        """The nodes that have at least what is asked of one."""
        return {
            kind: count
            for kind, count in self.kinds.items()
            if kind.cpus >= asked.cpus
            and kind.memory_bytes >= asked.memory_bytes
            and kind.gpus >= asked.gpus
            and (not asked.gpu_type or asked.gpus == 0 or kind.gpu_type == asked.gpu_type)
        }


def slurm_is_here() -> bool:
    """Whether Slurm's commands are installed and know of a cluster; where they are installed only, there is none."""
    if shutil.which("sinfo") is None or shutil.which("scontrol") is None:
        return False
    try:
        asked = subprocess.run(["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True, timeout=ANSWER_S)
    except (OSError, subprocess.SubprocessError):
        return True  # the questions that follow say what is wrong
    return "configuration source" not in asked.stderr


def partitions() -> dict[str, Partition]:
    """All partitions by name, the default one first.

    Raises:
        NoSlurmError: if Slurm's controller does not answer.
    """
    nodes = _nodes(answer_of("sinfo", "--noheader", "--Node", "--exact", "--format=%N|%R|%c|%m|%G|%T"))
    found = {}
    for line in answer_of("scontrol", "--oneliner", "show", "partition").splitlines():
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        name = fields.get("PartitionName")
        if name:
            found[name] = Partition(
                name=name,
                is_default=fields.get("Default") == "YES",
                up=fields.get("State", "UP") == "UP",
                max_hours=hours_of(fields.get("MaxTime", "UNLIMITED")),
                max_nodes=_number(fields.get("MaxNodes", "")),
                kinds=nodes.get(name, {}),
                accounts=_listed(fields.get("AllowAccounts", "ALL")),
                qos=_listed(fields.get("AllowQos", "ALL")),
            )
    return dict(sorted(found.items(), key=lambda item: not item[1].is_default))


def partition_named(name: str | None, what: str = "cluster.partition") -> Partition:
    """The partition of this name; None: the default one.

    Raises:
        UsageError: if there is none such, or Slurm does not answer.
    """
    known = partitions()
    listed = ", ".join(known) or "none that you may see"
    if name is None:
        first = next(iter(known.values()), None)
        if first is None or (not first.is_default and len(known) > 1):
            raise UsageError(f"{what}: Slurm has no default partition here; give {what}=NAME, there are {listed}")
        return first
    if name not in known:
        near = nearest(name, known)
        hint = f"did you mean {near}? There are" if near else "there are"
        raise UsageError(f"{what}: Slurm has no partition {name}; {hint} {listed}")
    return known[name]


def answer_of(*command: str) -> str:
    """What one of Slurm's commands prints.

    Raises:
        NoSlurmError: if it is not here, or its controller does not answer.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
    except FileNotFoundError:
        raise NoSlurmError(f"no {command[0]} here: this is no machine of a Slurm cluster") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise NoSlurmError(f"{command[0]} does not answer ({type(error).__name__}); run it to see why") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise NoSlurmError(f"{command[0]} fails: {said[0]}")
    return done.stdout


def hours_of(text: str) -> float | None:
    """Hours of Slurm's notation ([DAYS-]HH:MM:SS, MM:SS, MM); None for no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, first, second, third = (int(part) if part else 0 for part in match.groups())
    if match[1] is not None:  # DAYS-HOURS[:MINUTES[:SECONDS]]
        return 24 * days + first + second / 60 + third / 3600
    if match[4] is not None:
        return first + second / 60 + third / 3600
    return first / 60 + second / 3600


def _nodes(listing: str) -> dict[str, dict[NodeKind, int]]:
    found: dict[str, Counter[NodeKind]] = {}
    for line in listing.splitlines():
        parts = line.split("|")
        if len(parts) != 6:
            continue
        _, partition, cpus, mebibytes, gres, state = parts
        kinds = found.setdefault(partition, Counter())
        if not any(gone in state.upper() for gone in _GONE) and not state.endswith("*"):
            gpus, gpu_type = _gpus(gres)
            kinds[NodeKind(_number(cpus) or 0, (_number(mebibytes) or 0) << 20, gpus, gpu_type)] += 1
    return {partition: dict(kinds) for partition, kinds in found.items()}


def _gpus(gres: str) -> tuple[int, str]:
    """Number and type of GPUs: `gpu:h100:8(S:0-1),nvme:1` has 8 of type h100; of several types the most numerous."""
    best: tuple[int, str] = (0, "")
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        words: Sequence[str] = part.split(":")
        if words[0] == "gpu":
            count = int(words[-1]) if words[-1].isdigit() else 1
            kind = words[1] if len(words) > 1 and not words[1].isdigit() else ""
            best = max(best, (count, kind))
    return best


def _listed(text: str) -> tuple[str, ...]:
    return () if text in ("ALL", "", "(null)") else tuple(text.split(","))


def _number(text: str) -> int | None:
    match = re.match(r"\d+", text)
    return int(match[0]) if match else None
