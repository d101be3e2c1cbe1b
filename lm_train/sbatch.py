"""The job file of a plan: what Slurm is asked for, and the command that follows exactly this plan. Free of torch."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from lm_train.clusters import Cluster
from lm_train.errors import OutputError, UsageError
from lm_train.plan import Plan, made_for
from lm_train.recipe import LabelledData, Recipe

PLAN_WORDS = ("sbatch", "why", "probe", "format")
"""Words of `lm-train plan` that are none of the run."""
GPU_PROCESS_BYTES = 8 * 10**9
"""Host memory of a process that drives a GPU: libraries, pinned buffers, a checkpoint's pieces. An upper estimate."""
CPU_PROCESS_BYTES = 2 * 10**9
"""Host memory of a process on the CPU beside what is predicted for it. An upper estimate."""
WORKER_BYTES = 10**9
"""Of a process that loads data. An upper estimate."""
GPU_THREADS = 8
"""Cores that a process needs to drive a GPU, at most: it launches kernels from one, and tokenizes and writes with more."""
SUPERVISOR_BYTES = 10**9
_USUAL_SIGNAL_S = 120
"""As in slurm/train.sbatch."""
_SAFE = re.compile(r"[A-Za-z0-9_.,:+@%/-]+")
"""What a value of an #SBATCH line may be made of."""


def write(path: Path, words: Sequence[str], recipe: Recipe, plan: Plan, cluster: Cluster) -> list[str]:
    """Writes the job file, and beside it the plan that it follows, as `JOBFILE.plan.json`.

    Args:
        path: of the job file.
        words: with which the plan was asked for; those of the verb itself are left out.
        recipe: as the words resolve.
        plan: to be followed.
        cluster: that it was made for.

    Returns:
        What a person should know about the file, a line each.

    Raises:
        UsageError: if a value cannot stand in a job file, or there is no checkout to start from.
        OutputError: if it cannot be written.
    """
    if path.is_dir():
        raise OutputError(f"sbatch={path} is a folder; name a file in it, such as sbatch={path / 'job.sbatch'}")
    beside = path.with_name(f"{path.name}.plan.json").resolve()
    others = [word for word in words if not word.startswith("plan=")]
    text = job_file([*others, f"plan={beside}"], recipe, plan, cluster)
    threads = max(1, min(plan.threads_per_rank, cpus(plan, cluster) // plan.devices))
    followed = plan.model_copy(update={"made_for": made_for(recipe), "threads_per_rank": threads})
    if path.exists() and not _is_job_file(path):
        raise UsageError(f"sbatch={path}: is there already, and no job file of lm-train; give another path")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(followed.model_dump_json(indent=2) + "\n", encoding="utf-8")
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    except OSError as error:
        raise OutputError(
            f"cannot write {error.filename or path}: {error.strerror}; choose another sbatch=PATH"
        ) from None
    return notes(recipe, plan, cluster)


def _is_job_file(path: Path) -> bool:
    try:
        return "lm-train" in path.read_text(encoding="utf-8")[:2000]
    except (OSError, ValueError):
        return False


def job_file(words: Sequence[str], recipe: Recipe, plan: Plan, cluster: Cluster) -> str:
    """The text of the job file. It hands over to the checkout's slurm/train.sbatch, which requeues what stopped early.

    Args:
        words: of `lm-train train`; relative paths in them count from the present folder.
        recipe: as the words resolve.
        plan: decides nodes, GPUs, cores, memory and time.
        cluster: decides how Slurm is asked.

    Raises:
        UsageError: if a value cannot stand in a job file, or there is no checkout to start from.
    """
    site = cluster.site
    given = [word for word in words if word.partition("=")[0] not in PLAN_WORDS]
    options = {
        "job-name": f"lm-{re.sub(r'[^A-Za-z0-9_.-]+', '-', recipe.recipe).strip('-.') or 'train'}",
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "nodes": str(plan.nodes),
        "ntasks-per-node": "1",
        **_gpus(plan, cluster),
        "cpus-per-task": str(cpus(plan, cluster)),
        "mem": None if not (need := memory_bytes(plan, cluster)) else f"{math.ceil(need / 2**20)}M",
        "time": slurm_time(minutes(recipe, plan, cluster)),
        "signal": f"USR1@{_signal_seconds(plan)}",
        "open-mode": "append",
    }
    for key, value in options.items():
        if value is not None and not _SAFE.fullmatch(value):
            raise UsageError(
                f"{key}: {value!r} cannot stand in a job file; give a name of letters, digits, . _ - and :"
            )
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    lines.append("#SBATCH --requeue")
    setup = [f"module load {shlex.quote(module)} || exit 2" for module in site.modules]
    if site.container is not None:
        setup.append(f"export LM_TRAIN_CONTAINER={shlex.quote(site.container)}")
    command = " \\\n  ".join(['exec bash "$LM_TRAIN_ROOT/slurm/train.sbatch"', *map(shlex.quote, given)])
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"# {line}" for line in _head(recipe, plan, cluster)),
            *lines,
            "set -uo pipefail",
            "",
            f"export LM_TRAIN_ROOT={shlex.quote(str(_checkout()))}",
            f"cd -- {shlex.quote(str(Path.cwd()))} || exit 2",
            *setup,
            command,
            "",
        ]
    )


