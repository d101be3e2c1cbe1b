"""What the Slurm step around this process gives it, from the step's environment variables. Free of torch.

Only a step counts, that is, what `srun` started. The shell of `salloc` and the batch script's own shell carry variables of
the job too, but nothing was started there several times: they are plain machines.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lm_train.errors import UsageError
from lm_train.hardware import Machine

_INTERACTIVE_STEP = "4294967290"
"""The shell of `salloc` where a site has it run on the first node (Slurm's `use_interactive_step`)."""
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


@dataclass(frozen=True)
class Allocation:
    """One task's view of a Slurm step: `nodes` x `tasks_per_node` tasks, each a supervisor."""

    job_id: str
    step_id: str
    nodes: int
    tasks_per_node: int
    node_rank: int
    """Number of this task's node within the step, from 0."""
    local_task: int
    """Number of this task on its node, from 0."""
    node_name: str
    restart_count: int = 0
    """How often Slurm has requeued the job."""
    batch: bool = False
    """Whether the step belongs to a batch job, which may be requeued and then finds its run by the job's id."""
    array_job_id: str | None = None
    array_task_id: str | None = None
    cpus_on_node: int | None = None
    """CPUs of this node that the job has; None where Slurm does not say."""
    gpus_on_node: int | None = None
    """GPUs of this node that the job has; None in a job that asked for none."""
    binds_gpus: bool = False
    """Whether Slurm shows each task GPUs of its own."""

    @property
    def is_primary(self) -> bool:
        """Whether this task speaks, plans and writes for all; it also starts rank 0."""
        return self.node_rank == 0 and self.local_task == 0

    @property
    def tasks(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def run_suffix(self) -> str:
        """What makes the run's name the job's own, and the same one after a requeue."""
        if self.array_job_id is not None and self.array_task_id is not None:
            return f"{self.array_job_id}_{self.array_task_id}"
        return self.job_id if self.batch else f"{self.job_id}.{self.step_id}"

    @property
    def attempt(self) -> str:
        """This start of the step: another one after a requeue."""
        return f"{self.job_id}.{self.step_id}.{self.restart_count}"

    def __str__(self) -> str:
        return f"Slurm step {self.job_id}.{self.step_id}"


def current_allocation(environ: Mapping[str, str] = os.environ) -> Allocation | None:
    """The step that this process is a task of; None outside of one.

    Raises:
        UsageError: if the nodes do not all have the same number of tasks.
    """
    if environ.get("SLURM_STEP_ID") in (None, _INTERACTIVE_STEP) or "SLURM_PROCID" not in environ:
        return None
    counts = _task_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    nodes = _count(environ, "SLURM_STEP_NUM_NODES", len(counts))
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        if not re.fullmatch(r"\w{1,40}", environ.get(name, "0")):  # the run's name is made of them
            raise UsageError(f"{name}={environ[name][:80]!r}: expected a number; start with srun")
    if len(set(counts)) > 1:
        shown = ", ".join(map(str, counts[:8])) + (" ..." if len(counts) > 8 else "")
        raise UsageError(
            f"this Slurm step has {shown} tasks on its {nodes} nodes, and training needs the same number on each; try srun "
            f"--nodes={nodes} --ntasks={nodes * max(counts)} --ntasks-per-node={max(counts)}"
        )
    binding = environ.get("SLURM_TRES_BIND", "") + environ.get("SLURMD_TRES_BIND", "")
    return Allocation(
        job_id=environ.get("SLURM_JOB_ID", "0"),
        step_id=environ["SLURM_STEP_ID"],
        nodes=nodes,
        tasks_per_node=counts[0],
        node_rank=_count(environ, "SLURM_NODEID"),
        local_task=_count(environ, "SLURM_LOCALID"),
        node_name=environ.get("SLURMD_NODENAME", "this node"),
        restart_count=_count(environ, "SLURM_RESTART_COUNT"),
        batch=environ.get("ENVIRONMENT") == "BATCH",
        array_job_id=environ.get("SLURM_ARRAY_JOB_ID"),
        array_task_id=environ.get("SLURM_ARRAY_TASK_ID"),
        cpus_on_node=_number(environ.get("SLURM_CPUS_ON_NODE")),
        gpus_on_node=_number(environ.get("SLURM_GPUS_ON_NODE")),
        binds_gpus="gpu" in binding or "SLURM_GPUS_PER_TASK" in environ,
    )


class TimeLimit:
    """When Slurm will end the job, so that the run is saved before, whether or not the job asked for a signal.

    Args:
        job_id: whose limit.
        reserve_s: seconds that the run needs to save and end; of a short job at most a quarter of what is left now.
        ask: seconds that a job has left, None where Slurm does not say.
    """

    def __init__(self, job_id: str, reserve_s: float, ask: Callable[[str], float | None] | None = None) -> None:
        self.job_id, self.ask = job_id, ask or seconds_left
        left = self.ask(job_id)
        self.reserve_s = reserve_s if left is None else min(reserve_s, left / 4)
        self._until = _from_now(left)

    def is_near(self) -> bool:
        """Whether it is time to save; a limit that was prolonged meanwhile counts as it is now."""
        if time.monotonic() < self._until - self.reserve_s:
            return False
        left = self.ask(self.job_id)
        if left is not None:  # else what Slurm has said before holds
            self._until = _from_now(left)
        return time.monotonic() >= self._until - self.reserve_s


def seconds_left(job_id: str) -> float | None:
    """Until the time limit of a job, as Slurm's controller says; infinite without one; None where it cannot be asked."""
    command = ["squeue", "--noheader", f"--jobs={job_id}", "--format=%L"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.stdout.strip() == "UNLIMITED":
        return float("inf")
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", done.stdout.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds


def _from_now(left: float | None) -> float:
    return float("inf") if left is None else time.monotonic() + left


def tasks_see_their_own_gpus(machine: Machine, allocation: Allocation) -> bool:
    """Whether each task of a node is shown other GPUs, as `--gpus-per-task` and `--gpu-bind` do."""
    seen, given, tasks = len(machine.gpus), allocation.gpus_on_node, allocation.tasks_per_node
    if tasks == 1 or not seen or given is None or seen >= given:
        return False
    return seen * tasks == given or (allocation.binds_gpus and seen * tasks < given)


def speaks(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process prints what all tasks of its step have to say."""
    if environ.get("SLURM_STEP_ID") is None:
        return True
    return environ.get("SLURM_NODEID", "0") == "0" and environ.get("SLURM_LOCALID", "0") == "0"


def _task_counts(text: str) -> list[int]:
    """Tasks of each node, from Slurm's notation: `2(x3),1` is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = _COUNT.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"SLURM_STEP_TASKS_PER_NODE={text}: expected numbers such as 2(x3),1; start with srun")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _count(environ: Mapping[str, str], name: str, default: int = 0) -> int:
    text = environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal()):
        raise UsageError(f"{name}={text[:80]!r}: expected a number; start with srun")
    return int(text)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def node_names(nodelist: str) -> list[str]:
    """The nodes of Slurm's notation in its order: `n[1-2,08],login` is n1, n2, n08, login."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        names += _expanded(part)
    return names


def _expanded(part: str) -> list[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        return [part]
    inside, _, tail = rest.partition("]")
    numbers: list[str] = []
    for piece in inside.split(","):
        first, _, last = piece.partition("-")
        numbers += [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]
    return [f"{head}{number}{end}" for number in numbers for end in _expanded(tail)]
