"""What the rank processes of `Pair` can do; `python -m tests.rank_cases` reads cases from standard input."""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from lm_train import models, plugins, signals
from lm_train.callbacks import Sample
from lm_train.data.batches import EvaluationBatches, Samples
from lm_train.data.text import TrainBatches
from lm_train.errors import ExitCode, LMTrainError
from lm_train.hardware import Machine
from lm_train.models.batch_norm import BatchNorm2d
from lm_train.modules import CausalLanguageModel, Classification
from lm_train.optim import build_optimizer, parameter_groups
from lm_train.plan import DataFacts, Plan, make_plan
from lm_train.recipe import load
from lm_train.runs import RunFolder
from lm_train.strategy import LaunchedRank, build_strategy, drawn
from lm_train.train import _quieten, train
from tests.anomaly_cases import flipped_run as flipped_run
from tests.anomaly_cases import spoilt_run as spoilt_run


def run(
    folder: str,
    resume_from: str | None = None,
    fault: str | None = None,
    stop_at: int | None = None,
    poisoned: bool = False,
) -> dict[str, Any]:
    """Trains this rank's part of a run.

    Args:
        folder: the run's.
        resume_from: a checkpoint folder.
        fault: "data": rank 1 reads rank 0's samples; "gradient": rank 1's gradient of one tensor is doubled.
        stop_at: optimizer step after which rank 1 gets SIGTERM's flag.
        poisoned: moving the module to the CPU, which here would change nothing, makes its parameters useless.
    """
    signals.forget()
    callbacks: list[L.Callback] = [_Fault(fault)] if fault else []
    if stop_at is not None:
        callbacks.append(_StopRankOne(stop_at))
    sampled = _Sampled()
    if poisoned:
        CausalLanguageModel.cpu = _poison  # type: ignore[method-assign]
    code = train(RunFolder(folder), Path(resume_from) if resume_from else None, [*callbacks, sampled])
    signals.forget()
    return {"code": int(code), "sample": sampled.text}


