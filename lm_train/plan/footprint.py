"""The most memory that a rank will hold, and when. Free of torch.

A training holds its parameters and the optimizer's state all the time (`lm_train.plan.memory`); what comes and goes is followed
from moment to moment: through the forward and the backward pass stage by stage (`lm_train.plan.work`), with the gradients and
buffers of the strategy (`lm_train.plan.moments`), through the update (`lm_train.plan.update`), and a validation. The worst
moment counts. Saving a checkpoint takes nothing more of the device: safetensors writes from the tensors where they are on a
CPU, and from copies in host memory on a GPU.
"""

from __future__ import annotations

from dataclasses import replace

from lm_train.clusters import Cluster
from lm_train.plan.layout import Layout
from lm_train.plan.memory import checkpoint_bytes, state_bytes
from lm_train.plan.moments import Moments, NamedShapes
from lm_train.plan.prediction import MemoryPrediction
from lm_train.plan.update import update_moment
from lm_train.plan.work import Work
from lm_train.recipe import AnyOptim

RELATIVE_ERROR = {"cpu": 0.05, "gpu": 0.08}
"""Half of the interval around the prediction: CPU processes as `benchmarks/memory.py` finds them; GPUs an estimate."""
BARE_PROCESS = 460 << 20
"""Resident in a rank on a CPU before the network is built: Python, torch, Lightning, lm_train (measured)."""
CPU_RUNTIME = 27 << 20
"""What a rank on a CPU holds more after its first steps: code of torch and oneDNN that is first used then, and their tables
(measured, `benchmarks/memory.py`)."""
DEEPSPEED = 58 << 20
"""What DeepSpeed's modules and its engine hold besides on a CPU (measured, `benchmarks/memory.py`)."""
GPU_CONTEXT = 600 << 20
"""Estimate: CUDA context, cuBLAS workspace and loaded kernels of a process; 0.3 to 0.5 GB are reported for the context alone."""
NCCL = 500 << 20
"""Estimate: buffers of one NCCL communicator with its channels."""
GPU_FRAGMENTS = 0.04
"""Estimate: share of what is allocated that the caching allocator holds besides, by rounding and fragments."""


def memory_of(
    shapes: NamedShapes,
    work: Work,
    layout: Layout,
    optim: AnyOptim,
    cluster: Cluster,
    *,
    saves: bool,
    validates: bool,
    gradient_clip: float | None,
) -> MemoryPrediction:
    """The peak of the rank that holds most, by part.

    Args:
        shapes: name and shape of every parameter, shared ones once.
        work: of one micro batch.
        layout: how it is run.
        optim: the recipe's optim section.
        cluster: whose devices have so much memory.
        saves: whether checkpoints are written.
        validates: whether there are validations.
        gradient_clip: largest norm of the gradient; clipping works in place, and needs nothing.
    """
    state = state_bytes(shapes, layout.strategy, layout.precision, optim, layout.ranks)
    offloads = layout.strategy == "zero3_offload" and layout.accelerator == "gpu"
    passes = Moments(shapes, work, layout, state)
    moments = list(passes.all(validates))
    if offloads:  # state, gradients and the update are the host's
        moments = [replace(moment, gradients=0) for moment in moments]
    else:
        moments.append(update_moment(shapes, layout, optim, state, passes.batches))
    worst = max(moments, key=lambda moment: moment.total)
    parameters, optimizer = (0, 0) if offloads else (state.parameters, state.optimizer)
    on_host = state.total if offloads else 0
    if saves and layout.accelerator == "gpu":
        on_host += checkpoint_bytes(shapes, layout.strategy, layout.precision, optim) // layout.ranks
    return MemoryPrediction(
        parameters=parameters,
        gradients=worst.gradients,
        optimizer=optimizer,
        activations=worst.activations,
        logits=worst.logits,
        buffers=worst.buffers,
        reserve=_reserve(layout, parameters + optimizer + worst.total),
        moment=worst.name,
        host=on_host,
        relative_error=RELATIVE_ERROR[layout.accelerator],
        capacity=cluster.device.memory_bytes,
    )


def _reserve(layout: Layout, used: int) -> int:
    """What the runtime holds: on a CPU the process itself and its libraries, on a GPU context, NCCL and fragments."""
    if layout.accelerator == "cpu":
        return BARE_PROCESS + CPU_RUNTIME + (DEEPSPEED if layout.strategy.startswith("zero") else 0)
    return GPU_CONTEXT + (NCCL if layout.ranks > 1 else 0) + round(GPU_FRAGMENTS * used)
