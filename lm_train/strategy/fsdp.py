"""Fully sharded data parallel: torch's FSDP2, `fully_shard` on the finished network (Zhao et al. 2023, arXiv:2304.11277)."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lm_train.plan import Plan
from lm_train.rendezvous import COLLECTIVE_TIMEOUT
from lm_train.strategy.units import units_of
from lm_train.strategy.weights import Weights


class FullySharded(ModelParallelStrategy):
    """Every rank holds a slice of each parameter, its gradient and its optimizer state.

    Lightning's own FSDP strategy wraps FSDP1, which refuses the CPU and gathers whole checkpoints on rank 0. The sizes of
    the mesh are given because Lightning's `auto` makes all ranks of a node one tensor-parallel group.
    """

    def __init__(self, plan: Plan, weights: Weights) -> None:
        super().__init__(
            data_parallel_size=plan.world_size,
            tensor_parallel_size=1,
            process_group_backend="nccl" if plan.accelerator == "gpu" else "gloo",
            timeout=COLLECTIVE_TIMEOUT,
        )
        self.weights = weights
        # bf16 for what is gathered and computed, fp32 for what is summed and kept
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        self.policy = mixed if plan.precision == "bf16-mixed" else MixedPrecisionPolicy()

    def shard(self, net: nn.Module) -> None:
        """Shards a network.

        One that was built on the meta device is given its values afterwards: each full parameter exists for a moment on the
        host, one at a time. One that someone else has built is whole, and keeps the values it has.
        """
        if isinstance(net, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        whole = not any(parameter.is_meta for parameter in net.parameters())
        if whole:
            net.to(self.root_device)
            for tensor in (
                *net.parameters(),
                *net.buffers(),
            ):  # code of someone else's may have drawn other values here
                torch.distributed.broadcast(tensor.data, src=0)
        for unit in units_of(net):
            fully_shard(unit, mesh=mesh, mp_policy=self.policy)
        fully_shard(net, mesh=mesh, mp_policy=self.policy)
        if whole:
            return
        net.to_empty(device=self.root_device)
        with self.weights(net) as fill:
            for name, parameter in net.named_parameters():
                full = torch.empty(parameter.shape, dtype=torch.float32)
                fill(name, full)
                copy_slice(full, parameter)


def copy_slice(full: torch.Tensor, parameter: nn.Parameter) -> None:
    """Copies into a sharded parameter the elements of `full` that this rank holds."""
    assert isinstance(parameter, DTensor)
    start, local = local_range(parameter)
    local.copy_(full.flatten()[start : start + local.numel()])


def local_range(tensor: DTensor) -> tuple[int, torch.Tensor]:
    """The rank's part of a tensor sharded over its first dimension: position in the flattened whole, and a flat view."""
    local = tensor.to_local().detach().view(-1)
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    # torch splits rows as torch.chunk does: ceil(rows / ranks) each, the last ranks may have fewer or none
    rows_each = -(-rows // mesh.size())
    first = min(mesh.get_local_rank() * rows_each, rows)
    return first * (tensor.numel() // rows if rows else 0), local
