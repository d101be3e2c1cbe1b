"""What a Slurm step means for nodes, ranks and devices: variables in, layout or one line of refusal out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lm_train import slurm
from lm_train.errors import UsageError
from lm_train.hardware import GPU, Machine
from lm_train.plan import Place, Plan, make_plan, places
from lm_train.recipe import load
from lm_train.runs import run_name
from lm_train.slurm import Allocation, TimeLimit, current_allocation, node_names, seconds_left

CPU = Machine(cpu_cores=8, gpus=())


def gpus(count: int) -> Machine:
    return Machine(8, tuple(GPU("NVIDIA H100 80GB HBM3", 80 << 30, (9, 0)) for _ in range(count)))


def step(tasks: str = "1", node: int = 0, task: int = 0, **more: str) -> dict[str, str]:
    """A step's environment, as Slurm 22.05 was seen to set it."""
    return {
        "SLURM_JOB_ID": "12",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_NODES": str(
            sum(int(p.split("x")[-1].rstrip(")")) if "x" in p else 1 for p in tasks.split(","))
        ),
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_PROCID": "0",
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(task),
        "SLURMD_NODENAME": f"n{node + 1}",
        **more,
    }


def allocation(*args: str | int, **more: str) -> Allocation:
    found = current_allocation(step(*args, **more))  # type: ignore[arg-type]
    assert found is not None
    return found


def plan(machine: Machine, given: Allocation | None, *words: str) -> Plan:
    return make_plan(load(["recipe=gpt_debug", *words]), machine, given)


def problem(machine: Machine, given: Allocation | None, *words: str) -> str:
    with pytest.raises(UsageError) as caught:
        plan(machine, given, *words)
    (line,) = caught.value.problems
    return line


