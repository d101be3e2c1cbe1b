"""A recipe's network and its training module with fake tensors: shapes and types, no values and no memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lm_train import models, modules
from lm_train.data import PairDataModule
from lm_train.models.hf import HuggingFaceNet
from lm_train.modules import TrainingModule
from lm_train.plan import DataFacts, Layout, Plan
from lm_train.recipe import HuggingFace, Recipe, Task

OWN_WEIGHTS = ("hf", "custom")
"""Kinds of networks that draw their own initial weights."""


def plan_of(layout: Layout, task: Task) -> Plan:
    """As much of a plan as networks and training modules read: of one process.

    Where a strategy casts the weights it casts what goes into the network, too; ZeRO's name makes the modules do so.
    """
    casts = layout.precision.endswith("-mixed") and lowered(layout) is not None
    return Plan.model_construct(
        task=task,
        accelerator=layout.accelerator,
        nodes=1,
        devices=1,
        strategy="zero3" if casts else "single",
        precision=layout.precision,
        global_batch_size=layout.micro_batch_size * 2,
        micro_batch_size=layout.micro_batch_size,
        accumulate_grad_batches=2,
        max_steps=1000,
        activation_checkpointing=layout.activation_checkpointing,
        cross_entropy_chunks=layout.cross_entropy_chunks,
        compile=False,
    )


def lowered(layout: Layout) -> torch.dtype | None:
    """Type in which weights are kept while they compute, where it is not fp32."""
    cast = layout.strategy == "fsdp" or layout.strategy.startswith("zero")
    if layout.precision == "bf16-true" or (layout.precision == "bf16-mixed" and cast):
        return torch.bfloat16
    return torch.float16 if layout.precision == "16-mixed" and cast else None


def autocast(layout: Layout) -> contextlib.AbstractContextManager[Any]:
    """What Lightning's precision plugin puts around a step."""
    if layout.precision.endswith("-mixed") and lowered(layout) is None:
        dtype = torch.bfloat16 if layout.precision == "bf16-mixed" else torch.float16
        return torch.autocast("cpu", dtype=dtype, cache_enabled=False)
    return _default_type(lowered(layout)) if layout.precision == "bf16-true" else contextlib.nullcontext()


@contextlib.contextmanager
def _default_type(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def fake_network(recipe: Recipe, plan: Plan, facts: DataFacts, layout: Layout, fakes: FakeTensorMode) -> nn.Module:
    """The network as the strategy computes with it.

    Raises:
        whatever the user's code raises where it is built.
    """
    section = recipe.model
    if isinstance(section, HuggingFace) and section.path is not None:
        section = section.model_copy(
            update={"from_scratch": True}
        )  # the configuration alone says what there is to know
    if section.kind in OWN_WEIGHTS:
        try:
            with fakes:
                net = models.build(section, plan, facts)
        except Exception:  # such as one that looks at the values it draws
            net = models.build(section, plan, facts)
    else:
        net = models.build(section, plan, facts, initialise=False)
    with fakes:
        _make_fake(net, lowered(layout))
    return net


def _make_fake(net: nn.Module, dtype: torch.dtype | None) -> None:
    """Puts fakes in the place of parameters and buffers, shared ones shared as before; call it in a fake mode."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor, cast: bool) -> Tensor:
        if id(tensor) not in made:
            to = dtype if cast and dtype is not None and tensor.is_floating_point() else tensor.dtype
            empty = torch.empty(tensor.shape, dtype=to)
            made[id(tensor)] = (
                nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
            )
        return made[id(tensor)]

    kept: list[Any] = []  # so that no id is given twice
    keeps_buffers = isinstance(net, HuggingFaceNet)
    for module in net.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                kept.append(parameter)
                setattr(module, name, fake(parameter, cast=True))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                kept.append(buffer)
                module._buffers[name] = fake(buffer, cast=not keeps_buffers)


def training_module(net: nn.Module, recipe: Recipe, plan: Plan, facts: DataFacts) -> TrainingModule:
    """The module of the plan's task, with stand-ins for the data and the trainer."""
    data: Any = object.__new__(PairDataModule)
    data.start_id, data.end_id = facts.start_id or 0, facts.end_id or 0
    data.class_names = tuple(map(str, range(facts.n_outputs or 0)))
    data.target_scale = (1.0,) * (facts.n_outputs or 0)
    data.most_frequent_token = 0
    module = modules.build(net, recipe, plan, data)
    trainer: Any = SimpleNamespace(
        datamodule=data, max_steps=plan.max_steps, global_step=0, current_epoch=0, max_epochs=1, world_size=1, num_nodes=1,
        num_devices=1, global_rank=0, local_rank=0, is_global_zero=True, accumulate_grad_batches=1, optimizers=[], loggers=[],
        logger=None, training=True, validating=False, testing=False, sanity_checking=False, num_training_batches=2,
        estimated_stepping_batches=plan.max_steps, precision=plan.precision, callbacks=[], strategy=SimpleNamespace(),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace()), is_last_batch=False, ckpt_path=None, log_dir=None,
    )  # fmt: skip
    module.trainer = trainer
    return module
