"""The plain planner: fills what a recipe left `auto` by simple rules, each with its reason."""

from __future__ import annotations

import math
from typing import Literal

from lm_train.errors import UsageError
from lm_train.hardware import BF16_SINCE, Machine
from lm_train.plan.counts import flops_per_token, parameter_count
from lm_train.plan.plan import Plan, padded_vocab_size
from lm_train.recipe import Recipe
from lm_train.recipe.tokenizer_names import known_vocab_size

MICRO_BATCH_TOKENS = {"gpu": 16_384, "cpu": 4_096}
"""Largest micro batch chosen by itself, in tokens. An assumption that suits small models, not a measurement."""

Precision = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"]


def make_plan(recipe: Recipe, machine: Machine) -> Plan:
    """Decides everything the recipe left open.

    Raises:
        UsageError: with every wish of the recipe that this machine cannot fulfil, one line each.
    """
    problems: list[str] = []
    reasons: dict[str, str] = {}
    accelerator: Literal["cpu", "gpu"] = "gpu" if machine.gpus else "cpu"
    devices = _devices(recipe, machine, problems, reasons)
    precision = _precision(recipe, machine, problems, reasons)
    micro, accumulate = _batches(recipe, devices, accelerator, problems, reasons)
    if problems:
        raise UsageError(problems)
    strategy = recipe.trainer.strategy
    if strategy == "auto":
        strategy = "single" if devices == 1 else "ddp"
        reasons["trainer.strategy"] = "one process" if devices == 1 else "the model is replicated on each device"
    vocab = recipe.model.vocab_size
    if vocab == "auto":
        known = known_vocab_size(recipe.data.tokenizer)
        vocab_size = known
    else:
        vocab_size = vocab
    n_parameters = None if vocab_size is None else parameter_count(recipe.model, padded_vocab_size(vocab_size))
    workers = recipe.data.num_workers
    if workers == "auto":
        workers = 0
        reasons["data.num_workers"] = (
            "packed tokens are read from memory-mapped files faster than a worker can send them"
        )
    return Plan(
        accelerator=accelerator,
        device_name=machine.gpus[0].name if machine.gpus else f"{machine.cpu_cores} cores",
        nodes=1,
        devices=devices,
        strategy=strategy,
        precision=precision,
        global_batch_size=recipe.data.global_batch_size,
        micro_batch_size=micro,
        accumulate_grad_batches=accumulate,
        num_workers=workers,
        max_steps=recipe.trainer.max_steps,
        activation_checkpointing=recipe.trainer.activation_checkpointing,
        cross_entropy_chunks=recipe.trainer.cross_entropy_chunks,
        compile=recipe.trainer.compile,
        threads_per_rank=max(1, machine.cpu_cores // devices),
        vocab_size=vocab_size,
        n_parameters=n_parameters,
        flops_per_token=None if n_parameters is None else flops_per_token(recipe.model, n_parameters),
        tokens_per_step=recipe.data.global_batch_size * recipe.model.block_size,
        peak_flops_per_device=machine.gpus[0].peak_flops if machine.gpus else None,
        reasons=reasons,
    )


def _devices(recipe: Recipe, machine: Machine, problems: list[str], reasons: dict[str, str]) -> int:
    asked = recipe.trainer.devices
    if asked != "auto":
        if machine.gpus and asked > len(machine.gpus):
            problems.append(
                f"trainer.devices: {asked} asked, this machine has {len(machine.gpus)} GPUs; "
                f"try trainer.devices={len(machine.gpus)}"
            )
        return asked
    if recipe.trainer.strategy == "single":
        reasons["trainer.devices"] = "trainer.strategy=single is one process"
        return 1
    if machine.gpus:
        # micro batch and accumulation that the recipe fixes must divide what each GPU gets, too
        fixed = [v for v in (recipe.data.micro_batch_size, recipe.trainer.accumulate_grad_batches) if v != "auto"]
        unit = math.prod(fixed)
        total = recipe.data.global_batch_size
        usable = [
            n
            for n in range(1, len(machine.gpus) + 1)
            if total % (n * unit) == 0 and (len(fixed) < 2 or total == n * unit)
        ]
        devices = max(usable, default=1)
        reasons["trainer.devices"] = "all GPUs of this machine"
        if devices < len(machine.gpus):
            reasons["trainer.devices"] = (
                f"of {len(machine.gpus)} GPUs the most that divide data.global_batch_size={total}"
            )
        return devices
    reasons["trainer.devices"] = "no GPU: one CPU process"
    return 1


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
    if oldest >= (7, 0):
        reasons[key] = f"compute capability {oldest[0]}.{oldest[1]} has fp16 tensor cores and no native bf16"
        return "16-mixed"
    reasons[key] = f"compute capability {oldest[0]}.{oldest[1]} has neither bf16 nor fp16 tensor cores"
    return "32-true"


def _batches(
    recipe: Recipe, devices: int, accelerator: str, problems: list[str], reasons: dict[str, str]
) -> tuple[int, int]:
    """Micro batch and accumulation; micro x accumulation x ranks is always the recipe's global batch."""
    total, micro = recipe.data.global_batch_size, recipe.data.micro_batch_size
    accumulate = recipe.trainer.accumulate_grad_batches
    # the recipe's own checks refuse explicit numbers that do not divide; `auto` devices are chosen to divide
    assert total % devices == 0, (total, devices)
    share = total // devices
    if micro != "auto" and accumulate != "auto":
        if micro * accumulate != share:
            problems.append(
                f"data.global_batch_size: {total} is not {micro} micro x {accumulate} accumulated x {devices} ranks; "
                f"try data.global_batch_size={micro * accumulate * devices}, or one of data.micro_batch_size and "
                "trainer.accumulate_grad_batches auto"
            )
        return micro, accumulate
    if micro != "auto":
        return micro, share // micro
    if accumulate != "auto":
        return share // accumulate, accumulate
    most = max(1, MICRO_BATCH_TOKENS[accelerator] // recipe.model.block_size)
    micro = _largest_divisor(share, most)
    reasons["data.micro_batch_size"] = (
        f"largest divisor of {share} with at most {MICRO_BATCH_TOKENS[accelerator]:,} tokens"
        if micro * recipe.model.block_size <= MICRO_BATCH_TOKENS[accelerator]
        else f"one sequence is more than {MICRO_BATCH_TOKENS[accelerator]:,} tokens"
    )
    return micro, share // micro


def _largest_divisor(number: int, most: int) -> int:
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)