def test_only_a_step_counts() -> None:
    assert current_allocation({}) is None
    assert current_allocation({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"}) is None
    assert current_allocation(step() | {"SLURM_STEP_ID": "4294967290"}) is None, "the shell of salloc"
    assert allocation("2(x3)").tasks == 6


def test_unequal_tasks_are_refused_with_flags() -> None:
    with pytest.raises(
        UsageError, match=r"2, 2, 1 tasks on its 3 nodes.*srun --nodes=3 --ntasks=6 --ntasks-per-node=2"
    ):
        current_allocation(step("2(x2),1"))


def test_names_are_the_jobs() -> None:
    recipe = load(["recipe=gpt_debug"])
    assert run_name(recipe, None) is None
    assert run_name(recipe, allocation()) == "gpt_debug-12.0"
    assert run_name(recipe, allocation(ENVIRONMENT="BATCH")) == "gpt_debug-12"
    array = {"SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "3"}
    assert run_name(recipe, allocation(ENVIRONMENT="BATCH", **array)) == "gpt_debug-10_3"
    assert run_name(load(["recipe=gpt_debug", "name=mine"]), allocation()) == "mine"
    first, again = allocation(), allocation(SLURM_RESTART_COUNT="1")
    assert run_name(recipe, first) == run_name(recipe, again)
    assert first.attempt != again.attempt


@pytest.mark.parametrize(
    ("machine", "tasks", "more", "words", "nodes", "devices"),
    [
        (CPU, "1", {}, (), 1, 1),
        (CPU, "1(x2)", {}, (), 2, 1),
        (CPU, "2(x2)", {}, (), 2, 2),
        (CPU, "1(x2)", {}, ("trainer.devices=4",), 2, 4),
        (CPU, "2(x2)", {}, ("trainer.devices=4",), 2, 4),
        (CPU, "2(x2)", {"SLURM_GPUS_ON_NODE": "2"}, (), 2, 2),
        (gpus(4), "1(x2)", {"SLURM_GPUS_ON_NODE": "4"}, (), 2, 4),
        (gpus(4), "4(x2)", {"SLURM_GPUS_ON_NODE": "4"}, (), 2, 4),
        (gpus(4), "2", {"SLURM_GPUS_ON_NODE": "4"}, (), 1, 4),
        (gpus(4), "4(x2)", {}, (), 2, 4),  # GPUs that Slurm does not manage
        (gpus(1), "4(x2)", {"SLURM_GPUS_ON_NODE": "4"}, (), 2, 4),  # --gpus-per-task=1
        (gpus(2), "2", {"SLURM_GPUS_ON_NODE": "4", "SLURM_TRES_BIND": "gres:gpu:per_task:2"}, (), 1, 4),
        (gpus(1), "2", {"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS_PER_TASK": "1"}, (), 1, 2),
        (gpus(2), "2", {"SLURM_GPUS_ON_NODE": "8"}, (), 1, 2),  # a step with some of the job's GPUs
        (gpus(3), "1", {"SLURM_GPUS_ON_NODE": "3"}, (), 1, 2),  # 16 do not divide over 3
        (gpus(4), "1(x2)", {"SLURM_GPUS_ON_NODE": "4"}, ("trainer.devices=2", "trainer.num_nodes=2"), 2, 2),
        (gpus(4), "1(x2)", {}, ("data.micro_batch_size=8",), 2, 1),
    ],
)
def test_layout(
    machine: Machine, tasks: str, more: dict[str, str], words: tuple[str, ...], nodes: int, devices: int
) -> None:
    made = plan(machine, allocation(tasks, **more), *words)
    assert (made.nodes, made.devices) == (nodes, devices)
    assert (made.strategy == "single") == (nodes * devices == 1)
    assert made.micro_batch_size * made.accumulate_grad_batches * made.world_size == 16
    each = allocation(tasks, **more).tasks_per_node
    ranks = [
        place.rank
        for node in range(nodes)
        for task in range(each)
        for place in places(made, machine, allocation(tasks, node, task, **more))
    ]
    assert ranks == list(range(made.world_size)), "each rank once, in the order of the nodes"


def test_places_of_shared_and_of_own_gpus() -> None:
    shared = {"SLURM_GPUS_ON_NODE": "2"}
    made = plan(gpus(2), allocation("2(x2)", **shared))
    assert places(made, gpus(2), allocation("2(x2)", 1, 1, **shared)) == [Place(3, 1, 1, 2)]
    made = plan(gpus(1), allocation("2(x2)", **shared))
    assert places(made, gpus(1), allocation("2(x2)", 1, 1, **shared)) == [Place(3, 1, 0, 1)]
    made = plan(gpus(2), allocation("1(x2)", **shared))
    assert places(made, gpus(2), allocation("1(x2)", 1, 0, **shared)) == [Place(2, 1, 0, 2), Place(3, 1, 1, 2)]
    with pytest.raises(UsageError, match=r"n2 shows 1 GPUs, the plan made on the first node needs 2.*--exclude=n2"):
        places(made, gpus(1), allocation("1(x2)", 1, 0, **shared))


@pytest.mark.parametrize(
    ("machine", "tasks", "more", "words", "said"),
    [
        (CPU, "1(x2)", {}, ("trainer.num_nodes=4",), "4 asked, this Slurm step has 2; try srun --nodes=4"),
        (CPU, "2(x2)", {}, ("trainer.devices=3", "data.global_batch_size=12"), "try srun --ntasks-per-node=3, or"),
        (CPU, "2", {}, ("trainer.strategy=single",), "trainer.strategy=single is one process"),
        (CPU, "1(x2)", {}, ("debug=true",), "debug=true is one process, Slurm step 12.0 has 2 tasks; try srun --nodes=1"),
        (CPU, "1(x3)", {}, (), "16 is not a multiple of 3 ranks; try data.global_batch_size=15, or srun --nodes=2"),
        (CPU, "3(x2)", {}, (), "6 ranks; try data.global_batch_size=18, or srun --nodes=2 --ntasks-per-node=2"),
        (CPU, "2", {}, ("data.micro_batch_size=16",), "2 ranks x data.micro_batch_size=16; try data.global_batch_size=32, or"),
        (gpus(2), "4", {"SLURM_GPUS_ON_NODE": "2"}, (), "4 tasks and 2 GPUs on each node; try srun --ntasks-per-node=2"),
        (gpus(3), "2", {"SLURM_GPUS_ON_NODE": "3"}, (), "2 tasks and 3 GPUs on each node; try srun --ntasks-per-node=3"),
        (gpus(2), "1(x2)", {"SLURM_GPUS_ON_NODE": "2"}, ("trainer.devices=4",), "or srun --gpus-per-node=4"),
        (
            gpus(2),
            "4",
            {"SLURM_GPUS_ON_NODE": "4", "SLURM_TRES_BIND": "gres:gpu:closest"},
            (),
            "see 2 of its 4 GPUs each, some of them the same; try srun --ntasks-per-node=4 --gpus-per-task=1",
        ),
    ],
)  # fmt: skip
def test_contradictions(machine: Machine, tasks: str, more: dict[str, str], words: tuple[str, ...], said: str) -> None:
    assert said in problem(machine, allocation(tasks, **more), *words)


def test_several_nodes_need_slurm() -> None:
    said = problem(CPU, None, "trainer.num_nodes=2")
    assert said.startswith("trainer.num_nodes: 2 asked, there is no Slurm step around it; try srun --nodes=2")


@pytest.mark.parametrize(
    ("tasks", "cpus", "words", "threads"),
    [
        ("1", None, (), 8),
        ("1", "4", (), 4),
        ("2", "4", (), 2),
        ("1", "4", ("trainer.devices=2",), 2),
        ("4", "2", (), 1),
    ],
)
def test_threads_are_the_tasks_own(tasks: str, cpus: str | None, words: tuple[str, ...], threads: int) -> None:
    more = {} if cpus is None else {"SLURM_CPUS_ON_NODE": cpus}
    assert plan(CPU, allocation(tasks, **more), *words).threads_per_rank == threads


def test_node_names() -> None:
    assert node_names("n[1-2,08],login,r[1-2]n[09-10]") == [
        "n1", "n2", "n08", "login", "r1n09", "r1n10", "r2n09", "r2n10"
    ]  # fmt: skip
    assert node_names("") == []


@pytest.mark.parametrize(
    ("says", "seconds"),
    [
        ("echo 1-02:03:04", 93784.0),
        ("echo 2:03:04", 7384.0),
        ("echo 0:59", 59.0),
        ("echo UNLIMITED", float("inf")),
        ("echo INVALID", None),
        ("echo no such job >&2; exit 1", None),
    ],
)
def test_what_slurm_says_of_a_jobs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, seconds: float | None
) -> None:
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{says}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert seconds_left("7") == seconds


def test_a_time_limit_is_near_when_saving_needs_the_rest_and_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(slurm.time, "monotonic", lambda: clock[0])
    left: list[float | None] = [1000.0]
    limit = TimeLimit("7", 60.0, lambda job: left[0])
    clock[0] = 939.0
    assert not limit.is_near()
    clock[0], left[0] = 941.0, 5000.0
    assert not limit.is_near(), "it was prolonged"
    clock[0], left[0] = 5890.0, 51.0
    assert limit.is_near()
    left[0] = None
    assert limit.is_near(), "nobody answers: what was known holds"
    assert TimeLimit("7", 60.0, lambda job: 60.0).reserve_s == 15, "of a short job not the whole"
    assert not TimeLimit("7", 60.0, lambda job: None).is_near()
