"""`lm-train calibrate`: measures this machine or Slurm step, and writes what a plan can be made by. Free of torch."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from lm_train.calibrate.parts import Work
from lm_train.calibrate.strategies import strategy_costs
from lm_train.calibrate.table import table
from lm_train.clusters import Cluster, find
from lm_train.errors import ExitCode, LMTrainError, OutputError, UsageError
from lm_train.hardware import Machine, this_machine
from lm_train.interpreter import python
from lm_train.plan.rates import Calibration, calibrations_folder
from lm_train.plan.rates.calibration import Disk, Setting, Training, file_name, processor, torch_version
from lm_train.recipe import ClusterSection
from lm_train.runs import write_atomically
from lm_train.slurm import Allocation, current_allocation
from lm_train.supervisor import say

STRATEGIES_UNTIL_S = 250.0
"""Since the beginning: later no further strategy is tried, so that a calibration takes less than five minutes."""
PATIENCE_S = 900.0
"""How long the processes of one setting may take, on a machine that is busy with other things."""
JOINT_S = 400.0
"""How long the collectives of several tasks may take, of which the others wait here while the first measures by itself."""
NOISY = 0.15
"""Spread between repeats above which a machine is too busy to be measured."""
PACKAGES = ("lm-train", "torch", "lightning", "deepspeed")


class NotMeasured(LMTrainError):
    """A process that measures ended badly."""

    exit_code = ExitCode.BUG


def calibrate(words: Sequence[str]) -> int:
    """Runs the verb.

    Args:
        words: `out=FILE`, where it is written; `quick=true`, in seconds and roughly.
    """
    out, quick = _words(words)
    machine, allocation = this_machine(), current_allocation()
    cluster = find(ClusterSection(), machine, allocation)
    file = out or calibrations_folder() / file_name(
        cluster.device.name, cluster.cpu_cores_per_node, torch_version(), processor()
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if allocation is not None and allocation.tasks > 1 and not allocation.is_primary:
            _joint(machine, allocation, cluster, quick, file.parent)
            return ExitCode.DONE
        found = measure(machine, allocation, cluster, quick, file.parent)
        write_atomically(file, found.model_dump_json() + "\n")
    except OSError as error:
        raise OutputError(f"cannot write {error.filename or file}: {error.strerror}; give out=FILE") from None
    print(table(found))
    if found.noise > NOISY:
        say(
            f"lm-train: warning: repeats differ by {found.noise:.0%}: this machine is busy, and plans by this file will be as "
            "far off; calibrate again when it is quiet"
        )
    print(file)
    return ExitCode.DONE


def _words(words: Sequence[str]) -> tuple[Path | None, bool]:
    out, quick, problems = None, False, []
    for word in words:
        key, _, value = word.partition("=")
        if key == "out" and value:
            out = Path(value)
        elif key == "quick" and value in ("true", "false"):
            quick = value == "true"
        else:
            problems.append(f"{word}: lm-train calibrate takes out=FILE and quick=true")
    if out is not None and out.is_dir():
        problems.append(f"out: {out} is a folder; give a file, such as out={out / 'calibration.json'}")
    if problems:
        raise UsageError(problems)
    return out, quick


def measure(machine: Machine, allocation: Allocation | None, cluster: Cluster, quick: bool, place: Path) -> Calibration:
    """Everything; by several processes one after another, each with its own number of threads and neighbours."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=place, prefix=".calibrate-") as temporary:
        folder = Path(temporary)
        settings: list[Setting] = []
        first: dict[str, Any] = {}
        for ranks, threads, operations in _settings(machine, cluster, quick):
            say(f"calibrating: {ranks} process{'es' if ranks > 1 else ''} x {threads} threads")
            found = _run(_works(machine, ranks, threads, operations, quick, folder, training=not settings), folder)
            first = first or found
            setting = Setting.model_validate(found["setting"])
            if not operations:  # GPUs do not disturb one another
                alone = settings[0]
                setting = alone.model_copy(update={"ranks": setting.ranks, "collectives": setting.collectives})
            settings.append(setting)
        if allocation is not None and allocation.tasks > 1:
            say(f"calibrating: collectives of {allocation.tasks} tasks on {allocation.nodes} nodes")
            joint = _joint(machine, allocation, cluster, quick, place)
            if joint is not None:
                several = {"ranks": joint.ranks, "nodes": joint.nodes, "collectives": joint.collectives}
                settings.append(settings[-1].model_copy(update=several))
        training = first["training"]
        calibration = Calibration(
            device=cluster.device.name,
            processor=processor(),
            cores=cluster.cpu_cores_per_node,
            torch=torch_version(),
            versions={name: _version(name) for name in PACKAGES},
            date=date.today().isoformat(),
            quick=quick,
            noise=settings[0].noise,
            settings=tuple(settings),
            training=Training(**training["loop"], start_seconds=cluster.start_seconds),
            disk=Disk(**training["disk"]),
            offload_bandwidth=first["offload_bandwidth"],
            sample_seconds={"token": training["token_seconds"]},
        )
        if not quick and cluster.cpu_cores_per_node > 1 and allocation is None:
            say("calibrating: strategies on two processes")
            calibration = strategy_costs(calibration, cluster, folder, until=began + STRATEGIES_UNTIL_S)
    return calibration


