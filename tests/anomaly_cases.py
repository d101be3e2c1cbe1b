"""What tests of bad values do to a training: a loss or gradient spoilt at some steps, and what stood before and after."""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lm_train import signals
from lm_train.checkpoint import views_of
from lm_train.errors import LMTrainError
from lm_train.modules import TrainingModule
from lm_train.optim import build_optimizer
from lm_train.plan import DataFacts
from lm_train.runs import RunFolder
from lm_train.strategy.buffers import persistent_buffers
from lm_train.train import train


class Spoil(L.Callback):
    """Spoils a step's loss, or one element of its gradient, on one rank.

    Args:
        steps: optimizer steps, from 1.
        what: "nan" and "inf" add it to the loss of the last micro batch, whose gradient stays finite; "times": the loss a
            hundredfold; "gradient": one element becomes inf, under ZeRO 3, whose own hooks take gradients away, all of them.
        rank: whose; None all.
    """

    def __init__(self, steps: Sequence[int], what: str, rank: int | None) -> None:
        self.steps, self.what, self.rank = set(steps), what, rank

    def on_train_start(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        if self.rank not in (None, trainer.global_rank):
            return
        loss_of = pl_module.loss
        by_loss = self.what == "gradient" and any(hasattr(p, "ds_id") for p in pl_module.net.parameters())

        def now() -> bool:
            return trainer.global_step + 1 in self.steps

        def spoilt(batch: dict[str, Any]) -> Tensor:
            loss = loss_of(batch)
            if now() and self.what in ("nan", "inf"):
                loss = loss + float(self.what)
            if now() and by_loss:
                loss = loss + (loss - loss.detach()).sqrt()  # adds nothing, and slopes infinitely
            return loss * 100 if now() and self.what == "times" else loss

        pl_module.loss = spoilt  # type: ignore[method-assign]
        if self.what == "gradient" and not by_loss:
            parameter = next(p for p in pl_module.net.parameters() if p.requires_grad and p.numel())
            parameter.register_hook(lambda gradient: _with_inf(gradient) if now() else gradient)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: TrainingModule, optimizer: Any) -> None:
        """Under fsdp, where such hooks are not called: in this rank's part of the reduced gradient."""
        if self.what != "gradient" or self.rank != trainer.global_rank or trainer.global_step + 1 not in self.steps:
            return
        shards = [p.grad.to_local() for p in pl_module.net.parameters() if isinstance(p.grad, DTensor)]
        for shard in shards[:1]:
            shard.view(-1)[0] = float("inf")


def _with_inf(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient.view(-1)[0] = float("inf")
    return gradient


class Digests(L.Callback):
    """After every step a hash over all that an update changes, on this rank: parameters, optimizer state, buffers."""

    def __init__(self) -> None:
        self.found: dict[int, str] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        self.found[trainer.global_step] = digest(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: TrainingModule, *args: Any) -> None:
        if trainer.step_is_complete:
            self.found[trainer.global_step] = digest(trainer, pl_module)


def digest(trainer: L.Trainer, module: TrainingModule) -> str:
    views = views_of(module.net, trainer.optimizers[0], trainer.global_rank, trainer.world_size)
    hashed = hashlib.blake2b(digest_size=8)
    for view in views.to_load():
        if view.key == "param" or view.flat.any():  # fresh moments may or may not be there
            hashed.update(f"{view.name} {view.key} {view.start}".encode() + bytes_of(view.flat))
    steps = [float(state["step"]) for state, _, _ in views.states() if "step" in state]
    hashed.update(str(sorted({step for step in steps if step})).encode())
    for parameter in module.net.parameters():  # under DeepSpeed also what the network computes with
        part = getattr(parameter, "ds_tensor", None)  # ZeRO 3 may or may not hold small ones whole as well
        hashed.update(bytes_of(getattr(parameter, "_local_tensor", parameter) if part is None else part))
    for name, buffer in persistent_buffers(module.net):
        hashed.update(name.encode() + bytes_of(buffer))
    return hashed.hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def spoilt_run(
    folder: str,
    steps: Sequence[int],
    what: str,
    rank: int | None = None,
    fused: bool = False,
    resume_from: str | None = None,
) -> dict[str, Any]:
    """Trains with some steps spoilt.

    Args:
        folder: the run's.
        steps, what, rank: see `Spoil`.
        fused: take the optimizer's fused form, as on a GPU.
        resume_from: a checkpoint folder.

    Returns:
        The exit code, `Digests` by step, and what was told on standard error.
    """
    signals.forget()
    digests, told = Digests(), io.StringIO()
    before = TrainingModule.configure_optimizers
    if fused:
        TrainingModule.configure_optimizers = lambda self: build_optimizer(self.optim, self.net, fused=True)  # type: ignore
    try:
        with contextlib.redirect_stderr(told):
            code = train(
                RunFolder(folder), Path(resume_from) if resume_from else None, [Spoil(steps, what, rank), digests]
            )
    finally:
        TrainingModule.configure_optimizers = before  # type: ignore[method-assign]
        signals.forget()
        sys.stderr.write(told.getvalue())
    seen = {str(step): value for step, value in digests.found.items()}
    return {"code": int(code), "digests": seen, "told": told.getvalue()}


class Flip(L.Callback):
    """Flips the lowest bit of one parameter's element on one rank, with a step's update."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_start(self, trainer: Any, pl_module: TrainingModule) -> None:
        update = pl_module.optimizer_step

        def flipping(*args: Any) -> None:
            update(*args)
            if trainer.global_step + 1 == self.step and trainer.global_rank == self.rank:
                list(pl_module.net.parameters())[3].data.view(-1)[:1].view(torch.int32).bitwise_xor_(1)

        pl_module.optimizer_step = flipping  # type: ignore[method-assign]


def flipped_run(folder: str, step: int, rank: int) -> dict[str, Any]:
    """Trains with a bit flipped after a step; the error's text under "error"."""
    signals.forget()
    try:
        return {"code": int(train(RunFolder(folder), None, [Flip(step, rank)]))}
    except LMTrainError as error:
        return {"error": str(error)}
    finally:
        signals.forget()


class PoisonedNet(nn.Module):
    """A language model of a user's own whose output is not a number where one of some blocks of tokens is in its batch."""

    def __init__(self, vocab_size: int, bad: list[list[int]]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 16)
        self.head = nn.Linear(16, vocab_size)
        self.bad = bad

    def forward(self, x: Tensor) -> Tensor:
        spoilt = self.training and any(row in self.bad for row in x.tolist())
        return self.head(self.embedding(x)) * (float("nan") if spoilt else 1.0)


def poisoned_net(facts: DataFacts, bad: list[list[int]]) -> nn.Module:
    return PoisonedNet(facts.vocab_size, bad)  # type: ignore[arg-type]
