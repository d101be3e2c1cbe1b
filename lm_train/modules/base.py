"""What a training step is for every task. The loop around it, logging and saving are elsewhere."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lm_train.data import Batch
from lm_train.data.batches import Split
from lm_train.errors import UsageError
from lm_train.horizon import Horizon
from lm_train.optim import build_optimizer, learning_rate
from lm_train.plan import Plan
from lm_train.recipe import AnyOptim
from lm_train.strategy import (
    FullySharded,
    Norm,
    SpikeRule,
    Withholding,
    Zero,
    clip_gradients,
    mean_over_ranks,
    take_buffers_of_first_rank,
)

INPUTS = ("inputs", "tokens", "lengths")
"""Of a batch what goes into the network; the rest is what it is measured by."""


class TrainingModule(L.LightningModule, ABC):
    """Trains `net` with the recipe's optimizer; a task says what the loss is and what is evaluated.

    After every optimizer step `step_loss` (mean over the global batch's share of this rank) and `grad_norm` (of the global
    batch, before clipping) stand as tensors on the device, and `step_learning_rate` as a float; nobody has waited for them.

    Args:
        net: the network.
        optim: the recipe's optim section.
        plan: batch sizes, steps, precision.
        seed: keys dropout together with step, micro batch and rank, so that a resumed step draws the same numbers.
    """

    step_loss: Tensor
    step_learning_rate: float
    step_withheld: Tensor | float = 0.0
    """Whether the step's update was made, (): 0, or the number in `lm_train.ledger.WITHHELD` of why it was not."""
    input_type: torch.dtype | None
    """What floats that go into the network are cast to; None leaves them as they are."""

    def __init__(self, net: nn.Module, optim: AnyOptim, plan: Plan, seed: int) -> None:
        super().__init__()
        self.net = net
        self.optim = optim
        self.plan = plan
        self.seed = seed
        self.horizon = Horizon(plan.max_steps)
        """The schedule's end; `train` puts the run's own here."""
        self._grad_norm: Norm | None = None
        self.input_type = _input_type(plan)
        self._reached_all = False
        self._replaced = self._replaced_before = 0
        """Samples in damaged parts of the data in whose place others stood, as last logged; and before this start."""
        self.withholding = Withholding(net)
        self._spike_options: tuple[float, int] | None = None
        self._loss_carrier: nn.Parameter | None = None

    def watch_spikes(self, threshold: float, window: int) -> None:
        """Withholds the updates of losses that stand out; see `SpikeRule`. Before the strategy sees the module.

        Under ddp the loss of a step reaches the other ranks as the gradient of one parameter more, in the gradients' own
        reduction. It belongs to no network and no optimizer.
        """
        self._spike_options = threshold, window
        if self.plan.strategy == "ddp" and self.plan.precision in ("32-true", "bf16-mixed"):
            self._loss_carrier = nn.Parameter(torch.zeros(()))

    def _make_spike_rule(self) -> None:
        if self._spike_options is not None and self.withholding.spikes is None:
            self.withholding.spikes = SpikeRule(*self._spike_options, self.device)

    @property
    def device(self) -> torch.device:
        """Where the training computes. DeepSpeed moves a network there by itself, unknown to Lightning's own property."""
        return super().device if self._trainer is None else self._trainer.strategy.root_device

    def configure_model(self) -> None:
        """Called by Lightning before optimizers exist; a strategy that cuts the network up does it here."""
        if isinstance(self.trainer.strategy, FullySharded | Zero):
            self.trainer.strategy.shard(self.net)

    @property
    def grad_norm(self) -> Tensor:
        """Global 2-norm of the last optimizer step's gradient before clipping, (). Every rank asks, or none."""
        return self.own_grad_norm.summed().value

    @property
    def own_grad_norm(self) -> Norm:
        """As `grad_norm`, or this rank's part of it: no collective."""
        if isinstance(self.trainer.strategy, Zero):
            return Norm(self.trainer.strategy.grad_norm, is_part=False)
        assert self._grad_norm is not None, "no optimizer step yet"
        return self._grad_norm

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # fp16's gradient scaler cannot clip for an optimizer that unscales inside its kernel
        fused = self.plan.accelerator == "gpu" and self.plan.precision != "16-mixed"
        return build_optimizer(self.optim, self.net, fused=fused)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self._micro(batch_idx) == 0:
            self._make_spike_rule()
            self.withholding.begin()
        key = _dropout_key(self.seed, self.global_step, self._micro(batch_idx), self.global_rank)
        _seed_dropout(key, self.device)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the network takes of a batch, by the name of its argument; floats in the type of its weights."""
        taken = {name: batch[name] for name in INPUTS if name in batch}
        if self.input_type is not None:
            taken = {k: v.to(self.input_type) if v.is_floating_point() else v for k, v in taken.items()}
        return taken

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Sum of the losses of a batch's targets, ()."""

    @abstractmethod
    def start_evaluation(self) -> None:
        """Forgets what `evaluate` has counted."""

    @abstractmethod
    def evaluate(self, batch: Batch) -> None:
        """Counts one micro batch of an evaluation; nobody waits for the device."""

    @abstractmethod
    def evaluation(self, split: Split) -> dict[str, Tensor]:
        """The split's metrics by name (`loss`, `accuracy`, ...), each (), over all ranks: all of them call it."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # the mean over ranks and micro batches, which strategy and trainer take, is then the global sum over the global total
        loss = self.loss(batch) / (batch["total"] / (self.plan.world_size * self.plan.accumulate_grad_batches))
        share = loss.detach() / self.plan.accumulate_grad_batches
        self.step_loss = share if self._micro(batch_idx) == 0 else self.step_loss + share
        return self.watched(loss)

    def watched(self, loss: Tensor) -> Tensor:
        """The loss of a micro batch, (), to be differentiated: what `withholding` goes by hangs on it."""
        loss = self.withholding.watched(loss)
        return loss if self._loss_carrier is None else loss + self._loss_carrier * loss.detach()

    def _micro(self, batch_idx: int) -> int:
        return batch_idx % self.plan.accumulate_grad_batches

    def on_after_backward(self) -> None:
        """Once, before any update: what torch would tell by indices and a step too late, when it has summed some gradients
        and not others."""
        if self.plan.strategy != "ddp" or self._reached_all:
            return
        unreached = [name for name, p in self.net.named_parameters() if p.requires_grad and p.grad is None]
        if unreached:
            more = f" and {len(unreached) - 3} more" if len(unreached) > 3 else ""
            raise UsageError(
                f"model: the loss gives no gradient to {', '.join(unreached[:3])}{more}, which ddp cannot train; leave them out, "
                "freeze them (requires_grad=False), or take trainer.strategy=fsdp"
            )
        self._reached_all = True

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.step_learning_rate = learning_rate(self.optim, self.global_step + 1, self.horizon.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = self.step_learning_rate

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Global 2-norm over the optimizer's parameters, kept for the log; one pass also when nothing is clipped. Then all is
        known by which the update that follows is made or withheld.

        DeepSpeed does the former by itself, and withholds what is not finite.
        """
        spikes, strategy = self.withholding.spikes, self.trainer.strategy
        if isinstance(strategy, Zero):
            if spikes is not None and self.trainer.step_is_complete:
                self._global_loss = mean_over_ranks(self.step_loss)
                strategy.leave_out(spikes.is_spike(self._global_loss))
            return
        loss = None if spikes is None else self.step_loss
        parameters = dict.fromkeys(p for group in optimizer.param_groups for p in group["params"])  # each once
        self._grad_norm, mean = clip_gradients(parameters, gradient_clip_val, loss)
        if loss is not None:
            loss = mean if mean is not None else self._over_replicas(loss)
        self.step_withheld = self.withholding.judge(self._grad_norm.value, loss)
        self.withholding.withhold(self.step_withheld, optimizer)

    def _over_replicas(self, loss: Tensor) -> Tensor:
        """The mean over the ranks of a loss, (), where gradients are not sharded."""
        if self.plan.world_size == 1:
            return loss
        if self._loss_carrier is None:  # 16-bit parameters, or scaled gradients
            return mean_over_ranks(loss)
        carried = self._loss_carrier.grad
        assert carried is not None
        self._loss_carrier.grad = None
        return carried.clone()  # it may lie in a bucket, where the next step's gradients come

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        strategy = self.trainer.strategy
        if not isinstance(strategy, Zero) or not self.trainer.step_is_complete:  # it is asked at every micro batch
            return
        self.step_withheld = strategy.withheld
        if self.step_withheld:
            self.withholding.put_back()
        if self.withholding.spikes is not None:
            good = torch.tensor(not self.step_withheld, device=self.device)
            self.withholding.spikes.take(self._global_loss, good & self._global_loss.isfinite())

    def anomaly_window(self) -> dict[str, Any] | None:
        """What the spike rule looks back on, for a checkpoint; waits for the device."""
        return None if self.withholding.spikes is None else self.withholding.spikes.state()

    def restore_anomaly_window(self, state: dict[str, Any] | None) -> None:
        self._make_spike_rule()
        if self.withholding.spikes is not None and state is not None:
            self.withholding.spikes.restore(state)

    def further_metrics(self) -> dict[str, Tensor]:
        """What else a row of the training's metrics holds, each (), over all ranks: all of them call it."""
        data = self.trainer.datamodule
        if not data.may_replace:
            return {}
        replaced = self._replaced_before + self.summed(torch.tensor(float(data.train_loader.replaced)).to(self.device))
        self._replaced = int(replaced)
        return {"data/replaced": replaced}

    def on_train_end(self) -> None:
        if self._replaced and self.trainer.is_global_zero:
            print(
                f"{self.trainer.datamodule.label}: {self._replaced:,} samples stood in damaged parts; others took their place "
                "(data.on_damage=skip)",
                file=sys.stderr,
                flush=True,
            )

    def saved_state(self) -> dict[str, Any]:
        """JSON values that a checkpoint keeps for `restore_state`."""
        return {"replaced": self._replaced} if self._replaced else {}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Gives back what `saved_state` gave."""
        self._replaced = self._replaced_before = state.get("replaced", 0)

    def on_validation_epoch_start(self) -> None:
        take_buffers_of_first_rank(self.net)
        self.start_evaluation()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, split: Split) -> None:
        if getattr(self.trainer, "stop_code", None) is not None:
            return  # cut off by a stop: a part of the split
        metrics = {f"{split}/{name}": value.float() for name, value in self.evaluation(split).items()}
        # equal on all ranks already: sync_dist would reduce each of them anew; Lightning's own callbacks find them here
        self.log_dict(metrics, logger=False)

    def summed(self, totals: Tensor) -> Tensor:
        """Sums over all ranks, of the totals' shape: one collective, where Lightning's `reduce` makes it two with a barrier."""
        totals = totals.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
        return totals


def _input_type(plan: Plan) -> torch.dtype | None:
    """Where weights are kept in 16 bits, and nothing casts by itself: their type."""
    if plan.precision == "bf16-true" or (plan.strategy.startswith("zero") and plan.precision == "bf16-mixed"):
        return torch.bfloat16
    return torch.float16 if plan.strategy.startswith("zero") and plan.precision == "16-mixed" else None


def _dropout_key(*parts: int) -> int:
    """A 63-bit key from several numbers (FNV-1a on 64-bit words); plain Python, since it runs every step."""
    key = 0xCBF29CE484222325
    for part in parts:
        key = ((key ^ (part + 1)) * 0x100000001B3 + (key >> 29)) & (2**64 - 1)
    return key >> 1


def _seed_dropout(key: int, device: torch.device) -> None:
    """As `torch.manual_seed`, of the generators that a step draws from.

    That function also seeds every kind of accelerator there is, used or not: where none is, each of them formats a stack trace
    of the caller for an error that never comes, at every call.
    """
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.manual_seed(key)


def parameter_table(net: nn.Module) -> Iterable[tuple[str, int]]:
    """Name and parameters of each direct child of the network, shared ones counted where they stand first.

    Of a network that is wrapped, the children of what is inside.
    """
    seen: set[int] = set()
    children, prefix = list(net.named_children()), ""
    while len(children) == 1 and any(True for _ in children[0][1].children()):
        prefix += f"{children[0][0]}."
        children = list(children[0][1].named_children())
    for name, child in ((prefix + name, child) for name, child in children):
        own = [p for p in child.parameters() if id(p) not in seen]
        seen.update(map(id, own))
        yield name, sum(p.numel() for p in own)
