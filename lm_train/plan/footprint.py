"""The most memory that a rank will hold, and when. Free of torch.

A training holds its parameters and the optimizer's state all the time (`lm_train.plan.memory`); what comes and goes is followed
from moment to moment: through the forward and the backward pass stage by stage (`lm_train.plan.work`), with the gradients and
buffers of the strategy (`lm_train.plan.moments`), through the update (`lm_train.plan.update`), and a validation. The worst
moment counts. A save writes from a copy in host memory, which stays for the next one: beside all that follows the first save on
a CPU, in the host's memory on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from lm_train.clusters import Cluster
from lm_train.plan.layout import Layout
from lm_train.plan.memory import checkpoint_bytes, state_bytes
from lm_train.plan.moments import SAVE, VALIDATION, Moment, Moments, NamedShapes
from lm_train.plan.prediction import MemoryPrediction
from lm_train.plan.update import update_moment
from lm_train.plan.work import Work
from lm_train.recipe import AnyOptim

RELATIVE_ERROR = {"cpu": (0.05, 0.30), "gpu": (0.08, 0.08)}
"""Of the prediction, below and above. CPU: below, twice the worst of `benchmarks/memory.py`, for other libraries and processors;
above, what glibc's allocator under its own settings keeps of what was freed (up to 27% of a GPT's peak). GPU: an estimate."""
BARE_PROCESS = 460 << 20
"""Resident in a rank on a CPU before the network is built: Python, torch, Lightning, lm_train (measured)."""
CPU_RUNTIME = 23 << 20
"""What a rank on a CPU holds more after its first steps: code of torch and oneDNN that is first used then, and their tables
(fitted to the five calibration rows of `benchmarks/memory.py`)."""
DEEPSPEED = 62 << 20
"""What DeepSpeed's modules and its engine hold besides on a CPU (fitted to the same rows)."""
GPU_CONTEXT = 480 << 20
"""Estimate: CUDA context with the kernels in use of one process. 426 MiB were measured on an RTX 6000 Ada with torch 2.10 for the
empty context (github.com/unslothai/unsloth-zoo/pull/1053), about 300 to 400 are torch's maintainers' figure since CUDA 11.7
(github.com/pytorch/pytorch issues 107667, 109888)."""
CUBLAS = {True: 64 << 20, False: 12 << 20}
"""Workspaces of cuBLAS and cuBLASLt, by whether it is a Hopper or newer: 32 MiB each, else 8 and up to 4
(github.com/pytorch/pytorch/pull/120925)."""
NCCL = 600 << 20
"""Estimate: buffers of one communicator, 4 MiB and more for each channel and connection (github.com/NVIDIA/nccl issues 391, 986);
1.06 GB with the context were seen on 8 H100 before an all-to-all (issue 1685)."""
GPU_FRAGMENTS = 0.05
"""Estimate: share of what is allocated that the caching allocator cannot use, by rounding and fragments. It reserves more as long
as there is room (a quarter to a third in github.com/pytorch/torchtitan/pull/135), and gives that back before it fails."""

Copies = Literal["never", "last", "all along"]
"""Whether a save takes one: never, where the training waits for the whole save; with the last step only; or on the way."""


def memory_of(
    shapes: NamedShapes,
    work: Work,
    layout: Layout,
    optim: AnyOptim,
    cluster: Cluster,
    *,
    copies: Copies,
    validates: bool,
) -> MemoryPrediction:
    """The peak of the rank that holds most, by part.

    Args:
        shapes: name and shape of every parameter, shared ones once.
        work: of one micro batch.
        layout: how it is run.
        optim: the recipe's optim section.
        cluster: whose devices have so much memory.
        copies: when a save takes a copy.
        validates: whether there are validations.
    """
    state = state_bytes(shapes, layout.strategy, layout.precision, optim, layout.ranks)
    offloads = layout.strategy == "zero3_offload" and layout.accelerator == "gpu"
    passes = Moments(shapes, work, layout, state)
    moments = list(passes.all(validates))
    if offloads:  # state, gradients and the update are the host's
        moments = [replace(moment, gradients=0) for moment in moments]
    else:
        moments.append(update_moment(shapes, layout, optim, state, passes.batches))
    copy = (
        0
        if copies == "never"
        else -(-checkpoint_bytes(shapes, layout.strategy, layout.precision, optim) // layout.ranks)
    )
    if copy and layout.accelerator == "cpu":
        # ZeRO-1 and 2 let go of the gradients with the update
        gradients = 0 if layout.strategy in ("zero1", "zero2") else state.gradients
        moments.append(Moment(SAVE, gradients, passes.batches, copy=copy))
        beside = (VALIDATION,) if copies == "last" else tuple(moment.name for moment in moments)
        moments = [replace(moment, copy=copy) if moment.name in beside else moment for moment in moments]
    worst = max(moments, key=lambda moment: moment.total)
    parameters, optimizer = (0, 0) if offloads else (state.parameters, state.optimizer)
    on_host = state.total if offloads else 0
    if layout.accelerator == "gpu":
        on_host += copy
    return MemoryPrediction(
        parameters=parameters,
        gradients=worst.gradients,
        optimizer=optimizer,
        activations=worst.activations,
        logits=worst.logits,
        buffers=worst.buffers,
        copy_to_save=worst.copy,
        reserve=_reserve(layout, cluster, parameters + optimizer + worst.total),
        moment=worst.name,
        host=on_host,
        relative_error=RELATIVE_ERROR[layout.accelerator],
        capacity=cluster.device.memory_bytes,
        host_capacity=cluster.host_memory_bytes // layout.devices if layout.accelerator == "gpu" else 0,
    )


def _reserve(layout: Layout, cluster: Cluster, used: int) -> int:
    """What the runtime holds: on a CPU the process itself and its libraries; on a GPU context, workspaces, NCCL, fragments."""
    if layout.accelerator == "cpu":
        return BARE_PROCESS + CPU_RUNTIME + (DEEPSPEED if layout.strategy.startswith("zero") else 0)
    capability = cluster.device.compute_capability
    workspaces = CUBLAS[capability is None or capability >= (9, 0)]
    return GPU_CONTEXT + workspaces + (NCCL if layout.ranks > 1 else 0) + round(GPU_FRAGMENTS * used)
