"""The most memory that a rank will hold, and when. Free of torch.

A training holds its state all the time (`lm_train.plan.memory`); what comes and goes is followed from moment to moment: the
forward and backward pass stage by stage (`lm_train.plan.work`), with the gradients and buffers of the strategy
(`lm_train.plan.exchange`), the update (`lm_train.plan.update`), a validation, a checkpoint. The worst moment counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lm_train.clusters import Cluster
from lm_train.plan.exchange import Exchange, NamedShapes
from lm_train.plan.layout import Layout
from lm_train.plan.memory import checkpoint_bytes, state_bytes
from lm_train.plan.prediction import MemoryPrediction
from lm_train.plan.update import update_bytes
from lm_train.plan.work import Work
from lm_train.recipe import AnyOptim

RELATIVE_ERROR = {"cpu": 0.05, "gpu": 0.08}
"""Half of the interval around the prediction: CPU processes as `benchmarks/memory.py` finds them; GPUs an estimate."""
CPU_RESERVE = 60 << 20
"""Of a CPU process: code of torch and oneDNN that is first used in training, packed weights, threads' stacks."""
GPU_CONTEXT = 600 << 20
"""Estimate: CUDA context, cuBLAS workspace and loaded kernels of one process; 0.3 to 0.5 GB of context are reported."""
NCCL = 500 << 20
"""Estimate: buffers of one NCCL communicator with its channels."""
GPU_FRAGMENTS = 0.04
"""Estimate: share of what is allocated that the caching allocator holds besides (rounding, fragments)."""


@dataclass(frozen=True)
class _Moment:
    name: str
    gradients: int
    activations: int
    logits: int
    buffers: int

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.logits + self.buffers


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
        gradient_clip: largest norm of the gradient; clipping works in place and needs nothing.
    """
    state = state_bytes(shapes, layout.strategy, layout.precision, optim, layout.ranks)
    exchange = Exchange(shapes, work.stages, layout, state)
    offloads = layout.strategy == "zero3_offload" and layout.accelerator == "gpu"
    moments = list(_passes(work, exchange))
    if not offloads:
        moments.append(_update(shapes, layout, optim, exchange))
    if validates:
        held = exchange.evaluation()
        moments.append(_Moment("a validation", held.gradients, work.evaluation_peak, 0, held.buffers))
    if offloads:  # state, gradients and update are the host's
        moments = [replace(moment, gradients=0) for moment in moments]
    worst = max(moments, key=lambda moment: moment.total)
    kept = (0, 0, 0) if offloads else (state.parameters, worst.gradients, state.optimizer)
    on_host = state.total if offloads else 0
    if saves:  # the copies that are written, all at once
        on_host += checkpoint_bytes(shapes, layout.strategy, layout.precision, optim) // layout.ranks
    used = sum(kept) + worst.activations + worst.logits + worst.buffers
    return MemoryPrediction(
        parameters=kept[0],
        gradients=kept[1],
        optimizer=kept[2],
        activations=worst.activations,
        logits=worst.logits,
        buffers=worst.buffers,
        reserve=_reserve(layout, used),
        moment=worst.name,
        host=on_host if layout.accelerator == "gpu" else 0,
        relative_error=RELATIVE_ERROR[layout.accelerator],
        capacity=cluster.device.memory_bytes,
    )


def _passes(work: Work, exchange: Exchange) -> Iterator[_Moment]:
    for number, stage in enumerate(work.stages):
        held = exchange.forward(number)
        rest = stage.forward_peak - stage.forward_logits
        yield _Moment("the forward pass", held.gradients, rest, stage.forward_logits, held.buffers)
        held = exchange.backward(number)
        rest = stage.backward_peak - stage.backward_logits
        yield _Moment("the backward pass", held.gradients, rest, stage.backward_logits, held.buffers)
    held = exchange.reduced()
    yield _Moment("the backward pass", held.gradients, work.batch_bytes, 0, held.buffers)


def _update(shapes: NamedShapes, layout: Layout, optim: AnyOptim, exchange: Exchange) -> _Moment:
    gradients, needed = update_bytes(shapes, layout, optim, exchange.state)
    return _Moment("the update", gradients, 0, 0, needed)


def _reserve(layout: Layout, used: int) -> int:
    """Of the runtime: on a GPU the CUDA context, NCCL, and the allocator's fragments."""
    if layout.accelerator == "cpu":
        return CPU_RESERVE
    return GPU_CONTEXT + (NCCL if layout.ranks > 1 else 0) + round(GPU_FRAGMENTS * used)
