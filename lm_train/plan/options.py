"""What may be chosen: every layout that the recipe, the machine and the Slurm step around it leave open."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from lm_train.hardware import BF16_SINCE, Machine
from lm_train.plan.layout import Layout, Precision, Recomputed, Strategy
from lm_train.plan.places import check_batch, choose_devices, choose_nodes, threads_per_rank
from lm_train.plan.target import Target
from lm_train.recipe import Recipe, strategy_problem

SHARDED: tuple[Strategy, ...] = ("ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload")
"""From the plainest to what has most moving parts; of two that are equally fast the earlier one is taken."""
RECOMPUTED: tuple[Recomputed, ...] = ("none", 4, 2, "full")
CHUNKS = (1, 4, 16)
BLOCKS = ("gpt", "llama", "bert", "seq2seq")
"""Kinds of model with blocks that can recompute their activations."""
CHUNKED = ("gpt", "llama", "bert", "seq2seq", "recurrent")
"""Kinds of model whose loss can be computed in pieces."""


@dataclass(frozen=True)
class Group:
    """Layouts that differ only in micro batch, recomputation and chunks."""

    nodes: int
    devices: int
    strategy: Strategy
    precision: Precision

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices

    def __str__(self) -> str:
        nodes = f"{self.nodes} x " if self.nodes > 1 else ""
        return f"{self.strategy} on {nodes}{self.devices}"


def sizes(
    recipe: Recipe, total: int, target: Target, problems: list[str], reasons: dict[str, str]
) -> list[tuple[int, int]]:
    """Numbers of nodes and of ranks a node that are possible, the largest last.

    Args:
        recipe: what it fixes stays.
        total: the global batch, which every number of ranks must divide.
        target: what is there.
        problems: takes what cannot be.
        reasons: takes why there is only one choice.
    """
    if target.is_fixed or recipe.trainer.strategy == "single" or recipe.debug:
        nodes = choose_nodes(recipe, target.allocation, problems)
        devices = choose_devices(recipe, total, target.machine, target.allocation, problems, reasons)
        if not problems:
            check_batch(recipe, total, nodes, devices, target.allocation, problems)
        return [(nodes, devices)]
    asked, wanted, there = recipe.trainer.num_nodes, recipe.trainer.devices, target.cluster
    if asked != "auto" and asked > there.nodes:
        where = "this machine is one node" if there.here else f"cluster={there.name} has {there.nodes}"
        problems.append(f"trainer.num_nodes: {asked} asked, {where}; try trainer.num_nodes={there.nodes}")
    if wanted != "auto" and wanted > there.devices_per_node:
        where = "this machine" if there.here else f"each node of cluster={there.name}"
        problems.append(
            f"trainer.devices: {wanted} asked, {where} has {there.devices_per_node} GPUs; try "
            f"trainer.devices={there.devices_per_node}"
        )
    if problems:
        return []
    nodes_open = [asked] if asked != "auto" else list(range(1, there.nodes + 1))
    devices_open = [wanted] if wanted != "auto" else list(range(1, there.devices_per_node + 1))
    every = [(1, devices) for devices in devices_open if 1 in nodes_open]
    for nodes in (
        nodes for nodes in nodes_open if nodes > 1
    ):  # whole nodes, or where the batch forbids it, equal parts of them
        fitting = [d for d in devices_open if check_batch(recipe, total, nodes, d, None, [])]
        every.append((nodes, max(fitting, default=devices_open[-1])))
    quiet: list[str] = []
    open_ = [(n, d) for n, d in every if check_batch(recipe, total, n, d, None, quiet)]
    if not open_:
        check_batch(recipe, total, *every[-1], None, problems)
    return _thinned(open_)


def _thinned(counts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of many numbers of ranks those that are a quarter more than the one before, and the largest."""
    kept: list[tuple[int, int]] = []
    for count in counts:
        if not kept or math.prod(count) >= 1.25 * math.prod(kept[-1]) or count == counts[-1]:
            kept.append(count)
    return kept


def groups(recipe: Recipe, target: Target, sizes: list[tuple[int, int]]) -> Iterator[Group]:
    """Every strategy and precision that the recipe admits, for each number of ranks."""
    asked = recipe.trainer.strategy
    for nodes, devices in sizes:
        if asked != "auto":
            strategies: tuple[Strategy, ...] = (asked,)
        elif recipe.model.kind == "custom":  # nobody knows what sharding would meet in it
            strategies = ("single",) if nodes * devices == 1 else ("ddp",)
        elif nodes * devices == 1:
            strategies = ("single", "zero3_offload") if target.machine.gpus else ("single",)
        else:
            strategies = SHARDED if target.machine.gpus else ("ddp", "fsdp")  # DeepSpeed's CPU path is for tests
        for strategy in strategies:
            precision, _ = precision_for(recipe, target.machine, strategy)
            if asked != "auto" or strategy_problem(recipe, strategy, precision) is None:
                yield Group(nodes, devices, strategy, precision)


