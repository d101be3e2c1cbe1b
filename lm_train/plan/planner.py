"""The plain planner: fills what a recipe left `auto` by simple rules, each with its reason."""

from __future__ import annotations

import os
import shutil
from typing import Any, Literal

from lm_train.clusters import peak_flops
from lm_train.errors import DataError, UsageError
from lm_train.hardware import BF16_SINCE, Machine
from lm_train.plan.counts import flops_per_sample, parameter_count, parameter_shapes
from lm_train.plan.facts import known_facts
from lm_train.plan.layout import Precision
from lm_train.plan.memory import state_bytes
from lm_train.plan.places import check_batch, choose_devices, choose_nodes, threads_per_rank
from lm_train.plan.plan import Plan
from lm_train.recipe import Recipe, samples_are_sequences, task_of
from lm_train.slurm import Allocation

MICRO_BATCH_TOKENS = {"gpu": 16_384, "cpu": 4_096}
MICRO_BATCH_SAMPLES = {"gpu": 2_048, "cpu": 512}
"""Largest micro batch chosen by itself, in tokens of running text, or in samples of other data. Assumptions that suit small
models, not measurements."""


def make_plan(recipe: Recipe, machine: Machine, allocation: Allocation | None = None) -> Plan:
    """Decides everything the recipe left open.

    Args:
        recipe: what was asked.
        machine: what this node has; the others of an allocation have the same.
        allocation: the Slurm step around this process, if there is one.

    Raises:
        UsageError: with every wish of the recipe that cannot be fulfilled here, one line each.
    """
    problems: list[str] = []
    reasons: dict[str, str] = {}
    accelerator: Literal["cpu", "gpu"] = "gpu" if machine.gpus else "cpu"
    nodes = choose_nodes(recipe, allocation, problems)
    total = _or(recipe.data.global_batch_size, 16)
    devices = choose_devices(recipe, total, machine, allocation, problems, reasons)
    precision = _precision(recipe, machine, problems, reasons)
    _check_compiler(recipe, accelerator, problems)
    if not problems:
        check_batch(recipe, total, nodes, devices, allocation, problems)
    if problems:
        raise UsageError(problems)
    micro, accumulate = _batches(recipe, total, nodes * devices, accelerator, reasons)
    strategy = recipe.trainer.strategy
    if strategy == "auto":
        strategy = "single" if nodes * devices == 1 else "ddp"
        reasons["trainer.strategy"] = (
            "one process" if nodes * devices == 1 else "the model is replicated on each device"
        )
    task, facts = task_of(recipe), known_facts(recipe)
    try:
        shapes = parameter_shapes(recipe.model, task, facts)
    except DataError as error:
        raise UsageError(str(error)) from None
    n_parameters = None if shapes is None else parameter_count(shapes)
    state = None if shapes is None else state_bytes(shapes, strategy, precision, recipe.optim, nodes * devices)
    workers = recipe.data.num_workers
    if workers == "auto":
        workers = 0
        reasons["data.num_workers"] = (
            "samples are read from memory, or memory-mapped files, faster than a worker can send them"
        )
    return Plan(
        task=task,
        accelerator=accelerator,
        device_name=machine.gpus[0].name if machine.gpus else f"{machine.cpu_cores} cores",
        nodes=nodes,
        devices=devices,
        strategy=strategy,
        precision=precision,
        global_batch_size=total,
        micro_batch_size=micro,
        accumulate_grad_batches=accumulate,
        num_workers=workers,
        max_steps=_or(recipe.trainer.max_steps, 1000),
        activation_checkpointing=_or(recipe.trainer.activation_checkpointing, "none"),
        cross_entropy_chunks=_or(recipe.trainer.cross_entropy_chunks, 1),
        compile=recipe.trainer.compile,
        threads_per_rank=threads_per_rank(machine, allocation, devices),
        vocab_size=facts.vocab_size,
        n_parameters=n_parameters,
        flops_per_sample=None if n_parameters is None else flops_per_sample(recipe.model, task, facts, n_parameters),
        parameter_bytes=None if state is None else state.parameters,
        gradient_bytes=None if state is None else state.gradients,
        optimizer_bytes=None if state is None else state.optimizer,
        block_size=getattr(recipe.model, "block_size", None) if samples_are_sequences(recipe) else None,
        peak_flops_per_device=peak_flops(machine.gpus[0]) if machine.gpus else None,
        cluster="this machine",
        price_per_gpu_hour=recipe.cluster.price_per_gpu_hour,
        currency=recipe.cluster.currency or "USD",
        power_watts=0.0,
        limits=recipe.budget.limits,
        prediction=None,
        reasons=reasons,
    )


