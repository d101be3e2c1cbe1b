"""The plain planner on made-up machines, the plan's file, and what is read of nvidia-smi."""

from __future__ import annotations

import itertools
import math
import os
import re
from pathlib import Path

import pytest

from lm_train.clusters import cluster_named, peak_flops
from lm_train.errors import UsageError
from lm_train.hardware import GPU, Machine, this_machine
from lm_train.plan import Plan, Target, make_plan, plan_table, schedule
from lm_train.recipe import load

CPU = Machine(cpu_cores=6, gpus=())


def gpus(
    n: int, name: str = "NVIDIA H100 80GB HBM3", capability: tuple[int, int] = (9, 0), memory: int = 80 << 30
) -> Machine:
    return Machine(cpu_cores=64, gpus=(GPU(name, memory, capability),) * n)


def plan(machine: Machine, *words: str) -> Plan:
    return make_plan(load(["recipe=gpt_debug", *words]), machine)


def problems(machine: Machine, *words: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        plan(machine, *words)
    return caught.value.problems


# precision


@pytest.mark.parametrize(
    ("capability", "precision", "reason"),
    [
        ((10, 0), "bf16-mixed", "native bf16"),
        ((9, 0), "bf16-mixed", "native bf16"),
        ((8, 0), "bf16-mixed", "native bf16"),
        ((7, 5), "16-mixed", "compute capability 7.5 has fp16 tensor cores and no native bf16"),
        ((7, 0), "16-mixed", "compute capability 7.0 has fp16 tensor cores and no native bf16"),
        ((6, 1), "32-true", "compute capability 6.1 has neither bf16 nor fp16 tensor cores"),
    ],
)
def test_precision_follows_the_gpu(capability: tuple[int, int], precision: str, reason: str) -> None:
    made = plan(gpus(1, capability=capability))
    assert (made.precision, made.reasons["trainer.precision"]) == (precision, reason)


def test_oldest_gpu_decides() -> None:
    mixed = Machine(8, (GPU("NVIDIA A100", 40 << 30, (8, 0)), GPU("Tesla V100", 16 << 30, (7, 0))))
    assert plan(mixed).precision == "16-mixed"


def test_precision_on_the_cpu() -> None:
    assert plan(CPU).precision == "32-true"
    assert plan(CPU, "trainer.precision=bf16-mixed").precision == "bf16-mixed"
    assert "trainer.precision" not in plan(CPU, "trainer.precision=32-true").reasons
    refused = "trainer.precision: 16-mixed needs a GPU; on this CPU try trainer.precision=32-true or bf16-mixed"
    assert problems(CPU, "trainer.precision=16-mixed") == [refused]


# devices and strategy


@pytest.mark.parametrize(
    ("machine", "words", "devices", "strategy"),
    [
        (CPU, (), 1, "single"),
        (CPU, ("trainer.devices=2",), 2, "ddp"),
        (CPU, ("trainer.strategy=ddp",), 1, "ddp"),
        (gpus(1), (), 1, "single"),
        (gpus(4), (), 1, "single"),  # so small a network gains nothing from more
        (gpus(4), ("trainer.devices=2",), 2, "ddp"),
        (gpus(4), ("trainer.devices=1",), 1, "single"),
        (gpus(4), ("trainer.strategy=single",), 1, "single"),
        (gpus(4), ("debug=true",), 1, "single"),
    ],
)
def test_devices_and_strategy(machine: Machine, words: tuple[str, ...], devices: int, strategy: str) -> None:
    made = plan(machine, *words)
    assert (made.world_size, made.devices, made.strategy) == (devices, devices, strategy)
    assert made.accelerator == ("gpu" if machine.gpus else "cpu")
    assert made.threads_per_rank == machine.cpu_cores // devices
    decided = {key for key in ("trainer.devices", "trainer.strategy") if key in made.reasons}
    assert decided == {"trainer.devices", "trainer.strategy"} - {w.split("=")[0] for w in words} - (
        {"trainer.devices", "trainer.strategy"} if "debug=true" in words else set()
    )


def test_a_rank_has_at_least_one_thread() -> None:
    assert plan(Machine(2, ()), "trainer.devices=8").threads_per_rank == 1


def test_too_many_gpus_and_all_other_problems_at_once() -> None:
    assert problems(gpus(2), "trainer.devices=4") == [
        "trainer.devices: 4 asked, this machine has 2 GPUs; try trainer.devices=2"
    ]


# batches


def test_global_batch_stays() -> None:
    """Every combination of batch, ranks, micro batch and accumulation is either kept exactly or refused with a way out."""
    kept = refused = 0
    choices = itertools.product((1, 6, 8, 12, 60), (1, 2, 3, 4, 8), ("auto", 1, 2, 3), ("auto", 1, 2, 5))
    for total, ranks, micro, accumulate in choices:
        words = [f"data.micro_batch_size={micro}", f"trainer.accumulate_grad_batches={accumulate}"]
        words += [f"trainer.devices={ranks}"]
        given = [n for n in (micro, accumulate) if isinstance(n, int)]
        product = math.prod(given) * ranks
        if total % product or (len(given) == 2 and total != product):
            assert all(
                "; try " in problem for problem in problems(gpus(ranks), f"data.global_batch_size={total}", *words)
            )
            refused += 1
            continue
        made = plan(gpus(ranks), f"data.global_batch_size={total}", *words)
        kept += 1
        assert made.micro_batch_size * made.accumulate_grad_batches * made.world_size == total
        assert made.micro_batch_size == micro or micro == "auto"
        assert made.accumulate_grad_batches == accumulate or accumulate == "auto"
        assert made.tokens_per_step == total * 128
    assert min(kept, refused) > 50


def test_micro_batch_is_as_large_as_memory_admits_and_no_larger_than_is_of_use() -> None:
    whole = plan(CPU, "data.global_batch_size=64")
    assert whole.micro_batch_size * whole.accumulate_grad_batches == 64
    assert plan(CPU, f"data.global_batch_size={2**31 - 1}", "model.block_size=1").micro_batch_size == 1  # a prime
    words = (
        "model.n_embd=1024",
        "model.n_layer=24",
        "model.n_head=16",
        "data.global_batch_size=512",
        "model.block_size=1024",
    )
    small, large = (plan(gpus(1, memory=size << 30), *words) for size in (24, 80))
    for made, size in ((small, 24), (large, 80)):
        assert made.prediction is not None
        assert made.prediction.memory.high <= size << 30
        assert "data.micro_batch_size" in made.reasons
    assert small.micro_batch_size < large.micro_batch_size


AUTO_DEVICES = [
    ((12, "auto", "auto"), 4),
    ((10, "auto", "auto"), 2),
    ((7, "auto", "auto"), 1),
    ((12, 2, "auto"), 3),
    ((12, 6, "auto"), 2),
    ((12, "auto", 4), 3),
    ((24, 4, 2), 3),
]
LARGE = ("model.n_embd=1024", "model.n_layer=24", "model.n_head=16", "model.block_size=1024")
"""A network that every further GPU makes faster."""


@pytest.mark.parametrize(("batches", "devices"), AUTO_DEVICES)
def test_auto_devices_are_the_most_gpus_that_divide_the_batch(batches: tuple[object, ...], devices: int) -> None:
    made = plan(gpus(4), *batch_words(batches), *LARGE)
    assert made.devices == devices
    assert made.micro_batch_size * made.accumulate_grad_batches * devices == batches[0]


def test_a_batch_that_its_fixed_parts_do_not_make() -> None:
    (problem,) = problems(gpus(4), *batch_words((64, 4, 2)))
    assert problem.startswith("data.global_batch_size: 64 is not 4 micro x 2 accumulated x 4 ranks; try ")
    assert "try data.global_batch_size=32" in problem
    plan(gpus(4), *batch_words((32, 4, 2)))  # the way out is one


def batch_words(batches: tuple[object, ...]) -> list[str]:
    keys = ("data.global_batch_size", "data.micro_batch_size", "trainer.accumulate_grad_batches")
    return [f"{key}={value}" for key, value in zip(keys, batches, strict=True)]


# counts


def test_vocabulary_and_counts() -> None:
    recipe = load(["recipe=gpt_small"])
    made = make_plan(recipe, gpus(8))
    assert made.vocab_size == 50257
    assert made.n_parameters == 124_475_904  # nanoGPT's 124,439,808 and 47 padding rows of 768
    assert made.flops_per_sample == 1024 * (6 * made.n_parameters + 12 * 12 * 768 * 1024)
    assert plan(CPU, "data.tokenizer=bytes").vocab_size == 257
    unknown = plan(CPU, "data.tokenizer=chars")
    assert (unknown.vocab_size, unknown.n_parameters, unknown.flops_per_sample) == (None, None, None)
    assert "known with the data" in plan_table(unknown)


# the plan itself


def test_plan_is_frozen_and_comes_back_from_its_file(tmp_path: Path) -> None:
    made = plan(gpus(2), "trainer.activation_checkpointing=2")
    with pytest.raises(ValueError, match="frozen"):
        made.devices = 3  # type: ignore[misc]
    (tmp_path / "plan.json").write_text(made.model_dump_json())
    assert Plan.read(tmp_path / "plan.json") == made
    (tmp_path / "plan.json").write_text(made.model_dump_json().replace('"nodes"', '"notes"'))
    with pytest.raises(ValueError, match="notes"):
        Plan.read(tmp_path / "plan.json")


def test_table_is_a_line_a_decision_with_its_reason() -> None:
    lines = plan_table(plan(gpus(2), "trainer.devices=2")).splitlines()
    assert [line.split("  ")[1] for line in lines if line[2] != " "] == [
        "devices",
        "strategy",
        "precision",
        "global batch",
        "task",
        "steps",
        "vocabulary",
        "parameters",
        "memory",
        "step",
        "speed",
        "run",
        "checkpoint",
    ]
    assert "2 x" not in lines[0]
    assert "1 x 2 gpu (NVIDIA H100 80GB HBM3)" in lines[0]
    assert lines[0].endswith("as asked")
    assert lines[2].endswith("native bf16")


# the machine

LISTING = """\
0, GPU-aaaa1111-2222, NVIDIA H100 80GB HBM3, 81559, 9.0
1, GPU-bbbb1111-2222, NVIDIA A100-SXM4-40GB, 40960, 8.0
2, GPU-bbcc1111-2222, NVIDIA GB10, [N/A], 12.1
"""


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name, first on PATH, which answers with the lines of a file beside it."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncat "$(dirname "$0")/answer"\n')
    program.chmod(0o755)
    (tmp_path / "answer").write_text(LISTING)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program


def test_gpus_are_read_from_nvidia_smi(nvidia_smi: Path) -> None:
    first, second, third = this_machine().gpus
    assert first == GPU("NVIDIA H100 80GB HBM3", 81559 << 20, (9, 0))
    assert peak_flops(second) == 312e12
    assert third == GPU("NVIDIA GB10", 0, (12, 1))
    assert peak_flops(third) is None


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        ("0", "H"),
        ("1", "A"),
        ("1,0", "AH"),  # CUDA's order, not nvidia-smi's
        (" 0 , 2 ", "HG"),
        ("0,", "H"),
        ("", ""),
        ("-1", ""),
        ("0,-1,1", "H"),  # CUDA stops at an entry it does not know
        ("NoDevFiles", ""),
        ("GPU-aaaa", "H"),
        ("GPU-bbcc1111-2222,GPU-bbbb", "GA"),
    ],
)
def test_visible_devices(nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch, visible: str, seen: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert "".join(gpu.name.removeprefix("NVIDIA ")[0] for gpu in this_machine().gpus) == seen


@pytest.mark.parametrize("visible", [",0", "7", "7,0", "10", "MIG-1234"])
def test_visible_devices_that_name_no_gpu_do_not_mean_the_cpu(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UsageError, match=f"CUDA_VISIBLE_DEVICES={visible} names none of the 3 GPUs"):
        this_machine()


@pytest.mark.parametrize("answer", ["", "No devices were found\n", "\n\n", "0, GPU-a, Old, 100, [N/A]\n", "a,b\n"])
def test_answers_without_a_gpu(nvidia_smi: Path, answer: str) -> None:
    (nvidia_smi.parent / "answer").write_text(answer)
    assert this_machine().gpus == ()


@pytest.mark.parametrize("script", ["#!/bin/sh\nexit 9\n", "#!/no/such/interpreter\n"])
def test_nvidia_smi_that_fails(nvidia_smi: Path, script: str) -> None:
    nvidia_smi.write_text(script)
    assert this_machine().gpus == ()


def test_machine_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    machine = this_machine()
    assert machine.gpus == ()
    assert machine.cpu_cores == len(os.sched_getaffinity(0))


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    assert plan(CPU).compile is False
    for machine, package in ((CPU, "g++"), (gpus(1), "gcc")):
        with pytest.raises(UsageError, match=rf"apt-get install {re.escape(package)}, or trainer.compile=false"):
            plan(machine, "trainer.compile=true")


def test_what_is_offloaded_must_fit_into_the_host() -> None:
    recipe = load(["recipe=llama_8b", "trainer.strategy=zero3_offload", "cluster=rtx4090"])
    with pytest.raises(UsageError) as error:
        schedule(recipe, Target.described(cluster_named("rtx4090")))
    assert re.search(r"needs 14\d\.\d GB of host memory, where its share of the node is 64\.0 GB; ", str(error.value))
    roomy = cluster_named("rtx4090").model_copy(update={"host_memory_bytes": 300 * 10**9})
    assert schedule(recipe, Target.described(roomy)).plan.strategy == "zero3_offload"