def precision_for(recipe: Recipe, machine: Machine, strategy: str) -> tuple[Precision, str]:
    """The precision under a strategy, and why where the recipe leaves it open."""
    asked = recipe.trainer.precision
    if asked != "auto":
        return asked, ""
    if not machine.gpus:
        return "32-true", "CPU: fp32"
    oldest = min(gpu.compute_capability for gpu in machine.gpus)
    if oldest >= BF16_SINCE:
        return "bf16-mixed", "native bf16"
    said = f"compute capability {oldest[0]}.{oldest[1]} has"
    if oldest >= (7, 0) and strategy != "fsdp":  # FSDP2 has no gradient scaler
        return "16-mixed", f"{said} fp16 tensor cores and no native bf16"
    if oldest >= (7, 0):
        return "32-true", f"{said} no native bf16, and fsdp no gradient scaler for fp16"
    return "32-true", f"{said} neither bf16 nor fp16 tensor cores"


def machine_problems(recipe: Recipe, machine: Machine, here: bool) -> list[str]:
    """What the recipe asks for and this kind of machine has not."""
    problems = []
    if recipe.trainer.precision == "16-mixed" and not machine.gpus:
        problems.append(
            "trainer.precision: 16-mixed needs a GPU; on this CPU try trainer.precision=32-true or bf16-mixed"
        )
    # torch.compile writes C++ for a CPU; for a GPU Triton builds its launcher in C
    compilers, package = (("CC", "gcc", "clang"), "gcc") if machine.gpus else (("CXX", "g++", "clang++"), "g++")
    variable, *names = compilers
    asked = recipe.trainer.compile and here
    if asked and not any(map(shutil.which, filter(None, (os.environ.get(variable), *names)))):
        problems.append(
            f"trainer.compile: torch.compile needs a compiler, and {' or '.join(names)} is not here; apt-get install {package}, "
            "or trainer.compile=false"
        )
    return problems


def recomputations(recipe: Recipe) -> tuple[Recomputed, ...]:
    """From the fastest to the most frugal."""
    asked = recipe.trainer.activation_checkpointing
    if asked != "auto":
        return (asked,)
    n_layer = getattr(recipe.model, "n_layer", 0)
    if recipe.model.kind == "hf":
        return ("none", "full")
    if recipe.model.kind not in BLOCKS:
        return ("none",)
    return tuple(choice for choice in RECOMPUTED if not isinstance(choice, int) or choice <= n_layer)


def chunkings(recipe: Recipe, task: str) -> tuple[int, ...]:
    asked = recipe.trainer.cross_entropy_chunks
    if asked != "auto":
        return (asked,)
    has_vocabulary = task in ("causal_lm", "masked_lm", "seq2seq")
    return CHUNKS if has_vocabulary and recipe.model.kind in CHUNKED else (1,)


def with_open_choices(recipe: Recipe) -> Recipe:
    """The recipe without its own choices of recomputation, chunks and micro batch."""
    trainer = {"activation_checkpointing": "auto", "cross_entropy_chunks": "auto", "accumulate_grad_batches": "auto"}
    return recipe.model_copy(
        update={
            "trainer": recipe.trainer.model_copy(update=trainer),
            "data": recipe.data.model_copy(update={"micro_batch_size": "auto"}),
        }
    )


def micro_batches(recipe: Recipe, total: int, ranks: int) -> list[int]:
    """Sizes of the micro batch that the recipe leaves open, the largest first."""
    micro, accumulate = recipe.data.micro_batch_size, recipe.trainer.accumulate_grad_batches
    assert total % ranks == 0, (total, ranks)  # check_batch
    share = total // ranks
    if micro != "auto":
        return [micro]
    if accumulate != "auto":
        return [share // accumulate]
    return divisors(share)


def divisors(number: int) -> list[int]:
    """The largest first."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)}, reverse=True)


def layout_of(
    group: Group,
    recipe: Recipe,
    target: Target,
    total: int,
    micro: int,
    recomputed: Recomputed,
    chunks: int,
    workers: int,
) -> Layout:
    return Layout(
        nodes=group.nodes,
        devices=group.devices,
        strategy=group.strategy,
        precision=group.precision,
        micro_batch_size=micro,
        accumulate_grad_batches=total // group.ranks // micro,
        activation_checkpointing=recomputed,
        cross_entropy_chunks=chunks,
        num_workers=workers,
        compile=recipe.trainer.compile,
        threads_per_rank=threads_per_rank(target.machine, target.allocation, group.devices),
        accelerator="gpu" if target.machine.gpus else "cpu",
    )
