"""What a step costs beyond the bare loop: CPU time of bare torch, of lm_train, and of stock Lightning.

    python benchmarks/step_overhead.py [rounds]

All arms train the same network on the same batches in one process, one thread, round after round; the clock decides
whether a round goes forwards or backwards through the arms. lm_train logs every 10th step, with W&B, validation and saving on
the way off; stock Lightning has its default bar and a CSV logger. Reported are
medians of CPU microseconds a step, and medians of paired ratios to the bare loop of the same round. What of it the ledger
takes is measured inside of lm_train's arm, in the thread that trains: what a step does, and what the writing of many steps'
lines takes, shared out among them; the operations on tensors of both are counted.
"""

from __future__ import annotations

import contextlib
import io
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import CSVLogger
from report import write_results
from torch.utils._python_dispatch import TorchDispatchMode

from lm_train import runs
from lm_train.callbacks import Ledger
from lm_train.data import build as build_data
from lm_train.hardware import Machine
from lm_train.models import build
from lm_train.plan import make_plan
from lm_train.recipe import load
from lm_train.train import train

SIZES = {
    "tiny step": ("{kind: gpt, n_layer: 1, n_head: 1, n_embd: 16, block_size: 8}", 2, 400),
    "step of 20 ms and more": ("{kind: gpt, n_layer: 4, n_head: 4, n_embd: 128, block_size: 64}", 12, 40),
}


class _LedgerClock:
    """CPU time and tensor operations of the ledger, from step `warmup` on."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.nanoseconds = {"step": 0, "writing": 0}
        self.calls = {"step": 0, "writing": 0}
        self.operations: dict[str, Counter[str]] = {"step": Counter(), "writing": Counter()}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        before = {"on_train_batch_end": Ledger.on_train_batch_end, "write": Ledger.write}
        Ledger.on_train_batch_end = self._timed("step", before["on_train_batch_end"])  # type: ignore[method-assign]
        Ledger.write = self._timed("writing", before["write"])  # type: ignore[method-assign]
        try:
            yield
        finally:
            for name, method in before.items():
                setattr(Ledger, name, method)

    def _timed(self, part: str, method: Callable[..., None]) -> Callable[..., None]:
        def timed(ledger: Ledger, trainer: L.Trainer, *args: Any, **options: Any) -> None:
            if trainer.global_step <= self.warmup:
                method(ledger, trainer, *args, **options)
                return
            self.calls[part] += 1
            if self.calls[part] == 2:  # counting takes time: once, and that once not timed
                with _Operations(self.operations[part]):
                    method(ledger, trainer, *args, **options)
                return
            began = time.thread_time_ns()
            method(ledger, trainer, *args, **options)
            self.nanoseconds[part] += time.thread_time_ns() - began

        return timed

    def microseconds(self) -> dict[str, float]:
        """Of an optimizer step, the writing of its line included."""
        steps = self.calls["step"] - 1
        return {part: spent / steps / 1e3 for part, spent in self.nanoseconds.items()}


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


class _Clock(L.Callback):
    """CPU time from the end of step `warmup` to the end of the last."""

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup, self.last = warmup, warmup + steps

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.warmup:
            self.began = time.process_time()
        if trainer.global_step == self.last:
            self.seconds = time.process_time() - self.began


class _Stock(L.LightningModule):
    """What one writes with Lightning's defaults."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.net(batch["tokens"], batch["targets"]) / batch["targets"].numel()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def measure(size: str, folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """CPU microseconds of a step by arm; and the ledger's part."""
    model, batch, steps = SIZES[size]
    warmup = 10
    words = [f"model={model}", f"data.global_batch_size={batch}", f"trainer.max_steps={warmup + steps}"]
    words += ["data.tokenizer=bytes", "trainer.val_check_interval=null", "trainer.limit_val_batches=0"]
    words += ["trainer.sample_tokens=0", "checkpoint.every_n_steps=null", "tracking.wandb=disabled"]
    recipe = load(["recipe=gpt_debug", "optim={kind: adamw}", f"runs_dir={folder}", *words])
    plan = make_plan(recipe, Machine(cpu_cores=1, gpus=()))
    run = runs.create(recipe, plan)
    data = build_data(recipe.data, plan, recipe.seed, run)
    data.prepare(recipe.model)

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return build(recipe.model, plan, data.facts)

    def bare() -> float:
        net = network()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        for i, rows in enumerate(data.train_dataloader().loader):
            if i == warmup:
                began = time.process_time()
            loss = net(rows["tokens"], rows["targets"]) / rows["targets"].numel()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        return time.process_time() - began

    def ours() -> float:
        clock = _Clock(warmup, steps)
        with ledger.watching():
            train(run, None, [clock])
        return clock.seconds

    def stock() -> float:
        clock = _Clock(warmup, steps)
        logger = CSVLogger(folder)
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[clock],
            logger=logger,
            gradient_clip_val=1.0,
            default_root_dir=folder,
        )
        trainer.fit(_Stock(network()), data.train_dataloader().loader)
        return clock.seconds

    ledger = _LedgerClock(warmup)
    arms = {"bare": bare, "lm_train": ours, "stock Lightning": stock}
    seconds = {}
    order = list(arms) if int(time.time()) % 2 else list(reversed(arms))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for name in order:
            seconds[name] = arms[name]() / steps * 1e6
    operations = {part: dict(counts) for part, counts in ledger.operations.items()}
    return seconds, {"cpu_microseconds": ledger.microseconds(), "operations": operations}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    result = {}
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            measure(size, Path(folder))  # imports and caches
            rows, ledgers = zip(*(measure(size, Path(folder)) for _ in range(rounds)), strict=True)
        summary = {}
        for arm in rows[0]:
            microseconds = statistics.median(row[arm] for row in rows)
            ratio = statistics.median(row[arm] / row["bare"] for row in rows)
            summary[arm] = {"cpu_microseconds": round(microseconds), "ratio_to_bare": round(ratio, 3)}
            print(f"{size:<24} {arm:<16} {microseconds:10.0f} us  x {ratio:.3f}", flush=True)
        parts = {
            part: round(statistics.median(found["cpu_microseconds"][part] for found in ledgers), 1)
            for part in ledgers[0]["cpu_microseconds"]
        }
        share = statistics.median(
            sum(found["cpu_microseconds"].values()) / row["bare"] for found, row in zip(ledgers, rows, strict=True)
        )
        ledger = {
            "cpu_microseconds": parts,
            "share_of_the_bare_step": round(share, 5),
            "share_of_a_20_ms_step": round(sum(parts.values()) / 20e3, 5),
            "operations_of_a_step": ledgers[0]["operations"]["step"],
            "operations_of_a_writing": ledgers[0]["operations"]["writing"],
        }
        print(f"{size:<24} {'ledger':<16} {sum(parts.values()):10.1f} us  = {share:.3%}   {ledger}", flush=True)
        result[size] = {"summary": summary, "ledger": ledger, "rounds": rows}
    write_results("step_overhead", result)


if __name__ == "__main__":
    main()
