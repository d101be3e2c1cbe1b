"""Which updates are withheld: those of a loss or gradient that is not finite, and, where asked for, of a spike of the loss.

The decision falls between the backward pass and the update, on the device, by what the step's own reductions have brought
together: the norm of the global gradient, and the loss beside it. So all ranks decide alike without a word. A rank whose loss
is not finite makes its gradient not a number (`Withholding.watched`), and any number that is not finite in any rank's gradient
makes the norm such a number. What a withheld update leaves bit for bit as it was: parameters, the optimizer's moments and its
count of steps, and the network's persistent buffers (the running statistics of batch norms among them). What goes on: the
number of the step, with it the learning rate's schedule and the place in the data.

How an update is withheld:
  * Adam, AdamW and SGD in their fused form take a flag on the device, `found_inf`, and nobody waits (not SGD under fsdp,
    which torch cannot fuse, and not the first update, before which SGD has no momentum to keep).
  * Others (Muon, Adagrad, RMSprop, a user's own) step over parameters without a gradient: the host reads the flag, one number
    that is reduced already, and takes the gradients away. On a CPU that is reading memory.
  * fp16's gradient scaler reads on the host by itself, and steps over what has overflowed.
  * DeepSpeed, which reads on the host by itself, steps over a norm that is not finite; the loss of a spike costs it one
    collective of one number.

fsdp without clipping has no reduced norm of its own: there it costs one collective of one or two numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lm_train.strategy.buffers import saved_places

MADE, NONFINITE, SPIKE = 0.0, 1.0, 2.0
"""What became of an update, as a number on the device; places in `lm_train.ledger.WITHHELD`."""
_NORMAL = 1.4826
"""Standard deviations of a normal distribution that its median absolute deviation is one of."""
_LEAST_DEVIATION = 0.01
"""Of the median: a loss that hardly varies has no spikes within a few per cent."""


class SpikeRule:
    """Whether a loss stands out of the good ones before it.

    Once `size` good losses are known, a spike is a loss above median + threshold x deviation, where the deviation is 1.4826
    times the median absolute deviation, which for normally distributed losses is their standard deviation (Leys et al. 2013,
    "Detecting outliers"), and at least 1% of the median. A loss that is not finite or was flagged does not enter the
    window, so that no bad value moves the limit. Nothing waits for the device.

    Args:
        threshold: in deviations.
        size: good losses that are looked back on.
        device: where the losses are.
    """

    def __init__(self, threshold: float, size: int, device: torch.device | str) -> None:
        self.threshold, self.size = threshold, size
        self.window = torch.zeros(size, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)

    def is_spike(self, loss: Tensor) -> Tensor:
        """Of the step's loss, (): whether it is one, (); never where the loss is not a number."""
        median = self.window.sort().values[self.size // 2]
        deviation = (self.window - median).abs().sort().values[self.size // 2] * _NORMAL
        limit = median + self.threshold * torch.maximum(deviation, median.abs() * _LEAST_DEVIATION)
        return (loss > limit) & (self.count >= self.size).squeeze()

    def take(self, loss: Tensor, good: Tensor) -> None:
        """Puts a loss, (), into the window if it is good, ()."""
        place = self.count % self.size
        self.window.index_copy_(0, place, torch.where(good, loss.float(), self.window[place]).view(1))
        self.count += good

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the good losses in their places, and how many there were."""
        return {"losses": self.window.tolist(), "count": int(self.count)}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `state`; a window of another size keeps the newest losses."""
        losses, count = list(state["losses"]), int(state["count"])
        newest = [losses[i % len(losses)] for i in range(max(0, count - len(losses)), count)][-self.size :]
        if len(losses) != self.size:
            count = len(newest)
        self.window.zero_()
        for i, loss in zip(range(count - len(newest), count), newest, strict=True):
            self.window[i % self.size] = loss
        self.count.fill_(count)


class Withholding:
    """Decides about each update of `net`, and withholds it; see the head of this file.

    Args:
        net: whose buffers a withheld step leaves as they were.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.spikes: SpikeRule | None = None
        self._places: list[tuple[nn.Module, str]] | None = None
        self._kept: list[Tensor] = []

    def begin(self) -> None:
        """Before the first forward pass of a step: keeps the persistent buffers."""
        if self._places is None:
            self._places = list(saved_places(self.net))
            self._kept = [buffer.detach().clone() for buffer in self._buffers()]
        elif self._places:
            torch._foreach_copy_(self._kept, self._buffers())

    def watched(self, loss: Tensor) -> Tensor:
        """The same loss, (); where it is not finite, every gradient of it will be not a number."""
        if loss.requires_grad:
            value = loss.detach()
            loss.register_hook(lambda gradient: torch.add(gradient, value, alpha=0))  # 0 x inf is not a number
        return loss

    def judge(self, norm: Tensor, loss: Tensor | None) -> Tensor:
        """What is to become of the update.

        Args:
            norm: of the global gradient, ().
            loss: of the global batch, (); None where spikes are not looked for.

        Returns:
            MADE, NONFINITE or SPIKE, ().
        """
        verdict = torch.nan_to_num(norm.detach().float() * 0, nan=NONFINITE)  # 0 x inf is not a number either
        if self.spikes is not None:
            assert loss is not None
            spike = self.spikes.is_spike(loss)
            verdict = torch.where((verdict == MADE) & spike, SPIKE, verdict)
            self.spikes.take(loss, (verdict == MADE) & loss.isfinite())
        return verdict

    def withhold(self, verdict: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Before the update: sees to it that it is not made unless the verdict, (), is MADE; buffers go back at once."""
        if takes_flag(optimizer):
            flag = verdict.clamp(max=1.0)
            optimizer.found_inf, optimizer.grad_scale = flag, None  # type: ignore[attr-defined]
            self._put_back_if(flag)
        elif host_value(verdict) != MADE:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
            self.put_back()

    def put_back(self) -> None:
        """The buffers as they were before the step."""
        if self._places:
            torch._foreach_copy_(self._buffers(), self._kept)

    def _put_back_if(self, flag: Tensor) -> None:
        """The same where the flag, (), is 1, without asking what it is: as integers, so that no value is lost on the way."""
        for kind in {buffer.dtype for buffer in self._kept}:
            live = [b for b, k in zip(self._buffers(), self._kept, strict=True) if k.dtype == kind]
            bits = list(_bits(live))
            kept = list(_bits([k for k in self._kept if k.dtype == kind]))
            if kind == torch.bool:
                for now, before in zip(live, kept, strict=True):
                    now.copy_(torch.where(flag > 0, before, now))
                continue
            torch._foreach_sub_(bits, kept)
            torch._foreach_mul_(bits, (1 - flag).to(bits[0].dtype))
            torch._foreach_add_(bits, kept)

    def _buffers(self) -> list[Tensor]:
        assert self._places is not None
        found = (module._buffers[name] for module, name in self._places)
        return [buffer.detach() for buffer in found if buffer is not None]


def _bits(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Floats as integers of their size, which wrap around and know no value that spoils others."""
    sizes = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    return (t.view(sizes[t.element_size()]) if t.is_floating_point() else t for t in tensors)


def takes_flag(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's own kernel can leave an update out by a flag on the device."""
    groups = optimizer.param_groups
    if not all(group.get("fused") for group in groups) or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    # a momentum that torch has only made room for would be left with what lay there before
    return not any(group.get("momentum") for group in groups) or any(optimizer.state.values())


def host_value(value: Tensor) -> float:
    """A number of one element; from a GPU the host waits for it."""
    return float(value.numpy() if value.device.type == "cpu" else value)


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of every rank's number, (): one collective."""
    total = value.detach().float().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
