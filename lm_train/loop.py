"""Lightning's Trainer with a training loop that counts optimizer steps, and five of its habits taken away.

Most names replaced here are private to Lightning; the constructor asserts that they exist, and the tests count what they are
for. Seen in lightning 2.6.6:
  * every micro batch broadcasts a SIGTERM flag and waits for it on the host (github.com/Lightning-AI/pytorch-lightning
    issue 21487);
  * signal handlers save, or broadcast, inside the handler, and hang (issue 21406);
  * 16-bit precisions round every float of a batch, targets and weights of the loss with the inputs;
  * a requested stop runs a whole validation first, which a preempted job has no time for;
  * every hook of every callback runs inside of a context of its profiler, also where that one records nothing.
"""

from __future__ import annotations

import contextlib
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from lm_train.errors import ExitCode
from lm_train.horizon import Horizon


class _NoSignals(_SignalConnector):
    """Leaves the process' signal handlers alone."""

    def register_signal_handlers(self) -> None:
        self.received_sigterm = False
        self._original_handlers: dict[Any, Any] = {}

    def teardown(self) -> None:
        pass


class _NoProfiler(PassThroughProfiler):
    """Records nothing, and makes no generator for it: a step asks about a hundred times."""

    _nothing = contextlib.nullcontext()

    def profile(self, action_name: str) -> contextlib.nullcontext[None]:
        return self._nothing


class StepTrainer(L.Trainer):
    """A Trainer whose run is a number of optimizer steps, from any step on.

    Args:
        horizon: the last step.
        validate_every: optimizer steps between two validations; None validates at the last step only.
        accumulate: micro batches of an optimizer step.
        **options: Lightning's own.
    """

    stop_code: ExitCode | None = None
    """What the run ends with where it was told to stop before its last step, once all ranks agree; DONE: by its budget."""
    save_is_due = False
    """All ranks agree to save at the next boundary, whatever the step's number."""
    only_final_save = False
    """All ranks agree that the budget has room for no save by number before the final one."""

    def __init__(self, *, horizon: Horizon, validate_every: int | None, accumulate: int, **options: Any) -> None:
        super().__init__(
            accumulate_grad_batches=accumulate,
            max_epochs=-1,
            num_sanity_val_steps=0,
            val_check_interval=None,
            max_steps=horizon.max_steps,
            profiler=_NoProfiler(),
            **options,
        )
        self.horizon = horizon
        self.validate_every = validate_every
        epoch_loop = self.fit_loop.epoch_loop
        for owner, name in (
            (self, "_signal_connector"),
            (epoch_loop, "_broadcast_sigterm_tensor"),
            (epoch_loop, "_should_check_val_fx"),
        ):
            assert hasattr(owner, name), (
                f"this version of Lightning has no {name}; lm_train needs lightning>=2.6.4,<2.7"
            )
        self._signal_connector = _NoSignals(self)
        epoch_loop._broadcast_sigterm_tensor = lambda: None
        self.precision_plugin.convert_input = lambda batch: batch
        epoch_loop._should_check_val_fx = lambda data_fetcher: self.validation_is_due

    def follow_horizon(self) -> None:
        """After the horizon has moved: the loop ends there."""
        self.fit_loop.epoch_loop.max_steps = self.horizon.max_steps

    def start_at(self, step: int) -> None:
        """Counts on from optimizer step `step`, as if this process had done the steps before."""
        progress = self.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        progress.ready = progress.completed = step

    @property
    def step_is_complete(self) -> bool:
        """In `on_train_batch_end`: whether that batch ended an optimizer step, not only an accumulation."""
        return not self.fit_loop.epoch_loop._should_accumulate()

    @property
    def validation_is_due(self) -> bool:
        """In `on_train_batch_end`: whether a validation follows this step."""
        if not self.enable_validation or not self.step_is_complete or self.stop_code is not None:
            return False
        step = self.global_step
        return step == self.max_steps or (self.validate_every is not None and step % self.validate_every == 0)
