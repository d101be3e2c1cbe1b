"""The norm of the gradient, and clipping by it, for whole and for sharded gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Norm(NamedTuple):
    """A 2-norm, (); of this rank's shards only where `is_part`."""

    value: Tensor
    is_part: bool

    def summed(self) -> Norm:
        """The norm over all ranks: a collective if this is a part."""
        if not self.is_part:
            return self
        squared = self.value.square()
        dist.all_reduce(squared)
        return Norm(squared.sqrt(), is_part=False)


def clip_gradients(
    parameters: Iterable[nn.Parameter], largest: float | None, loss: Tensor | None = None
) -> tuple[Norm, Tensor | None]:
    """Scales all gradients so that their global 2-norm is at most `largest`; None leaves them as they are.

    Args:
        parameters: with their gradients.
        largest: norm.
        loss: of this rank, (); its mean over the ranks travels with the norm where that travels.

    Returns:
        The norm before; and the mean loss, () or None, where gradients are sharded (DTensor), which costs one collective for
        all of them and the loss together.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    norm = Norm(torch.nn.utils.get_total_norm(local), is_part=any(isinstance(g, DTensor) for g in gradients))
    mean: Tensor | None = None
    if norm.is_part and loss is not None:
        sums = torch.stack((norm.value.square(), loss.detach().to(norm.value.dtype)))
        dist.all_reduce(sums)
        norm, mean = Norm(sums[0].sqrt(), is_part=False), sums[1] / dist.get_world_size()
    norm = norm.summed()
    if largest is not None:
        factor = torch.clamp(largest / (norm.value + 1e-6), max=1.0)  # as torch.nn.utils.clip_grads_with_norm_ has it
        torch._foreach_mul_(local, factor)
    return norm, mean