def watched(folder: str, resume_from: str) -> dict[str, Any]:
    """Goes on from a checkpoint, and tells what was unpickled on the way.

    Returns:
        `loads`: each call of torch.load or of pickle's own functions; `classes`: whatever any unpickler looked up, by the
        module that had it unpickled.
    """
    loads: list[str] = []
    classes: set[str] = set()
    watching = True

    def caller() -> str:
        frames = [frame.filename for frame in traceback.extract_stack()]
        ours = [name for name in frames if "pickle" not in name and "rank_cases" not in name]
        return ours[-1] if ours else "?"

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "pickle.find_class":
            classes.add(f"{caller()}: {arguments}")

    def seen(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if watching:
                loads.append(f"{owner.__name__}.{name} from {caller()}")
            return real(*arguments, **options)

        setattr(owner, name, call)
        restore.append((owner, name, real))

    restore: list[tuple[Any, str, Any]] = []
    sys.addaudithook(heard)  # cannot be taken away: silent once this is over
    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads")):
        seen(owner, name)
    try:
        answer = run(folder, resume_from)
    finally:
        watching = False
        for owner, name, real in restore:
            setattr(owner, name, real)
    return answer | {"loads": loads, "classes": sorted(classes)}


def refusal(folder: str) -> str:
    """What a run that cannot go on says."""
    signals.forget()
    try:
        train(RunFolder(folder))
    except LMTrainError as error:
        return str(error)
    return ""


def _poison(module: L.LightningModule) -> L.LightningModule:
    for parameter in module.parameters():
        parameter.data.fill_(float("nan"))
    return module


class _Sampled(L.Callback):
    """Remembers the text that the run drew at its end."""

    text: str | None = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.text = next((callback.text for callback in trainer.callbacks if isinstance(callback, Sample)), None)


class _Fault(L.Callback):
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_rank == 1 and self.kind == "gradient":
            next(pl_module.parameters()).register_hook(lambda gradient: gradient * 2)
        if trainer.global_rank == 1 and self.kind == "data":
            batches = trainer.datamodule.train_loader.loader.dataset
            assert isinstance(batches, TrainBatches)
            batches.rank = 0


class _StopRankOne(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        time.sleep(0.05)  # steps of a size that several fit into the second between two agreements
        if trainer.global_rank == 1 and trainer.global_step == self.step:
            signals._requested = ExitCode.REQUEUE


class _CountedSteps(L.Callback):
    """Profiles the optimizer steps first+1 .. last, which hold no logging step."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.counts: dict[str, int] = {}
        self._profile: Any = None

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.first and self._profile is None:
            self._profile = profile(activities=[ProfilerActivity.CPU])
            self._profile.__enter__()
            self._began = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.last and self._profile is not None:
            seconds = time.monotonic() - self._began
            self._profile.__exit__(None, None, None)
            self.counts = _counts(self._profile) | {"seconds": round(seconds, 3)}
            self._profile = None


def _counts(profiled: Any) -> dict[str, int]:
    """Collectives that reached the backend, and reads of a tensor's value by the host (which wait for a GPU)."""
    events = {event.key: event.count for event in profiled.key_averages()}
    return {
        "collectives": sum(n for key, n in events.items() if key.startswith("gloo:")),
        "host_reads": events.get("aten::_local_scalar_dense", 0),
    }


def count(folder: str, first: int, last: int) -> dict[str, Any]:
    """Trains, and counts the collectives and host reads of some steps."""
    counter = _CountedSteps(first, last)
    signals.forget()
    train(RunFolder(folder), None, [counter])
    return counter.counts


class _Broadcasts(L.Callback):
    """What stock Lightning does in every micro batch: broadcast a flag and read it."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        flag = torch.zeros(1)
        dist.broadcast(flag, src=0)
        flag.item()


def count_with_broadcast(folder: str, first: int, last: int) -> dict[str, Any]:
    counter = _CountedSteps(first, last)
    signals.forget()
    train(RunFolder(folder), None, [counter, _Broadcasts()])
    return counter.counts


class _StateBytes(L.Callback):
    """Bytes of the tensors that this rank really holds, between a backward pass and its update, and after it."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        zero = trainer.optimizers[0] if hasattr(trainer.optimizers[0], "zero_grad") else None
        gradients: list[torch.Tensor] = [p.grad for p in pl_module.net.parameters() if p.grad is not None]
        if hasattr(zero, "averaged_gradients"):
            gradients += [g for group in zero.averaged_gradients.values() for g in group or []]
        if hasattr(zero, "grad_partitions_flat_buffer"):
            gradients.append(zero.grad_partitions_flat_buffer)
        for flats in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            gradients += [flat.grad for flat in getattr(zero, flats, []) if flat.grad is not None]
        self.bytes["gradients"] = max(_storage_bytes(gradients), self.bytes.get("gradients", 0))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        optimizer = trainer.optimizers[0]
        parameters = [
            t for p in pl_module.net.parameters() for t in (p.data, getattr(p, "ds_tensor", None)) if t is not None
        ]
        states: list[torch.Tensor] = []
        for flats in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            states += getattr(optimizer, flats, [])
        inner = getattr(optimizer, "optimizer", optimizer)
        inner = getattr(inner, "optimizer", inner)
        for state in inner.state.values():
            states += [t for t in state.values() if isinstance(t, torch.Tensor) and t.dim() > 0]
        self.bytes["parameters"] = _storage_bytes(parameters)
        self.bytes["optimizer"] = _storage_bytes(states, besides=parameters)


def _storage_bytes(tensors: list[torch.Tensor], besides: list[torch.Tensor] = []) -> int:  # noqa: B006
    """Bytes of the storages behind the tensors, each counted once."""

    def storages(of: list[torch.Tensor]) -> dict[int, int]:
        local = [t.to_local() if isinstance(t, DTensor) else t for t in of]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local if t.numel()}

    counted = storages(tensors)
    return sum(size for place, size in counted.items() if place not in storages(besides))


def state_bytes(folder: str) -> dict[str, int]:
    measured = _StateBytes()
    signals.forget()
    train(RunFolder(folder), None, [measured])
    return measured.bytes


def fused_steps(kind: str) -> float:
    """One step of the fused optimizer, which only GPUs get by themselves, on a sharded layer; the sum of its weights."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    layer = fully_shard(nn.Linear(6, 4))
    section = load(["recipe=gpt_debug", f"optim={kind}"]).optim
    optimizer = build_optimizer(section, layer, fused=True)
    layer(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    return float(sum(p.full_tensor().sum() for p in layer.parameters()))  # type: ignore[attr-defined]


def count_bare(steps: int, accumulate: int, folder: str) -> dict[str, Any]:
    """The same counts for a plain loop over the same network: DDP, FSDP2 or DeepSpeed, clipping, SGD, nothing else."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    recipe, plan = load([f"recipe={RunFolder(folder).recipe}"]), Plan.read(RunFolder(folder).plan)
    net: Any = models.build(recipe.model, plan, DataFacts(vocab_size=257))
    if plan.strategy.startswith("zero"):
        return _count_bare_deepspeed(steps, accumulate, net, plan, recipe.model.block_size)
    if plan.strategy == "fsdp":
        for block in net.blocks:
            fully_shard(block)
        fully_shard(net)
    else:
        net = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    tokens = torch.randint(257, (plan.micro_batch_size, recipe.model.block_size))

    def step() -> None:
        for micro in range(accumulate):
            net.require_backward_grad_sync = micro == accumulate - 1
            (net(tokens, tokens) / tokens.numel() / accumulate).backward()
        if recipe.trainer.gradient_clip_val is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), recipe.trainer.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad()

    return _counted(step, steps)


