"""`debug=true`: shapes of the first batch, the slowest operations, and whether one batch can be learnt by heart."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lm_train.data import IGNORED, Batch
from lm_train.errors import LMTrainError
from lm_train.loop import StepTrainer
from lm_train.modules import CustomTraining, TrainingModule

PROFILED_STEPS = range(5, 10)
OVERFIT_STEPS = 400
OVERFIT_LOSS = 0.1
"""Nats a token that count as near zero: the right token has 90% of the probability."""
_OVERFIT_TOKENS = 64
_OVERFIT_SAMPLES = 4


class DebugChecks(L.Callback):
    """Prints shapes and a profile to standard error."""

    def __init__(self) -> None:
        self._hooks: list[Any] = []
        self._profile: Any = None
        self.first_batch: Batch | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.first_batch is None:
            self.first_batch = batch
            _say("shapes of the first batch:")
            for name, tensor in batch.items():
                _say(f"  {name:<36} {_shape(tensor)}")
            self._watch_modules(pl_module.net)
        elif self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
        if step in PROFILED_STEPS and self._profile is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities)
            torch.autograd.set_detect_anomaly(False)  # its checks of every tensor would lead the list
            self._profile.__enter__()

    def on_train_batch_end(self, trainer: StepTrainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self._profile is not None and trainer.global_step > PROFILED_STEPS[-1]:
            self._report(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._profile is not None:
            self._report(trainer)

    def _report(self, trainer: L.Trainer) -> None:
        self._profile.__exit__(None, None, None)
        torch.autograd.set_detect_anomaly(True)
        events = self._profile.key_averages()
        self._profile = None
        on_gpu = trainer.strategy.root_device.type == "cuda"
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        total = sum(getattr(event, key) for event in events) or 1
        _say(f"slowest operations of {len(PROFILED_STEPS)} steps ({'GPU' if on_gpu else 'CPU'} time of their own):")
        for event in sorted(events, key=lambda e: -getattr(e, key))[:8]:
            share = getattr(event, key) / total
            _say(f"  {event.key[:44]:<44} {share:6.1%}  {getattr(event, key) / 1e3:9.1f} ms  {event.count:6} calls")

    def _watch_modules(self, net: nn.Module) -> None:
        def hook(name: str) -> Any:
            return lambda module, inputs, output: _say(f"  {name:<36} {_shape(output)}")

        for name, module in net.named_modules():
            if name.count(".") <= 1 and not isinstance(module, nn.ModuleList | nn.Dropout):
                self._hooks.append(module.register_forward_hook(hook(name or type(net).__name__)))


def overfit_one_batch(module: TrainingModule, batch: Batch) -> float | None:
    """Trains a fresh network on a few samples until it knows them by heart.

    Args:
        module: freshly built, on its device; its network is changed.
        batch: of a training.

    Returns:
        The last loss, in the task's unit for each target (nats a token, or a class); None, and a line that says so, for a
        LightningModule of the user's own: nobody knows how small its loss can become, or what it needs of a Trainer; and
        for a batch that is no dictionary of tensors: nobody knows how to take a few samples of it.

    Raises:
        LMTrainError: if the loss of a network of ours does not come near zero: model, loss, gradient or optimizer is wrong.
            Of another, or one with frozen parameters, a line says so, since it need not be able to.
    """
    if isinstance(module, CustomTraining):
        _say(
            f"overfit one batch: left out, since the loss of {type(module.net).__name__} is its own and has no known scale"
        )
        return None
    if not any(isinstance(value, Tensor) for value in batch.values()):
        _say("overfit one batch: left out, since the batch is no dictionary of tensors, of which to take a few samples")
        return None
    net = module.net
    device = next(net.parameters()).device
    few = _few_samples(batch, device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    module.input_type = None  # the fresh weights are fp32 under every precision
    module.eval()  # dropout, or smoothed labels, would keep the loss up
    loss, first = float("inf"), float("nan")
    for step in range(OVERFIT_STEPS):
        value = module.loss(few) / few["total"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        loss = value.item()
        first = loss if step == 0 else first
        if loss < OVERFIT_LOSS:
            _say(f"overfit one batch: loss {first:.3f} -> {loss:.3f} in {step + 1} steps, as it should")
            return loss
    found = f"overfit one batch: loss {first:.3f} -> {loss:.3f} after {OVERFIT_STEPS} steps, expected below {OVERFIT_LOSS}; "
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    if frozen:
        _say(f"{found}{frozen:,} parameters are frozen, and the others alone may not be able to")
    elif not hasattr(net, "fill"):  # someone else's: it may see no context, or not stand Adam at this rate
        _say(f"{found}{type(net).__name__} either has a fault, or cannot tell these samples apart, or learns slowly")
    else:
        raise LMTrainError(f"{found}a network that cannot learn one batch has a fault in model, loss or gradient")
    return loss


def _few_samples(batch: Batch, device: torch.device) -> Batch:
    """One short sequence, or a handful of other samples."""
    packed = {"tokens", "targets"} == {name for name, value in batch.items() if isinstance(value, Tensor)}
    rows = 1 if packed else _OVERFIT_SAMPLES
    few = {name: value[:rows].to(device) for name, value in batch.items() if isinstance(value, Tensor)}
    if packed:
        few = {name: value[:, :_OVERFIT_TOKENS] for name, value in few.items()}
        return few | {"total": float(few["targets"].numel())}
    if "tokens" in few and "targets" in few:
        return few | {"total": float((few["targets"] != IGNORED).sum())}
    return few | {"total": float(len(next(iter(few.values()))))}


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
