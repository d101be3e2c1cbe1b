"""Batch normalisation (Ioffe & Szegedy 2015, arXiv:1502.03167) that means the same on any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _OverAllProcesses(_BatchNorm):
    """Normalises each channel by the mean and variance of the micro batches of all processes together.

    torch's SyncBatchNorm does this on GPUs only. One all-reduce of 2C + 1 numbers in each direction; statistics are taken in
    fp32 and added up in fp64. Where gradients are accumulated, each micro batch has statistics of its own: then the micro
    batch, not only the global batch, decides what is learnt. All processes must train on the same number of micro batches.

    The running statistics, which evaluation uses, are equal on all processes, and stay in fp32 whatever the module is cast
    to. They outlast `to_empty`.
    """

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

    def forward(self, x: Tensor) -> Tensor:  # (B, C, ...) -> (B, C, ...)
        self._check_input_dim(x)
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        mean, variance = self.running_mean, self.running_var
        if not self.training:  # without running statistics by those of the batch at hand, as torch does
            return F.batch_norm(x, mean, variance, weight, bias, mean is None, eps=self.eps)
        share = self.momentum or 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the mean of all batches so far
                share = 1.0 / float(self.num_batches_tracked)
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return F.batch_norm(x, mean, variance, weight, bias, True, share, self.eps)
        y, batch_mean, batch_variance, count = _Synchronised.apply(x, weight, bias, self.eps)
        if mean is not None and variance is not None:
            with torch.no_grad():
                mean.lerp_(batch_mean.to(mean.dtype), share)
                variance.lerp_((batch_variance * (count / (count - 1))).to(variance.dtype), share)
        return y


class BatchNorm1d(_OverAllProcesses, nn.BatchNorm1d):
    """Of (B, C) or (B, C, T)."""


class BatchNorm2d(_OverAllProcesses, nn.BatchNorm2d):
    """Of (B, C, H, W). Running statistics exist from the start, also where the parameters are still on the meta device."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.running_mean = torch.zeros(channels, device="cpu")
        self.running_var = torch.ones(channels, device="cpu")
        self.num_batches_tracked = torch.zeros((), dtype=torch.int64, device="cpu")


class BatchNorm3d(_OverAllProcesses, nn.BatchNorm3d):
    """Of (B, C, D, H, W)."""


_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}


def over_all_processes(net: nn.Module) -> nn.Module:
    """Makes torch's own batch norms in a network of someone else's normalise over all processes, in place.

    Modules, parameters, buffers and hooks stay the same objects. A class that someone has derived from torch's stays as it
    is: it may compute something else.
    """
    for module in net.modules():
        ours = _OURS.get(type(module))
        if ours is not None:
            module.__class__ = ours
    return net


class _Synchronised(torch.autograd.Function):
    """Normalises by the statistics over all processes; the backward pass sums over them as well."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own_variance, own_mean = torch.var_mean(x.float(), dim=_all_but_channels(x), correction=0)
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
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        """With normalised inputs n = (x - mean) / deviation, gradient g of the outputs and means over all N positions:
        weight / deviation * (g - mean(g) - n mean(g n))."""
        x, weight, mean, scale, count = ctx.saved_tensors

        def of_channels(values: Tensor) -> Tensor:
            return values.view(1, -1, *(1,) * (x.dim() - 2))

        normalised = (x.float() - of_channels(mean)) * of_channels(scale)
        g = grad.float()
        dim = _all_but_channels(x)
        sum_g, sum_gn = g.sum(dim=dim), (g * normalised).sum(dim=dim)
        totals = torch.cat((sum_g, sum_gn)).double()
        dist.all_reduce(totals)
        mean_g, mean_gn = (totals / count).float().chunk(2)
        inner = g - of_channels(mean_g) - normalised * of_channels(mean_gn)
        factor = scale if weight is None else weight * scale
        to_weight, to_bias = (sum_gn, sum_g) if weight is not None else (None, None)
        return (inner * of_channels(factor)).to(x.dtype), to_weight, to_bias, None


def _all_but_channels(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))
