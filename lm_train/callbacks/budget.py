"""The run is held to its budget: rank 0 judges, all ranks act on it where they agree (`lm_train.callbacks.stopping`)."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable

import lightning.pytorch as L

from lm_train.budget import Guard, Spending, Wish
from lm_train.budget.guard import Kind
from lm_train.callbacks.metrics import peak_bytes
from lm_train.horizon import Horizon, affordable_steps
from lm_train.loop import StepTrainer
from lm_train.plan import Plan, size_of
from lm_train.recipe import Recipe

WAY_OUT_S = {"disabled": 0.8, "offline": 4.0, "online": 20.0}
"""What the way out is taken for, by `tracking.wandb`, before an earlier start has shown it: assumptions."""
WARN_AT = 0.8
MARKS = (0.03, 0.1, 0.3, 0.6, 0.85, 0.95)
"""Shares of the budget after which the measured speed corrects the last step."""
WARM_STEPS = 10
"""Steps of a start before its speed is believed."""
LEAST_CHANGE = 0.01
"""Of the last step: a smaller correction is not worth another schedule."""
KEPT_BACK = 0.01
"""Of the time left: not planned with, so that the guard does not end the run before its schedule has ended."""
SAMPLED_TOKEN_S = 0.01
"""Of drawing a token of the sample: an estimate for small networks on a CPU."""
MOST_FOR_EVALUATIONS = 0.25
"""Of the budget: the last evaluations are not planned for where they take more."""
JUDGED_AFTER = 30
"""Steps after which a measured step and its memory are held against the prediction."""


def _tracked(recipe: Recipe) -> str:
    """How, where the recipe leaves it to whether there is a key."""
    asked = recipe.tracking.wandb
    return asked if asked != "auto" else "online" if os.environ.get("WANDB_API_KEY") else "offline"


class BudgetGuard(L.Callback):
    """Counts what the run uses, and says when it must stop, save, or end elsewhere. It must stand before `StopAgreement`.

    Args:
        spending: of this start, on rank 0; None on the others, which only do what was agreed.
        plan: limits, prediction.
        recipe: what is done at which step.
        horizon: the run's last step.
        closing_batches: batches of the validation and of the test that follow the last step.
    """

    def __init__(
        self,
        spending: Spending | None,
        plan: Plan,
        recipe: Recipe,
        horizon: Horizon,
        closing_batches: tuple[int, int] = (0, 0),
    ) -> None:
        self.spending, self.plan, self.recipe, self.horizon = spending, plan, recipe, horizon
        self.closing_batches = closing_batches
        self.say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
        end, way_out, saves = math.inf, 0.0, list[float]()
        if spending is not None:
            end = spending.end - spending.reserve
            way_out = spending.account.upper_shutdown_seconds(WAY_OUT_S[_tracked(recipe)])
            saves = spending.account.save_seconds
        predicted = None if plan.prediction is None else plan.prediction.checkpoint_seconds.high
        self.guard = Guard(end, shutdown=way_out, saves=saves, predicted_save=predicted)
        self._saved_step = 0
        self._steps = 0
        self._next_mark: float | None = None
        self._validation_seconds: float | None = None
        self._validation_began = 0.0
        before = [] if spending is None else spending.account.starts
        self._warned = any(start.warned and start.limits == plan.limits for start in before)
        self._judged = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._saved_step = max(self._saved_step, trainer.global_step)

    def on_train_batch_end(self, trainer: StepTrainer, pl_module: L.LightningModule, *args: object) -> None:
        if trainer.step_is_complete and self.horizon.reach(trainer.global_step):
            trainer.follow_horizon()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.spending is not None:
            self._validation_began = self.spending.seconds
            if trainer.state.fn != "fit":
                self.guard.start("val", self._validation_began)

    def on_validation_end(self, trainer: StepTrainer, pl_module: L.LightningModule) -> None:
        if self.spending is not None and trainer.stop_code is None:
            self._validation_seconds = self.spending.seconds - self._validation_began

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.spending is not None:
            self.guard.start("test", self.spending.seconds)

    def saved(self, step: int, blocked: float, seconds: float | None) -> None:
        """A checkpoint was begun, for which the training stood still; or published, so long after it was begun."""
        if seconds is None:
            self._saved_step = step
            if self.spending is not None:
                self.guard.began_save(self.spending.seconds, blocked)
        elif self.spending is not None:
            self.guard.saved(seconds)
            self.spending.note("saved", step=step, took=round(seconds, 4), blocked=round(blocked, 4))

    def wish(self, trainer: StepTrainer, kind: Kind, batches_left: float) -> Wish:
        """What is to be done at this boundary; on ranks other than 0 nothing.

        Args:
            trainer: at the boundary.
            kind: what has ended here, a step or a batch of an evaluation.
            batches_left: of the evaluation.
        """
        if self.spending is None:
            return Wish()
        now, step = self.spending.seconds, trainer.global_step
        self.guard.passed(kind, now)
        if kind == "train":
            self._after_step(trainer, step, now)
        following = self._following(trainer, kind, batches_left)
        if following is None:
            return Wish()
        every, interval = self.recipe.checkpoint.every_n_steps, self.recipe.trainer.val_check_interval
        saved, next_save, next_validation = self._saved_step == step, None, None
        if kind == "train":
            if every is not None and not trainer.only_final_save:
                next_save = -step % every
            if interval is not None and trainer.enable_validation:
                next_validation = -step % interval
        elif kind == "val" and not saved:
            next_validation = int(min(batches_left, 1 << 30))
        wish = self.guard.wish(
            now,
            following,
            alone=trainer.world_size == 1,
            saves=int(not saved),
            next_save=next_save,
            next_validation=next_validation,
        )
        if kind == "train" and self.horizon.moves and not wish.stop:
            return dataclasses.replace(wish, max_steps=self._corrected_end(step, now))
        return wish

    @staticmethod
    def _following(trainer: StepTrainer, kind: Kind, batches_left: float) -> Kind | None:
        """What the run would do next; None where nothing that could be left out follows."""
        if batches_left > 0:
            return kind
        if kind == "train" and trainer.validation_is_due:
            return "val"
        goes_on = kind != "test" and trainer.state.fn == "fit" and trainer.global_step < trainer.max_steps
        return "train" if goes_on else None

    def stopped(self, trainer: StepTrainer) -> None:
        """All ranks have agreed to stop for the budget's sake."""
        if self.spending is not None:
            self.spending.note("stopped", step=trainer.global_step, max_steps=trainer.max_steps)

    def move_end(self, trainer: StepTrainer, max_steps: int) -> None:
        """All ranks have agreed on another last step."""
        step = trainer.global_step
        self.horizon.move(max(max_steps, step + 1))
        trainer.follow_horizon()
        if self.spending is not None:
            self.spending.note("horizon", step=step, max_steps=trainer.max_steps)
            self._pass_mark()

    def leave(self, done: bool) -> None:
        """Everything is saved, only the way out remains."""
        if self.spending is not None:
            step_seconds = self.guard.step_seconds()
            self.spending.note("left", done=done, step_seconds=step_seconds and round(step_seconds, 6))

    def metrics(self) -> dict[str, float]:
        """What all starts have used so far, by the metric's name; on rank 0."""
        if self.spending is None:
            return {}
        used = self.spending.used()
        fraction = self.spending.used_fraction(used)
        if self.plan.power_watts <= 0:
            del used["kwh"]
        share = {} if fraction is None else {"budget/used_fraction": fraction}
        return {f"budget/{name}": value for name, value in used.items()} | share

    def text(self) -> str:
        """`budget 43% 0.02 h left`, or nothing where there is no limit."""
        fraction, left = (
            (None, None) if self.spending is None else (self.spending.used_fraction(), self.spending.left())
        )
        if self.spending is None or fraction is None or left is None:
            return ""
        return f"budget {fraction:.0%} {max(0.0, left):.2g} {self.spending.tariff.unit(self.spending.limit)} left"

    def _after_step(self, trainer: StepTrainer, step: int, now: float) -> None:
        assert self.spending is not None
        self._steps += 1
        if self._steps == 1:
            self.spending.note("training", step=step)
        if not self._judged and self._steps >= JUDGED_AFTER and self._steps % 10 == 0:
            self._judge(trainer, step, now)
        fraction = self.spending.used_fraction()
        if fraction is not None and fraction >= WARN_AT and not self._warned:
            self._warned = True
            self.spending.note("warned")
            rest = ""
            if self._steps >= WARM_STEPS:  # before, nobody knows how fast it is
                last = step + self.guard.boundaries_left(now)
                rest = (
                    f"; it ends at about step {last:,} of {trainer.max_steps:,}"
                    if last < trainer.max_steps
                    else f"; the rest pays for all {trainer.max_steps:,} steps"
                )
            self.say(f"lm-train: warning: {fraction:.0%} of the budget is used ({self.spending.told()}){rest}")

    def _corrected_end(self, step: int, now: float) -> int:
        """The last step that the measured speed allows, where one of the marks has been passed; 0: as it is."""
        assert self.spending is not None
        fraction, seconds = self.spending.used_fraction() or 0.0, self.guard.speed()
        if self.horizon.repeats or self._steps < WARM_STEPS or seconds is None:
            return 0
        first, half_way = self._next_mark is None, 2 * step >= self.horizon.max_steps
        if fraction < (MARKS[0] if first else self._next_mark or 0.0) and not (first and half_way):
            return 0
        room = (self.guard.end - now - self.closing_seconds(seconds)) * (1 - KEPT_BACK) - 3 * seconds
        end = affordable_steps(step, room, seconds + self._beside_a_step())
        if abs(end - self.horizon.max_steps) > LEAST_CHANGE * self.horizon.max_steps:
            return end
        self._pass_mark()
        return 0

    def _pass_mark(self) -> None:
        assert self.spending is not None
        fraction = self.spending.used_fraction() or 0.0
        self._next_mark = next((mark for mark in MARKS if mark > fraction), math.inf)

    def _beside_a_step(self) -> float:
        """Seconds a step for the saves and validations on the way."""
        every, interval = self.recipe.checkpoint.every_n_steps, self.recipe.trainer.val_check_interval
        saving = 0.0 if every is None else self.guard.mean_blocked_seconds / every
        return saving + (0.0 if interval is None else (self._validation_seconds or 0.0) / interval)

    def closing_seconds(self, step_seconds: float) -> float:
        """What follows the last step: save, validation, test, a sample of text, the way out."""
        validation, test = self.closing_batches
        # a forward pass of a micro batch is a third of its part of a step
        batch = step_seconds / (3 * self.plan.accumulate_grad_batches)
        if self._validation_seconds is not None and validation:
            batch = self._validation_seconds / validation
        sample = self.recipe.trainer.sample_tokens * SAMPLED_TOKEN_S
        evaluations = (validation + test) * batch
        if evaluations > MOST_FOR_EVALUATIONS * self.guard.end:
            evaluations = 0.0  # the training goes on instead; they are cut off where the budget ends
        return self.guard.save_seconds + evaluations + sample + self.guard.shutdown

    def _judge(self, trainer: StepTrainer, step: int, now: float) -> None:
        """Says once where a step or its memory lies outside of what was predicted, and what that means for the end."""
        prediction, seconds = self.plan.prediction, self.guard.speed()
        if prediction is None or seconds is None or self.spending is None:
            self._judged = True
            return
        found = []
        expected = prediction.step.interval
        if seconds not in expected:
            found.append(f"a step takes {seconds:.3g} s, predicted were {expected.low:.3g} to {expected.high:.3g}")
        memory, held = prediction.memory, peak_bytes(self.plan)
        low, high = memory.low, memory.high
        if not low <= held <= high:
            found.append(f"{size_of(held)} of memory are held, predicted were {size_of(low)} to {size_of(high)}")
        if found:
            self._judged = True
            self.say(f"lm-train: {'; '.join(found)}; {self._corrected_cost(trainer, step, now, seconds)}")

    def _corrected_cost(self, trainer: StepTrainer, step: int, now: float, seconds: float) -> str:
        assert self.spending is not None
        if self.horizon.moves:
            return f"the last step follows: about {step + self.guard.boundaries_left(now):,}"
        rest = (trainer.max_steps - step) * (seconds + self._beside_a_step()) + self.closing_seconds(seconds)
        until = min(now + rest, self.guard.end)
        used, tariff = self.spending.tariff.amounts(until), self.spending.tariff
        amounts = [
            f"{value + self.spending.before[name]:.3g} {tariff.unit(name)}" for name, value in used.items() if value
        ]
        if now + rest > self.guard.end:
            return f"the budget ends at about step {step + self.guard.boundaries_left(now):,} of {trainer.max_steps:,}"
        return f"all {trainer.max_steps:,} steps take {', '.join(amounts)}"
