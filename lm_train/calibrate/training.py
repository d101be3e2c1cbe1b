"""What lm_train itself adds to a network's work.

Real trainings of a network so small that the loop is what takes the time, each beside the bare loop of the same network on the
same batches; and a real save.
"""

from __future__ import annotations

import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import nn

from lm_train import checkpoint, runs
from lm_train.data import build as build_data
from lm_train.hardware import Machine
from lm_train.models import build
from lm_train.plan import make_plan
from lm_train.recipe import load
from lm_train.train import train

TINY = (
    "recipe=gpt_debug",
    "model={kind: gpt, n_layer: 1, n_head: 1, n_embd: 16, block_size: 8}",
    "optim={kind: adamw}",
    "trainer.val_check_interval=null",
    "trainer.limit_val_batches=0",
    "trainer.sample_tokens=0",
    "checkpoint.every_n_steps=null",
    "tracking.wandb=disabled",
)
WARM_UP = 10
SAVED = (8, 2048)
"""Sides of the square matrices of the two saves that are timed."""


class _Clock(L.Callback):
    """Seconds from the end of step `first` to the end of step `last`."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.began = self.seconds = 0.0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if not trainer.step_is_complete:
            return
        if trainer.global_step == self.first:
            self.began = time.perf_counter()
        if trainer.global_step == self.last:
            self.seconds = time.perf_counter() - self.began


def _words(folder: Path, *words: str) -> list[str]:
    """Of a tiny training on a text of its own."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("".join(f"{n * n} words and numbers, {n} of them.\n" for n in range(10_000)), encoding="utf-8")
    return [*TINY, f"data={{kind: text, path: {text}, tokenizer: bytes}}", f"runs_dir={folder}", *words]


def _added(folder: Path, accumulate: int, log_every: int, steps: int, cores: int) -> float:
    """Seconds of one step beyond the bare loop's."""
    words = _words(folder, f"trainer.max_steps={WARM_UP + steps}")
    words += [f"trainer.accumulate_grad_batches={accumulate}", f"data.global_batch_size={2 * accumulate}"]
    recipe = load([*words, f"trainer.log_every_n_steps={log_every}"])
    plan = make_plan(recipe, Machine(cpu_cores=cores, gpus=()))
    run = runs.create(recipe, plan)
    data = build_data(recipe.data, plan, recipe.seed, run)
    data.prepare(recipe.model)
    net = build(recipe.model, plan, data.facts)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    clock = _Clock(WARM_UP, WARM_UP + steps)
    # metrics and remarks of these runs are nobody's
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(run, None, [clock])
    batches = iter(data.train_dataloader().loader)
    began = time.perf_counter()
    for _ in range(steps):
        for rows in islice(batches, accumulate):
            loss = net(rows["tokens"], rows["targets"]) / rows["targets"].numel()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return (clock.seconds - (time.perf_counter() - began)) / steps


def loop_seconds(folder: Path, quick: bool, cores: int) -> dict[str, float]:
    """`step`, `micro_batch` and `row` of `lm_train.plan.rates.calibration.Training`."""
    rounds, steps = (1, 30) if quick else (3, 100)
    never = 10_000
    plain, four, rows = (
        statistics.median(_added(folder, accumulate, every, steps, cores) for _ in range(rounds))
        for accumulate, every in ((1, never), (4, never), (1, 1))
    )
    micro = max(0.0, (four - plain) / 3)
    return {"step": max(0.0, plain - micro), "micro_batch": micro, "row": max(0.0, rows - plain)}


def token_seconds(folder: Path, quick: bool, cores: int) -> float:
    """Until one token of running text is in a batch."""
    words = _words(folder, "model.block_size=128", "data.global_batch_size=16")
    recipe = load([*words, "trainer.max_steps=400"])
    plan = make_plan(recipe, Machine(cpu_cores=cores, gpus=()))
    data = build_data(recipe.data, plan, recipe.seed, runs.create(recipe, plan))
    data.prepare(recipe.model)
    batches = iter(data.train_dataloader().loader)
    next(batches)
    count, began = 20 if quick else 200, time.perf_counter()
    for rows in islice(batches, count):
        assert rows["tokens"].numel() == plan.micro_batch_size * 128
    return (time.perf_counter() - began) / count / (plan.micro_batch_size * 128)


def save_seconds(place: Path, quick: bool) -> dict[str, float]:
    """`save_seconds` and `bandwidth` of `lm_train.plan.rates.calibration.Disk`, by the checkpoints' own code."""
    seconds, sizes = [], []
    for side in SAVED[: 1 if quick else 2] + ((512,) if quick else ()):
        net = nn.ModuleList(nn.Linear(side, side, bias=False) for _ in range(2))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        took = []
        for _ in range(1 if quick else 3):
            with tempfile.TemporaryDirectory(prefix=".calibrate-", dir=place) as folder:
                began = time.perf_counter()
                checkpoint.save(Path(folder) / "step-1", checkpoint.views_of(net, optimizer, 0, 1), {"step": 1})
                took.append(time.perf_counter() - began)
        seconds.append(statistics.median(took))
        sizes.append(3 * sum(4 * parameter.numel() for parameter in net.parameters()))
    more = max(seconds[1] - seconds[0], 0.05 * seconds[1])
    return {"save_seconds": seconds[0], "bandwidth": (sizes[1] - sizes[0]) / more}


def offload_bandwidth(gpu: int) -> float:
    """Bytes/s from pinned host memory to a GPU."""
    size = 1 << 28
    there = torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", gpu))
    here = torch.empty(size, dtype=torch.uint8).pin_memory()
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        there.copy_(here, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return size / min(seconds)


def training(place: Path, threads: int, quick: bool) -> dict[str, Any]:
    """`loop`, `token_seconds` and `disk`, each as above.

    Args:
        place: where runs lie: saves are written there.
        threads: of this process.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        return {
            "loop": loop_seconds(folder, quick, threads),
            "token_seconds": token_seconds(folder, quick, threads),
            "disk": save_seconds(place, quick),
        }