def _counted(step: Callable[[], None], steps: int) -> dict[str, Any]:
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            step()
    return _counts(profiled)


def _count_bare_deepspeed(steps: int, accumulate: int, net: Any, plan: Plan, block_size: int) -> dict[str, Any]:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": int(plan.strategy[4])},
    }
    optimizer = torch.optim.SGD(parameter_groups(net.named_parameters(), 0.1), lr=1e-3, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=False)
    tokens = torch.randint(257, (plan.micro_batch_size, block_size))

    def step() -> None:
        for _ in range(accumulate):
            engine.backward(engine(tokens, tokens) / tokens.numel())
            engine.step()

    return _counted(step, steps)


def evaluate_logits(file: str, strategy: str, micro_batch_size: int, fault: bool = False) -> Any:
    """What a classification reports of given logits when this and the other ranks evaluate them.

    Args:
        file: .npz with `logits`, (n, C), and `labels`, (n,).
        strategy: ddp or fsdp.
        micro_batch_size: samples of a rank's batch.
        fault: what only fills up the last batches counts, too.
    """
    saved = np.load(file)
    logits, labels = torch.from_numpy(saved["logits"]), torch.from_numpy(saved["labels"])

    class Given(Samples):
        def __len__(self) -> int:
            return len(labels)

        def batch(self, samples: Any, epochs: Any) -> dict[str, Any]:
            return {"inputs": logits[samples], "labels": labels[samples]}

    world_size = int(os.environ["WORLD_SIZE"])
    recipe = load(["recipe=gpt_debug", f"trainer.devices={world_size}", f"trainer.strategy={strategy}"])
    plan = make_plan(recipe, Machine(cpu_cores=2, gpus=()))
    plan = plan.model_copy(update={"micro_batch_size": micro_batch_size})
    net = _Passing(logits.shape[1])
    names = tuple(f"class {i}" for i in range(logits.shape[1]))
    module = Classification(net, recipe.optim, plan, seed=0, class_names=names, label_smoothing=0.3)
    batches: Any = EvaluationBatches(Given(), plan, int(os.environ["RANK"]))
    if fault:
        batches = [batch | {"valid": torch.ones_like(batch["valid"])} for batch in batches]
    counter = _CountedEvaluation()
    _quieten(plan)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=build_strategy(plan, drawn(0)),
        plugins=[LaunchedRank()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        callbacks=[counter],
    )
    trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)
    assert module.scores is not None
    assert module.scores.confusion is not None
    return {
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "confusion": module.scores.confusion.tolist(),
        "collectives": counter.collectives,
        "saved": sorted(module.state_dict()),
        "parameters": [name for name, _ in module.named_parameters()],
    }


class _Passing(nn.Module):
    """Gives its inputs back, through a weight that can be sharded."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.weight


class _CountedEvaluation(L.Callback):
    """Counts the collectives from an evaluation's last batch to its end, when all metrics stand."""

    collectives = 0

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if args[2] + 1 == trainer.num_val_batches[0]:
            self._profile = profile(activities=[ProfilerActivity.CPU]).__enter__()

    def on_validation_end(self, *args: Any) -> None:
        self._profile.__exit__(None, None, None)
        self.collectives = _counts(self._profile)["collectives"]


def channels_far_apart(dtype: torch.dtype) -> torch.Tensor:
    """(8, 3, 5, 4), far from mean 0, so that a variance out of sums of squares would lose digits."""
    x = torch.randn(8, 3, 5, 4, generator=torch.Generator().manual_seed(0)) * 2 + torch.tensor([0.0, 5.0, 50.0]).view(
        3, 1, 1
    )
    return x.to(dtype)


def batch_norm(dtype: str) -> dict[str, Any]:
    """This rank's half of a batch through batch norm and back."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    x = channels_far_apart(getattr(torch, dtype)).chunk(2)[dist.get_rank()].requires_grad_()
    norm = BatchNorm2d(x.shape[1])
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    y = norm(x)
    weights = torch.linspace(-1, 1, 2 * y.numel()).view(2, *y.shape)[dist.get_rank()]
    (y.float() * weights).sum().backward()
    found = {f"{name}_grad": p.grad.tolist() for name, p in norm.named_parameters()}  # type: ignore[union-attr]
    assert x.grad is not None
    running = [norm.running_mean.tolist(), norm.running_var.tolist()]  # type: ignore[union-attr]
    return found | {"y": y.tolist(), "x_grad": x.grad.tolist(), "running": running}


def main() -> None:
    plugins.allow(["tests"])
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"result": globals()[order["case"]](**order["arguments"])}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        print("ANSWER " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