def _settings(machine: Machine, cluster: Cluster, quick: bool) -> list[tuple[int, int, bool]]:
    """Processes, threads of each, and whether operations are timed; the first also trains."""
    cores = cluster.cpu_cores_per_node
    if machine.gpus:
        return [(1, max(1, cores // len(machine.gpus)), True)] + (
            [(len(machine.gpus), 1, False)] if len(machine.gpus) > 1 else []
        )
    chosen = [(1, cores, True)]
    if not quick and cores > 1:
        chosen += [(1, 1, True), (2, cores // 2, True)]
    return chosen


def _works(
    machine: Machine, ranks: int, threads: int, operations: bool, quick: bool, folder: Path, training: bool
) -> list[Work]:
    return [
        Work(
            rank=rank,
            ranks=ranks,
            nodes=1,
            threads=threads,
            gpu=rank if machine.gpus else None,
            quick=quick,
            operations=operations,
            training=training,
            store=str(folder / f"store-{ranks}-{threads}"),
            place=str(folder),
        )
        for rank in range(ranks)
    ]


def _joint(machine: Machine, allocation: Allocation, cluster: Cluster, quick: bool, place: Path) -> Setting | None:
    """Collectives of all ranks of a Slurm step; each of its tasks calls this. Only the primary has the result."""
    each = max(1, cluster.devices_per_node // allocation.tasks_per_node)
    first = (allocation.node_rank * allocation.tasks_per_node + allocation.local_task) * each
    store = place / f".calibrate-{allocation.attempt}"
    works = [
        Work(
            rank=first + number,
            ranks=allocation.tasks * each,
            nodes=allocation.nodes,
            threads=1,
            gpu=(number if len(machine.gpus) == each else allocation.local_task * each + number)
            if machine.gpus
            else None,
            quick=quick,
            operations=False,
            training=False,
            store=str(store),
            place=str(place),
        )
        for number in range(each)
    ]
    with tempfile.TemporaryDirectory(dir=place, prefix=".calibrate-") as folder:
        try:
            found = _run(works, Path(folder), JOINT_S)
        except NotMeasured as error:
            if allocation.is_primary:
                say(f"lm-train: warning: collectives between the tasks were not measured ({error})")
            return None
        finally:
            if allocation.is_primary:
                store.unlink(missing_ok=True)
    if not allocation.is_primary:
        return None
    return Setting.model_validate(found["setting"])


def _run(works: Sequence[Work], folder: Path, patience: float = PATIENCE_S) -> dict[str, Any]:
    """Runs the processes side by side; what rank 0 found, if it is among them."""
    out = folder / "found.json"
    out.unlink(missing_ok=True)
    processes = []
    for work in works:
        environment = {**os.environ, "OMP_NUM_THREADS": str(work.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # these processes meet by themselves
            environment.pop(name, None)
        command = [*python(), "-m", "lm_train.calibrate.worker", work.model_dump_json(), str(out)]
        with (folder / f"log-{work.rank}").open("wb") as log:
            processes.append(
                subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )
    try:
        deadline = time.monotonic() + patience
        for work, process in zip(works, processes, strict=True):
            code = process.wait(timeout=max(1.0, deadline - time.monotonic()))
            if code != 0:
                text = (folder / f"log-{work.rank}").read_text(encoding="utf-8", errors="replace").strip()
                raise NotMeasured(f"a process that measures ended with exit code {code}: {text.splitlines()[-1:]}")
    except subprocess.TimeoutExpired:
        raise NotMeasured(
            f"measuring took longer than {patience:.0f} s; try again on a quiet machine, or quick=true"
        ) from None
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    return _read(out) if out.exists() else {}


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
