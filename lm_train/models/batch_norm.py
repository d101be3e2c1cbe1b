"""Batch normalisation (Ioffe & Szegedy 2015, arXiv:1502.03167) that means the same on any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """Normalises each channel of (B, C, H, W) by the mean and variance of the micro batches of all processes together.

    torch's SyncBatchNorm does this on GPUs only. One all-reduce of 2C + 1 numbers in each direction; statistics are taken in
    fp32 and added up in fp64. Where gradients are accumulated, each micro batch has statistics of its own: then the micro
    batch, not only the global batch, decides what is learnt. All processes must train on the same number of micro batches.

    The running statistics, which evaluation uses, are equal on all processes, and stay in fp32 whatever the module is cast
    to. They exist from the start, also where the parameters are still on the meta device, and outlast `to_empty`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.running_mean = torch.zeros(channels, device="cpu")
        self.running_var = torch.ones(channels, device="cpu")
        self.num_batches_tracked = torch.zeros((), dtype=torch.int64, device="cpu")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Of what torch does here to every parameter and buffer, buffers follow only to the device."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            assert moved is not None
            fresh = torch.ones_like if name == "running_var" else torch.zeros_like
            source = fresh(buffer, device=moved.device) if buffer.is_meta else buffer
            self._buffers[name] = source.to(moved.device)
        return self

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        weight, bias = self.weight.float(), self.bias.float()
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, eps=self.eps)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        assert self.momentum is not None
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, True, self.momentum, self.eps)
        y, mean, variance, count = _Synchronised.apply(x, weight, bias, self.eps)
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_((variance * (count / (count - 1))).float(), self.momentum)
        return y


class _Synchronised(torch.autograd.Function):
    """Normalises by the statistics over all processes; the backward pass sums over them as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own_variance, own_mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
        n = x.numel() // x.shape[1]
        own = own_mean.double()
        totals = torch.cat((own.new_full((1,), n), n * own, n * (own_variance + own.square())))  # (1 + 2C,)
        dist.all_reduce(totals)
        count, sums, squares = totals.split((1, len(own), len(own)))
        mean = sums / count
        variance = (squares / count - mean.square()).clamp_(min=0)
        mean, scale = mean.float(), (variance + eps).rsqrt().float()
        y = F.batch_norm(x, mean, variance.float(), weight, bias, eps=eps)
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        """With normalised inputs n = (x - mean) / deviation, gradient g of the outputs and means over all N positions:
        weight / deviation * (g - mean(g) - n mean(g n))."""
        x, weight, mean, scale, count = ctx.saved_tensors

        def of_channels(values: Tensor) -> Tensor:
            return values.view(1, -1, 1, 1)

        normalised = (x.float() - of_channels(mean)) * of_channels(scale)
        g = grad.float()
        sum_g, sum_gn = g.sum(dim=(0, 2, 3)), (g * normalised).sum(dim=(0, 2, 3))
        totals = torch.cat((sum_g, sum_gn)).double()
        dist.all_reduce(totals)
        mean_g, mean_gn = (totals / count).float().chunk(2)
        inner = g - of_channels(mean_g) - normalised * of_channels(mean_gn)
        return (inner * of_channels(weight * scale)).to(x.dtype), sum_gn, sum_g, None
