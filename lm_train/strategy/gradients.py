"""The norm of the gradient, and clipping by it, for whole and for sharded gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float | None) -> Tensor:
    """Scales all gradients so that their global 2-norm is at most `largest`; None leaves them as they are.

    Sharded gradients (DTensor) cost one collective for all of them together.

    Returns:
        The norm before, ().
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if largest is not None:
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        factor = torch.clamp(largest / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grads_with_norm_ has it
        torch._foreach_mul_(local, factor)
    return norm
