"""`lm-train submit`: checks a job file against the limits of its partition, then gives it to Slurm. Free of torch."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lm_train.clusters.partitions import NodeKind, Partition, answer_of, hours_of, partition_named
from lm_train.errors import ExitCode, UsageError
from lm_train.recipe.checks import near_path
from lm_train.recipe.explain import name_of, nearest

_SHORT = {"J": "job-name", "p": "partition", "A": "account", "q": "qos", "N": "nodes", "n": "ntasks", "c": "cpus-per-task",
          "t": "time", "G": "gpus"}  # fmt: skip
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Job(NamedTuple):
    """What a job file asks Slurm for."""

    partition: str | None
    account: str | None
    qos: str | None
    nodes: int
    node: NodeKind
    """At least this of each node."""
    hours: float | None


def submit(job_file: Path) -> int:
    """Checks a job file and submits it; the job's id is the last line of standard output.

    Raises:
        UsageError: with every limit that the job does not keep, one line each, or with what sbatch says.
    """
    try:
        text = job_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UsageError(f"job={job_file}: cannot read: {reason}{near_path(str(job_file))}") from None
    job = read_job(text, str(job_file))
    partition = partition_named(job.partition, "partition")
    problems = check(job, partition)
    if problems:
        raise UsageError([f"{job_file}: {problem}" for problem in problems])
    print(f"partition {partition.name} has what {job_file} asks for", file=sys.stderr)
    print(answer_of("sbatch", "--parsable", str(job_file)).strip().partition(";")[0], flush=True)
    return ExitCode.DONE


def file_of(words: Sequence[str]) -> Path:
    """The job file that the words of `lm-train submit` name: `job=PATH`, or the path alone.

    Raises:
        UsageError: if they name none, or more.
    """
    files = [word.removeprefix("job=") for word in words if word.startswith("job=") or "=" not in word]
    others = [word for word in words if "=" in word and not word.startswith("job=")]
    if others:
        raise UsageError(
            f"{name_of((others[0].partition('=')[0],))}: lm-train submit takes job=PATH; with recipe=... it needs sbatch=PATH, "
            "where the job file is to be written"
        )
    if len(files) != 1 or not files[0]:
        raise UsageError(
            "which job? Give lm-train submit job=PATH, a file that lm-train plan recipe=... sbatch=PATH wrote"
        )
    return Path(files[0]).expanduser()


def read_job(text: str, what: str, environ: Mapping[str, str] = os.environ) -> Job:
    """What the #SBATCH lines ask for; as with sbatch, the environment's SBATCH_PARTITION and its like win over them.

    Raises:
        UsageError: if there is no such line, or one cannot be understood.
    """
    options = _options(text)
    if not options:
        raise UsageError(
            f"{what}: no #SBATCH lines; expected a job file that lm-train plan recipe=... sbatch=PATH wrote"
        )
    for key in ("partition", "account", "qos"):
        value = environ.get(f"SBATCH_{key.upper()}") or options.get(key)
        if value:
            options[key] = value
    tasks = _whole(options, "ntasks-per-node", 1, what)
    gpus, kind = 0, ""
    for key in ("gpus-per-node", "gpus", "gres"):
        if key in options:
            words = options[key].removeprefix("gpu:").split(":") if key == "gres" else options[key].split(":")
            if not words[-1].isdigit():
                raise UsageError(f"{what}: --{key}={options[key]}: expected a number of GPUs, such as 8 or h100:8")
            gpus, kind = int(words[-1]), words[0] if len(words) > 1 else ""
            break
    hours = hours_of(options["time"]) if "time" in options else None
    if "time" in options and hours is None and options["time"].upper() not in ("UNLIMITED", "INFINITE"):
        raise UsageError(f"{what}: --time={options['time']}: expected Slurm's notation, such as 1-02:30:00")
    return Job(
        partition=options.get("partition"),
        account=options.get("account"),
        qos=options.get("qos"),
        nodes=_whole(options, "nodes", 1, what),
        node=NodeKind(
            tasks * _whole(options, "cpus-per-task", 1, what), _bytes(options.get("mem", "0"), what), gpus, kind
        ),
        hours=hours,
    )


def check(job: Job, partition: Partition) -> list[str]:
    """What of a job its partition does not give, a line each, with what it does give."""
    problems = []
    name = f"partition {partition.name}"
    if not partition.up:
        problems.append(f"{name} takes no jobs now; see scontrol show partition {partition.name}")
    if partition.max_hours is not None and job.hours is not None and job.hours > partition.max_hours + 1e-6:
        problems.append(
            f"--time: {job.hours:.2f} h asked, {name} allows {partition.max_hours:.2f} h; plan again with "
            f"budget.hours={partition.max_hours:g}, or take another partition"
        )
    if partition.max_nodes is not None and job.nodes > partition.max_nodes:
        problems.append(f"--nodes: {job.nodes} asked, {name} gives a job {partition.max_nodes}; plan again with "
                        f"cluster.nodes={partition.max_nodes}")  # fmt: skip
    for word, given, known in (("account", job.account, partition.accounts), ("qos", job.qos, partition.qos)):
        if given is not None and known and given not in known:
            near = nearest(given, known)
            hint = f"did you mean {near}? It takes" if near else "it takes"
            problems.append(f"--{word}={given}: {name} does not take it; {hint} {', '.join(known)}")
    fitting = sum(partition.kinds_like(job.node).values())
    if fitting < job.nodes:
        asked = f"{job.nodes} node{'s' if job.nodes > 1 else ''} with {_described(job.node)} each"
        has = (
            ", ".join(f"{count} with {_described(kind)}" for kind, count in partition.kinds.items())
            or "none in service"
        )
        problems.append(f"{asked} asked, {name} has {has}; plan again with cluster.partition={partition.name}")
    return problems


def _described(kind: NodeKind) -> str:
    gpus = f"{kind.gpus} GPU{'s' if kind.gpus != 1 else ''}" if kind.gpus else "no GPU"
    of_type = f" ({kind.gpu_type})" if kind.gpus and kind.gpu_type else ""
    memory = f", {kind.memory_bytes / 2**30:.1f} GiB" if kind.memory_bytes else ""
    return f"{gpus}{of_type}, {kind.cpus} CPUs{memory}"


def _options(text: str) -> dict[str, str]:
    """Of the #SBATCH lines before the first command, as sbatch reads them."""
    options: dict[str, str] = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
            while words:
                word = words.pop(0)
                if word.startswith("--"):
                    key, _, value = word[2:].partition("=")
                elif match := re.fullmatch(r"-(\w)=?(.*)", word):
                    key, value = _SHORT.get(match[1], match[1]), match[2]
                else:
                    continue
                if not value and words and not words[0].startswith("-"):
                    value = words.pop(0)
                options[key] = value
    return options


def _whole(options: Mapping[str, str], key: str, default: int, what: str) -> int:
    text = options.get(key)
    if text is None:
        return default
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"{what}: --{key}={text}: expected a whole number of at least 1")
    return int(text)


def _bytes(text: str, what: str) -> int:
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text.upper())
    if match is None:
        raise UsageError(f"{what}: --mem={text}: expected a size such as 64G")
    return int(match[1]) * _UNITS[match[2] or "M"]
