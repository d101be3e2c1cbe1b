"""What a person sees while it trains: a bar in a terminal, plain lines elsewhere; on standard error."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

import lightning.pytorch as L
from tqdm import tqdm

from lm_train.callbacks.budget import BudgetGuard
from lm_train.callbacks.metrics import Metrics
from lm_train.loop import StepTrainer

EVALUATED = {
    "perplexity": ".2f",
    "bits_per_byte": ".3f",
    "accuracy": ".2%",
    "f1_macro": ".4f",
    "mse": ".4f",
    "r2": ".4f",
    "exact_match": ".2%",
}
"""Metrics of an evaluation that a person is shown beside the loss, where there are such."""
LINE_EVERY_S = 10.0
"""Without a terminal: at most one line in so many seconds, evaluations apart."""


class _Bar(tqdm):
    """A bar by a clock that nobody sets: with the machine's, one that is set back stops it for as long."""

    monitor_interval = 0
    """tqdm's own thread would compare it with the machine's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._time = time.monotonic
        self.start_t = self.last_print_t = self._time()


class Progress(L.Callback):
    """Shows loss, tokens/s and the time left, from rows that the metrics have read anyway; rank 0 only.

    Args:
        metrics: whose newest row is shown. It must stand before this callback.
        budget: what is left is shown.
        out: where to.
    """

    def __init__(self, metrics: Metrics, budget: BudgetGuard, out: TextIO | None = None) -> None:
        self.metrics, self.budget = metrics, budget
        self.out = out or sys.stderr
        self._bar: Any = None
        self._last_line = float("-inf")
        self._shown: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and self.out.isatty():
            self._bar = _Bar(
                total=trainer.max_steps,
                initial=trainer.global_step,
                file=self.out,
                dynamic_ncols=True,
                mininterval=0.2,
                unit="step",
                bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )

    def on_train_batch_end(self, trainer: StepTrainer, pl_module: L.LightningModule, *args: Any) -> None:
        if not trainer.is_global_zero or not trainer.step_is_complete:
            return
        fresh = self.metrics.latest.get("samples") != self._shown.get("samples")
        self._shown = dict(self.metrics.latest) if fresh else self._shown
        if self._bar is not None:
            self._bar.total = trainer.max_steps
            if fresh:
                self._bar.set_postfix_str(self._text(), refresh=False)
            self._bar.update()
        elif fresh and (time.monotonic() - self._last_line >= LINE_EVERY_S or trainer.global_step == trainer.max_steps):
            self._last_line = time.monotonic()
            left = (trainer.max_steps - trainer.global_step) * self._shown["perf/step_seconds"]
            self.line(f"step {trainer.global_step}/{trainer.max_steps}  {self._text()}  ETA {_clock(left)}")

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        done, now = args[2] + 1, time.monotonic()
        if not trainer.is_global_zero or now - self._last_line < (1.0 if self._bar is not None else LINE_EVERY_S):
            return
        self._last_line = now
        total = trainer.num_val_batches[0]
        if self._bar is not None:
            self._bar.set_postfix_str(f"validating {done}/{total}")
        else:
            self.line(f"step {trainer.global_step}  validating {done}/{total}")

    def on_validation_end(self, trainer: StepTrainer, pl_module: L.LightningModule) -> None:
        if trainer.stop_code is None:
            self._evaluation(trainer, "val", f"step {trainer.global_step}")

    def on_test_end(self, trainer: StepTrainer, pl_module: L.LightningModule) -> None:
        if trainer.stop_code is None:
            self._evaluation(trainer, "test", "test split")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _text(self) -> str:
        row = self._shown
        mfu = f"  MFU {row['perf/mfu']:.1%}" if "perf/mfu" in row else ""
        left = self.budget.text()
        budget = f"  {left}" if left else ""
        unit = "tokens" if "perf/tokens_per_second" in row else "samples"
        return f"loss {row['train/loss']:.3f}  {_short(row[f'perf/{unit}_per_second'])} {unit}/s{mfu}{budget}"

    def _evaluation(self, trainer: L.Trainer, split: str, head: str) -> None:
        row = self.metrics.latest
        if trainer.is_global_zero and f"{split}/loss" in row:
            values = (
                f"{name.replace('_', ' ')} {row[f'{split}/{name}']:{form}}"
                for name, form in EVALUATED.items()
                if f"{split}/{name}" in row
            )
            self.line(f"{head}  {split}/loss {row[f'{split}/loss']:.4f}  {'  '.join(values)}".rstrip())

    def line(self, text: str) -> None:
        """Shows a line without spoiling the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self.out)
        else:
            print(text, file=self.out, flush=True)


def _short(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
