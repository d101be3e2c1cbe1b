"""A micro batch forward and backward, and one validated: what was recorded of them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lm_train.data import Batch
from lm_train.modules import CustomTraining, TrainingModule
from lm_train.plan import Layout
from lm_train.strategy.units import units_of
from lm_train.trace.batches import bytes_of, tensors_of
from lm_train.trace.network import autocast, lowered
from lm_train.trace.recorder import Recorder, Recording


@dataclass(frozen=True)
class Passes:
    """What a micro batch of one size did."""

    recording: Recording
    given: frozenset[int]
    """Storages of parameters, buffers and batches."""
    gradients: frozenset[int]
    """Of the parameters, from their birth on."""
    batch_bytes: int
    """Of the training's."""


def run_passes(
    net: nn.Module, module: TrainingModule, layout: Layout, batch: Batch, evaluation: Batch, micro_batches: int = 1
) -> Passes:
    """Runs the module's own steps, on fake or on real tensors.

    Args:
        net: the module's network; its gradients are dropped first.
        module: of the task.
        layout: precision and strategy.
        batch: of the training.
        evaluation: of a validation.
        micro_batches: of the training, one after the other; the summary reads the first.
    """
    low = lowered(layout)
    batch, evaluation = _cast(batch, low), _cast(evaluation, low)
    for parameter in net.parameters():
        parameter.grad = None
    recorder = Recorder(net, units_of(net))
    given = recorder.known([*module.parameters(), *module.buffers(), *tensors_of(batch), *tensors_of(evaluation)])
    gradients: set[int] = set()
    with _without_collection(), recorder.hooks(), recorder:
        module.train()
        for micro in range(micro_batches):
            recorder.start(micro, "forward")
            with autocast(layout):
                loss: Tensor = module.training_step(batch, micro)
            recorder.start(micro, "backward")
            loss.backward()
            del loss
            gradients |= recorder.numbers_of(p.grad for p in net.parameters() if p.grad is not None)
        recorder.start(0, "evaluation")
        module.eval()
        with torch.no_grad(), autocast(layout):
            _evaluate(module, evaluation)
    recorder.finish()
    return Passes(recorder.recording, frozenset(given), frozenset(gradients), bytes_of(batch))


def _evaluate(module: TrainingModule, batch: Batch) -> None:
    """One validated micro batch; where what is counted depends on values, the loss of it."""
    ways: list[Callable[[], object]] = [lambda: module.loss(batch)]
    if isinstance(module, CustomTraining):
        ways.insert(0, lambda: module._call("validation_step", batch, 0))
    else:
        ways.insert(0, lambda: (module.start_evaluation(), module.evaluate(batch)))
    for way in ways:
        with contextlib.suppress(Exception):
            way()
            return


def _cast(batch: Batch, dtype: torch.dtype | None) -> Batch:
    if dtype is None:
        return batch
    floats = {key for key, value in batch.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return {key: value.to(dtype) if key in floats else value for key, value in batch.items()}


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """What is freed is freed by its last reference, at the same moment each time."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
