"""Data parallel: every rank holds everything, gradients are averaged (torch's DistributedDataParallel; Li et al. 2020,
arXiv:2006.15704)."""

from __future__ import annotations

from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lm_train.plan import Plan
from lm_train.rendezvous import COLLECTIVE_TIMEOUT

_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)
"""The option's name in torch 2.13, and before."""


class Replicated(DDPStrategy):
    """DDP whose sums are the same in the first step of a start as in any other.

    torch reduces all gradients in one piece at first and in buckets from the second step on. In which order the ranks' numbers
    are added depends on where in a piece they stand, so that with three ranks and more a resumed run would differ in its first
    step from one that was not interrupted. Here the buckets are made before the first step, in the reverse order of the
    parameters, which is about the order in which a backward pass reaches them.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(
            process_group_backend="nccl" if plan.accelerator == "gpu" else "gloo",
            timeout=COLLECTIVE_TIMEOUT,
            gradient_as_bucket_view=True,  # gradients live in the buckets: one copy of them less
            **{_SYNC_BUFFERS: False},  # sums over the ranks make them equal; see strategy/buffers.py
        )

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        device_ids = self.determine_ddp_device_ids()
        # a side stream, as Lightning has it: pytorch.org/docs/stable/notes/cuda.html#id5
        with torch.cuda.stream(torch.cuda.Stream()) if device_ids is not None else nullcontext():
            return _Bucketed(model, device_ids=device_ids, **self._ddp_kwargs)


class _Bucketed(DistributedDataParallel):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reducer._push_all_rebuilt_params()
        self._has_rebuilt_buckets = self.reducer._rebuild_buckets()

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        parameters, sparse = super()._build_params_for_reducer()
        return parameters[::-1], sparse[::-1]
