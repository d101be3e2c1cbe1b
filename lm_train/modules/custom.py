"""The user's LightningModule inside our loop: its steps, its optimizer and scheduler, what it logs.

It is the `net` of a training module of ours, so that strategies cut it up, checkpoints save it and stops reach it as any
network. What differs from Lightning's own Trainer:
  * the whole run is one epoch of Lightning's; a scheduler steps by optimizer steps, or by passes over the data;
  * values given to `self.log` are averaged over micro batches and ranks, and stand in metrics.jsonl: those of training under
    their own names, those of validation and test as `val/NAME` and `test/NAME`, a `val_` or `test_` in front dropped. Every
    rank must log the same names. A number logged in training is the last step's; a Metric of torchmetrics covers the steps
    since the row before (or since this start of the run), and is reset by us;
  * on several ranks an evaluation may be filled up with batches that do not count: their numbers weigh nothing, and what
    Metrics hold is put back as it was;
  * hooks that our loop has no place for are refused rather than left out in silence.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from lm_train.data import IGNORED, Batch
from lm_train.data.batches import Split
from lm_train.data.custom import OWN
from lm_train.errors import UsageError
from lm_train.modules.base import TrainingModule
from lm_train.plan import Plan
from lm_train.recipe import AnyOptim

_FORWARDED = (
    "on_fit_start", "on_fit_end", "on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end",
    "on_validation_start", "on_validation_end", "on_test_start", "on_test_end", "on_before_zero_grad",
)  # fmt: skip
_REFUSED = (
    "optimizer_step", "optimizer_zero_grad", "backward", "configure_gradient_clipping", "lr_scheduler_step", "configure_model",
    "configure_callbacks", "train_dataloader", "val_dataloader", "test_dataloader", "prepare_data", "on_save_checkpoint",
    "on_load_checkpoint", "transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer",
    "on_before_optimizer_step", "on_before_backward", "on_after_backward", "toggle_optimizer", "on_validation_model_eval",
    "on_validation_model_train",
)  # fmt: skip


class CustomTraining(TrainingModule):
    """Runs a LightningModule's own steps.

    Args:
        net: the user's LightningModule.
        optim: not used: the module brings its optimizer.
        plan: batch sizes, steps, precision.
        seed: keys dropout, as for every task.

    Raises:
        UsageError: if it relies on what our loop has no place for.
    """

    net: L.LightningModule

    def __init__(self, net: L.LightningModule, optim: AnyOptim, plan: Plan, seed: int) -> None:
        super().__init__(net, optim, plan, seed)
        name = type(net).__name__
        if not net.automatic_optimization:
            raise UsageError(f"model.factory: {name} optimises by hand; leave automatic_optimization on")
        refused = [hook for hook in _REFUSED if _overrides(net, hook)]
        if refused:
            raise UsageError(
                f"model.factory: {name} defines {', '.join(refused)}, which our loop does not call; leave it out"
            )
        for hook in _FORWARDED:
            if _overrides(net, hook):
                setattr(self, hook, getattr(net, hook))
        net.log = self._take
        self._logged: dict[str, list[tuple[Tensor, float]]] = {}
        self._metrics: dict[str, Metric] = {}
        self._weight = 1.0
        self._scheduler: LRScheduler | None = None
        self._scheduler_interval, self._scheduler_frequency, self._ticks = "step", 1, 0
        self._checked_state = False

    # ---- what the user's code calls

    def _take(self, name: str, value: Any, *args: Any, batch_size: int | None = None, **options: Any) -> None:
        if isinstance(value, Metric):
            self._metrics[name] = value
            return
        number = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach().mean()
        weight = float(batch_size) if batch_size is not None and self._weight else self._weight
        # a batch of filling alone may well have given nan
        self._logged.setdefault(name, []).append((number if weight else torch.zeros_like(number), weight))

    def _call(self, step: str, batch: Batch, batch_idx: int) -> Any:
        """Runs a step as the network's forward, where the strategies' hooks gather its parameters."""
        function = getattr(self.net, step)
        given = (self._cast(batch), batch_idx)
        count = len(inspect.signature(function).parameters)
        own = self.net.forward

        def redirected() -> Any:
            self.net.forward = own
            return function(*given[:count])

        self.net.forward = redirected
        try:
            return self.net()
        finally:
            self.net.forward = own

    def _cast(self, batch: Batch) -> Any:
        """The batch as the user's code knows it, floats that go into the network in the type of its weights."""
        content, low = batch.get(OWN, batch), self.input_type
        if low is None:
            return content
        if OWN not in batch:
            return batch | self.inputs(batch)
        return apply_to_collection(content, Tensor, lambda t: t.to(low) if t.is_floating_point() else t)

    # ---- training

    def setup(self, stage: str) -> None:
        if _overrides(self.net, "setup"):
            self.net.setup(stage)

    def loss(self, batch: Batch) -> Tensor:
        """The step's own loss: the mean over its micro batch, ()."""
        return self._loss_of(self._call("training_step", batch, 0))

    def _loss_of(self, out: Any) -> Tensor:
        loss = out.get("loss") if isinstance(out, dict) else out
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = "None" if loss is None else f"a {type(loss).__name__}"
            raise UsageError(
                f"model.factory: training_step of {type(self.net).__name__} gave {what}; expected a loss of one number, or a "
                "dictionary with one as loss"
            )
        return loss.reshape(())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self._micro(batch_idx) == 0:
            self._logged.clear()
        self._weight = 1.0
        loss = self._loss_of(self._call("training_step", batch, batch_idx))
        share = loss.detach() / self.plan.accumulate_grad_batches
        self.step_loss = share if self._micro(batch_idx) == 0 else self.step_loss + share
        return self.watched(loss)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._forward_batch_hook("on_train_batch_start", batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self._forward_batch_hook("on_train_batch_end", outputs, batch, batch_idx)

    def _forward_batch_hook(self, hook: str, *args: Any) -> None:
        if _overrides(self.net, hook):
            getattr(self.net, hook)(*(a[OWN] if isinstance(a, dict) and OWN in a else a for a in args))

    def further_metrics(self) -> dict[str, Tensor]:
        """What training steps logged; all ranks call it.

        Numbers are the last step's, averaged over micro batches and ranks. A Metric covers all steps since it was last asked
        for, and starts anew.
        """
        found = self._averages(self._logged)
        asked = {name: metric for name, metric in self._metrics.items() if metric.update_called}
        found |= {name: metric.compute() for name, metric in asked.items()}
        for metric in asked.values():  # after all of them are read: one may be made of another
            metric.reset()
        return found

    def _averages(self, logged: dict[str, list[tuple[Tensor, float]]]) -> dict[str, Tensor]:
        if not logged:
            return {}
        names = sorted(logged)
        rows = [torch.stack([value * weight for value, weight in logged[name]]).sum() for name in names]
        counts = [sum(weight for _, weight in logged[name]) for name in names]
        totals = torch.stack((torch.stack(rows), torch.tensor(counts, device=self.device)), dim=1)
        totals = self.summed(totals.double())
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True)}

    # ---- optimizer and scheduler

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer, scheduler = _one_of_each(self.net.configure_optimizers(), type(self.net).__name__)
        if scheduler is not None:
            self._scheduler = scheduler["scheduler"]
            self._scheduler_interval = scheduler.get("interval", "step")
            self._scheduler_frequency = int(scheduler.get("frequency", 1))
        return optimizer

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.step_learning_rate = float(optimizer.param_groups[0]["lr"])

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if not self.trainer.step_is_complete:  # DeepSpeed is asked at every micro batch
            return
        if not self._checked_state:
            self._check_state(optimizer)
            self._checked_state = True
        if self._scheduler is None:
            return
        steps = self.global_step + 1  # Lightning counts this one afterwards
        done = steps if self._scheduler_interval == "step" else int(self.trainer.datamodule.epoch(steps))
        while self._ticks < done // self._scheduler_frequency:
            self._ticks += 1
            self._scheduler.step()

    def _check_state(self, optimizer: Any) -> None:
        """Whether checkpoints can hold the optimizer's state: values for each element, and the number of the step."""
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        while not isinstance(inner, torch.optim.Optimizer) and hasattr(inner, "optimizer"):
            inner = inner.optimizer
        for parameter, state in inner.state.items():
            for key, value in state.items():
                fits = value is None or key == "step" or (isinstance(value, Tensor) and value.shape == parameter.shape)
                if not fits:
                    raise UsageError(
                        f"model.factory: {type(inner).__name__} keeps {key!r}, which has not one value for each element of a "
                        "parameter and which checkpoints would lose; take AdamW, SGD or another that keeps such values only"
                    )

    def saved_state(self) -> dict[str, Any]:
        if self._scheduler is None:
            return {}
        return {"scheduler": self._scheduler.state_dict(), "ticks": self._ticks}

    def restore_state(self, state: dict[str, Any]) -> None:
        if self._scheduler is None or "scheduler" not in state:
            return
        self._scheduler.load_state_dict(state["scheduler"])
        self._ticks = state["ticks"]
        for group, rate in zip(self._scheduler.optimizer.param_groups, self._scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    # ---- evaluation

    def start_evaluation(self) -> None:
        self._logged = {}
        self._metrics = {}
        self._split = "test" if self.trainer.testing else "val"
        self._forward_if("on_validation_epoch_start" if self._split == "val" else "on_test_epoch_start")

    def evaluate(self, batch: Batch) -> None:
        raise AssertionError("validation_step and test_step are the user's")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("validation_step", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        step = "test_step" if _overrides(self.net, "test_step") else "validation_step"
        self._evaluate(step, batch, batch_idx)

    def _evaluate(self, step: str, batch: Batch, batch_idx: int) -> None:
        if not _overrides(self.net, step):
            return
        batch, self._weight = _only_valid(batch)
        counts = self._weight > 0
        with contextlib.nullcontext() if counts else _unchanged(self._all_metrics()):
            out = self._call(step, batch, batch_idx)  # also where nothing counts: other ranks wait in its collectives
        loss = out.get("loss") if isinstance(out, dict) else out
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._take("", loss)

    def _all_metrics(self) -> list[Metric]:
        return [m for m in self.net.modules() if isinstance(m, Metric)] + list(self._metrics.values())

    def evaluation(self, split: Split) -> dict[str, Tensor]:
        """What was logged, as `loss` for `val_loss`, `val/loss` or `loss`; else the loss that the step returned."""
        self._weight = 1.0
        self._forward_if("on_validation_epoch_end" if split == "val" else "on_test_epoch_end")
        found = self._averages(self._logged)
        for name, metric in self._metrics.items():
            found[name] = metric.compute()
            metric.reset()
        returned = found.pop("", None)
        named = {_without_split(name): value for name, value in found.items()}
        if returned is not None:
            named.setdefault("loss", returned)
        self._logged, self._metrics = {}, {}
        return named

    def _forward_if(self, hook: str) -> None:
        if _overrides(self.net, hook):
            getattr(self.net, hook)()


def _overrides(net: L.LightningModule, hook: str) -> bool:
    return getattr(type(net), hook, None) is not getattr(L.LightningModule, hook, None)


@contextlib.contextmanager
def _unchanged(metrics: Iterable[Metric]) -> Iterator[None]:
    """Puts back what metrics hold: their states, what they have computed, and how often they were updated."""
    kept = []
    for metric in metrics:
        names = (*metric._defaults, "_update_count", "_computed", "_forward_cache")
        # with what is inside: updates add in place, and append to lists
        kept.append((metric, {name: copy.deepcopy(getattr(metric, name)) for name in names}))
    yield
    for metric, before in kept:
        for name, value in before.items():
            setattr(metric, name, value)


def _without_split(name: str) -> str:
    for split in ("val", "validation", "valid", "test"):
        for between in ("_", "/"):
            if name.startswith(split + between):
                return name[len(split) + 1 :]
    return name


def _only_valid(batch: Batch) -> tuple[Batch, float]:
    """A batch without what fills it up, and how many samples, or targets, it has; a batch of filling alone stays, with 0."""
    if "valid" not in batch:
        return batch, float((batch["targets"] != IGNORED).sum()) if "targets" in batch else 1.0
    valid = batch["valid"]
    count = int(valid.sum())
    if count in (0, len(valid)):
        return batch, float(count)
    cut = {k: v[valid] if isinstance(v, Tensor) and v.shape[:1] == valid.shape else v for k, v in batch.items()}
    return cut, float(count)


def _one_of_each(configured: Any, name: str) -> tuple[torch.optim.Optimizer, dict[str, Any] | None]:
    """The one optimizer, and at most one scheduler with its options, of what `configure_optimizers` gives.

    Raises:
        UsageError: if it gives several, none, or a scheduler that cannot be saved.
    """
    schedulers: list[Any] = []
    if isinstance(configured, dict):
        schedulers = [configured["lr_scheduler"]] if configured.get("lr_scheduler") is not None else []
        configured = configured.get("optimizer")
    elif (
        isinstance(configured, tuple) and len(configured) == 2 and all(isinstance(c, list | tuple) for c in configured)
    ):
        configured, schedulers = configured[0], list(configured[1])
    optimizers = list(configured) if isinstance(configured, list | tuple) else [configured]
    if len(optimizers) != 1 or not isinstance(optimizers[0], torch.optim.Optimizer):
        what = f"{len(optimizers)} of them" if len(optimizers) != 1 else f"a {type(optimizers[0]).__name__}"
        raise UsageError(
            f"model.factory: configure_optimizers of {name} must give one optimizer of torch; it gave {what}"
        )
    if len(schedulers) > 1:
        raise UsageError(
            f"model.factory: configure_optimizers of {name} gave {len(schedulers)} schedulers; one at most"
        )
    if not schedulers:
        return optimizers[0], None
    scheduler = schedulers[0] if isinstance(schedulers[0], dict) else {"scheduler": schedulers[0]}
    kind = type(scheduler.get("scheduler")).__name__
    if not isinstance(scheduler.get("scheduler"), LRScheduler) or kind == "ReduceLROnPlateau":
        raise UsageError(f"model.factory: {name} has a {kind}; expected a scheduler of torch that steps by itself")
    try:
        json.dumps(scheduler["scheduler"].state_dict())
    except (TypeError, ValueError):
        raise UsageError(
            f"model.factory: the state of {name}'s {kind} is not plain numbers, and a checkpoint could not hold it; take another"
        ) from None
    return optimizers[0], scheduler