def _or(value: Any, default: Any) -> Any:
    return default if value == "auto" else value


def _check_compiler(recipe: Recipe, accelerator: str, problems: list[str]) -> None:
    """torch.compile writes C++ for a CPU; for a GPU Triton builds its launcher in C."""
    compilers, package = (("CXX", "g++", "clang++"), "g++") if accelerator == "cpu" else (("CC", "gcc", "clang"), "gcc")
    variable, *names = compilers
    if recipe.trainer.compile and not any(map(shutil.which, filter(None, (os.environ.get(variable), *names)))):
        problems.append(
            f"trainer.compile: torch.compile needs a compiler, and {' or '.join(names)} is not here; apt-get install {package}, "
            "or trainer.compile=false"
        )


def _precision(recipe: Recipe, machine: Machine, problems: list[str], reasons: dict[str, str]) -> Precision:
    asked = recipe.trainer.precision
    if asked != "auto":
        if asked == "16-mixed" and not machine.gpus:
            problems.append(
                "trainer.precision: 16-mixed needs a GPU; on this CPU try trainer.precision=32-true or bf16-mixed"
            )
        return asked
    key = "trainer.precision"
    if not machine.gpus:
        reasons[key] = "CPU: fp32"
        return "32-true"
    oldest = min(gpu.compute_capability for gpu in machine.gpus)
    if oldest >= BF16_SINCE:
        reasons[key] = "native bf16"
        return "bf16-mixed"
    if oldest >= (7, 0) and recipe.trainer.strategy != "fsdp":  # FSDP2 has no gradient scaler
        reasons[key] = f"compute capability {oldest[0]}.{oldest[1]} has fp16 tensor cores and no native bf16"
        return "16-mixed"
    lacks = (
        "no native bf16, and fsdp no gradient scaler for fp16"
        if oldest >= (7, 0)
        else "neither bf16 nor fp16 tensor cores"
    )
    reasons[key] = f"compute capability {oldest[0]}.{oldest[1]} has {lacks}"
    return "32-true"


def _batches(recipe: Recipe, total: int, ranks: int, accelerator: str, reasons: dict[str, str]) -> tuple[int, int]:
    """Micro batch and accumulation; micro x accumulation x ranks is always the recipe's global batch."""
    micro = recipe.data.micro_batch_size
    accumulate = recipe.trainer.accumulate_grad_batches
    assert total % ranks == 0, (total, ranks)  # check_batch
    share = total // ranks
    if micro != "auto" and accumulate != "auto":
        return micro, accumulate
    if micro != "auto":
        return micro, share // micro
    if accumulate != "auto":
        return share // accumulate, accumulate
    unit, size, limit = "samples", 1, MICRO_BATCH_SAMPLES[accelerator]
    if samples_are_sequences(recipe):
        unit, size, limit = "tokens", getattr(recipe.model, "block_size", 1), MICRO_BATCH_TOKENS[accelerator]
    micro = _largest_divisor(share, max(1, limit // size))
    reasons["data.micro_batch_size"] = (
        f"largest divisor of {share} with at most {limit:,} {unit}"
        if micro * size <= limit
        else f"one sequence is more than {limit:,} tokens"
    )
    return micro, share // micro


def _largest_divisor(number: int, most: int) -> int:
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)