def cpus(plan: Plan, cluster: Cluster) -> int:
    """Cores of each node's one task: its ranks' threads and loader workers, at most the devices' share of the node."""
    threads, share = plan.threads_per_rank, cluster.cpu_cores_per_node
    if plan.accelerator == "gpu":
        share = max(1, share * plan.devices // cluster.devices_per_node)
        if plan.strategy != "zero3_offload":  # whose update runs on the CPU
            threads = min(threads, GPU_THREADS)
    wanted = plan.devices * (threads + plan.num_workers)
    return max(1, min(wanted, share))


def memory_bytes(plan: Plan, cluster: Cluster) -> int:
    """Host memory to ask for on each node, more rather than less; 0: what the partition gives by itself."""
    whole = cluster.host_memory_bytes
    if plan.prediction is None:
        if plan.accelerator == "cpu" or not whole:
            return whole
        return whole * plan.devices // cluster.devices_per_node
    memory = plan.prediction.memory
    each = plan.num_workers * WORKER_BYTES + round(memory.host * 1.25)
    each += GPU_PROCESS_BYTES if plan.accelerator == "gpu" else CPU_PROCESS_BYTES + round(memory.high * 1.25)
    need = plan.devices * each + SUPERVISOR_BYTES
    return min(need, whole) if whole else need


def minutes(recipe: Recipe, plan: Plan, cluster: Cluster) -> int | None:
    """The job's time limit: the upper end of the run's hours, and what lies between Slurm's signal and the end.

    None where nothing is predicted and the partition has no limit: then it is the partition's default.
    """
    most = math.floor(cluster.site.max_hours * 60 + 1e-6) if cluster.site.max_hours is not None else None
    if plan.prediction is None or not plan.steps_known:
        return most
    needed = math.ceil(_hours(recipe, plan) * 60 + _signal_seconds(plan) / 60)
    return needed if most is None else max(1, min(needed, most))


def notes(recipe: Recipe, plan: Plan, cluster: Cluster) -> list[str]:
    """Where the job file asks for less than the plan would need, or for a guess, and what follows of it."""
    told = []
    limit, partition = minutes(recipe, plan, cluster), cluster.site.partition or cluster.name
    if plan.prediction is None:
        told.append("nothing is predicted for this model: the job asks for all the time and memory that it may have")
    elif not plan.steps_known:
        told.append("how long the epochs take is known with the data: the job asks for all the time that it may have")
    elif limit is not None and limit < _hours(recipe, plan) * 60:
        told.append(
            f"the run may take {_hours(recipe, plan):.1f} h, and {partition} ends jobs after {limit / 60:.1f} h: it saves, "
            "is requeued by itself, and goes on"
        )
    if cluster.host_memory_bytes and plan.prediction is not None:
        asked = memory_bytes(plan, cluster)
        if asked == cluster.host_memory_bytes and plan.accelerator == "gpu":
            told.append(f"the job asks for all {asked / 1e9:.0f} GB of each node's memory")
    return told


def _hours(recipe: Recipe, plan: Plan) -> float:
    """Upper end of all that the job does: where the recipe means several folds, of one after the other."""
    assert plan.prediction is not None
    data = recipe.data
    runs = (data.folds or 1) if isinstance(data, LabelledData) and data.fold is None else 1
    return plan.prediction.hours.high * runs


def slurm_time(minutes: int | None) -> str | None:
    """`1-02:30:00` for Slurm."""
    if minutes is None:
        return None
    days, rest = divmod(minutes, 24 * 60)
    return f"{f'{days}-' if days else ''}{rest // 60:02d}:{rest % 60:02d}:00"


def _signal_seconds(plan: Plan) -> int:
    """How long before the time limit the run is told to save: two checkpoints and a minute, two minutes at least."""
    saving = plan.prediction.checkpoint_seconds.high if plan.prediction is not None else 0.0
    return max(_USUAL_SIGNAL_S, math.ceil(2 * saving) + 60)


def _gpus(plan: Plan, cluster: Cluster) -> dict[str, str]:
    if plan.accelerator == "cpu":
        return {}
    kind, _, name = cluster.site.gres.partition(":")
    if kind != "gpu":  # a site's own word
        return {"gres": f"{cluster.site.gres}:{plan.devices}"}
    return {"gpus-per-node": f"{name}:{plan.devices}" if name else str(plan.devices)}


def _head(recipe: Recipe, plan: Plan, cluster: Cluster) -> list[str]:
    """What the file is, for whoever opens it."""
    what = f"{plan.nodes} x {plan.devices} {plan.device_name}, {plan.strategy}, {plan.precision}"
    lines = [f"Written by lm-train plan: {recipe.recipe} on {cluster.name}", f"{what}, {plan.max_steps:,} steps"]
    if plan.prediction is not None:
        hours = plan.prediction.hours
        span = f"{hours.value:.2f} h expected, {hours.low:.2f} to {hours.high:.2f} h"
        lines.append(f"{span}; --time is the upper end and a reserve for the last checkpoint")
    lines = [re.sub(r"[^ -~]+", " ", line) for line in [*lines, *notes(recipe, plan, cluster)]]
    return [*lines, "Submit it with: lm-train submit job=THIS_FILE"]


def _checkout() -> Path:
    """Where slurm/train.sbatch lies: in the present folder, or beside the package."""
    for folder in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if (folder / "slurm" / "train.sbatch").exists():
            return folder
    raise UsageError(
        f"sbatch: no slurm/train.sbatch in {Path.cwd()} or beside the installed package; run lm-train plan in a checkout, on "
        "a file system that the nodes share"
    )
