"""Whether the ranks still hold the same parameters, where each holds them whole."""

from __future__ import annotations

import socket
from collections import Counter
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lm_train.errors import LMTrainError
from lm_train.loop import StepTrainer
from lm_train.plan import Plan

_WHOLE = ("ddp", "zero1", "zero2")
"""Strategies under which every rank holds all parameters."""


class ReplicaError(LMTrainError):
    """A rank's parameters are others than the other ranks'."""


class Replicas(L.Callback):
    """Compares the ranks' parameters every n steps, and before each save, which would mix them.

    Each parameter's bits are added up as integers on the device, and the sums of all parameters gathered at once: one
    collective of 8 bytes a parameter. Any single flipped bit changes a sum.

    Args:
        plan: names the strategy.
        every: optimizer steps between two comparisons; None: no comparison, not before saves either.
    """

    def __init__(self, plan: Plan, every: int | None) -> None:
        self.every = every if plan.strategy in _WHOLE and plan.world_size > 1 else None
        self._last_step = 0
        """At which they were last seen to agree."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: StepTrainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self.every is not None and trainer.step_is_complete and trainer.global_step % self.every == 0:
            self.compare(trainer, pl_module)

    def compare(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Every rank calls it at the same step. A save does so anew, though a step may have: a validation lies between them.

        Raises:
            ReplicaError: on every rank, naming the ranks that differ from most others.
        """
        if self.every is None:
            return
        own = sums_of_bits(module.net)
        gathered = [torch.empty_like(own) for _ in range(trainer.world_size)]
        dist.all_gather(gathered, own)
        rows = torch.stack(gathered).tolist()  # waits for the device
        found = Counter(map(tuple, rows))
        if len(found) > 1:
            names = [name for name, _ in module.net.named_parameters()]
            raise ReplicaError(self._told(trainer.global_step, rows, found, names))
        self._last_step = trainer.global_step

    def _told(self, step: int, rows: list[list[int]], found: Counter[tuple[int, ...]], names: list[str]) -> str:
        (most, count), *others = found.most_common()
        differ = [rank for rank, row in enumerate(rows) if tuple(row) != most]
        hosts: list[Any] = [None] * len(rows)
        dist.all_gather_object(hosts, socket.gethostname())
        tensor = next(name for name, a, b in zip(names, most, rows[differ[0]], strict=True) if a != b)
        listed = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in differ)
        if others[0][1] == count:  # as many on one side as on the other
            same = next(rank for rank, row in enumerate(rows) if tuple(row) == most)
            which = f"rank {same} on {hosts[same]} and {listed} hold different parameters, and no majority says who is wrong"
        else:
            which = f"{listed} hold{'s' * (len(differ) == 1)} other parameters than the {count} other ranks"
        return (
            f"step {step}: {which} (first in {tensor}); they were the same at step {self._last_step}. Nothing was saved since; "
            "look at that device's memory errors, leave its node out, and start again: the run goes on from its newest checkpoint"
        )


@torch.no_grad()
def sums_of_bits(net: nn.Module) -> Tensor:
    """For each parameter the sum of its elements' bits as integers, modulo 2^64, on its device, (number of parameters,)."""
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    return torch.stack(
        [p.detach().view(-1).view(kinds[p.element_size()]).sum(dtype=torch.int64) for p in net.parameters()]
    )
