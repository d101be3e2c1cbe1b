"""From one step to the whole run: hours, devices' hours, money, energy; and how many steps a budget pays for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lm_train.clusters import Cluster
from lm_train.plan.duration import run_hours
from lm_train.plan.layout import Layout
from lm_train.plan.plan import Plan
from lm_train.plan.prediction import Interval, MemoryPrediction, Prediction, TimePrediction

END_SECONDS = 5.0
"""From the last save to the end of the last process (estimate)."""


@dataclass(frozen=True)
class Costs:
    """Seconds of everything but the steps themselves."""

    start: float
    validation: float
    """Of one validation."""
    checkpoint: Interval
    """Of one save, until it is published."""
    stall: Interval
    """Of the training, by a save on the way."""
    validate_every: int | None
    """Steps; None: at the end only."""
    save_every: int | None

    def hours(self, steps: int, step: TimePrediction) -> Interval:
        """Of a run of so many steps, with its last validation and save."""
        return run_hours(
            step.interval,
            steps,
            start_seconds=self.start,
            validation_seconds=self.validation,
            validations=_times(steps, self.validate_every),
            checkpoint=self.checkpoint,
            stall=self.stall,
            saves=_times(steps, self.save_every),
            end_seconds=END_SECONDS,
        )

    def steps_within(self, hours: float, step: TimePrediction) -> int:
        """Steps that fit into so many hours with everything around them; 0 if not even one does."""
        if math.isinf(hours):
            return 0
        each = step.seconds
        each += self.validation / self.validate_every if self.validate_every else 0.0
        each += self.stall.value / self.save_every if self.save_every else 0.0
        around = self.start + self.validation + self.checkpoint.value + END_SECONDS
        return max(0, math.floor((hours * 3600 - around) / each))


def _times(steps: int, every: int | None) -> int:
    return max(1, math.ceil(steps / every)) if every else 1


def hours_allowed(limits: dict[str, float], ranks: int, cluster: Cluster) -> float:
    """Hours that the limits allow so many ranks; infinite without any. Energy is counted at the devices' rated power."""
    rates = {
        "hours": 1.0,
        "gpu_hours": float(ranks),
        "money": ranks * (cluster.price_per_gpu_hour or 0.0),
        "kwh": ranks * cluster.device.power_watts / 1000,
    }
    return min((limits[name] / rates[name] for name in limits if rates[name] > 0), default=math.inf)


def prediction_of(
    steps: int,
    layout: Layout,
    memory: MemoryPrediction,
    step: TimePrediction,
    costs: Costs,
    cluster: Cluster,
    checkpoint_bytes: int,
    flops_per_sample: int | None,
    final_loss: Interval | None,
    allowed: float = math.inf,
) -> Prediction:
    """Everything that is foretold of a run of `steps` steps, which is stopped after the hours that its budget allows."""
    hours = costs.hours(steps, step)
    if hours.high > allowed:  # there the run is stopped
        hours = hours.model_copy(update={"high": max(hours.value, allowed)})
    gpu_hours = hours.times(layout.ranks)
    samples_per_second = layout.global_batch_size / step.seconds
    peak = (
        cluster.device.peak_flops.get("bf16") if cluster.device.accelerator == "gpu" and cluster.device.known else None
    )
    mfu = None
    if flops_per_sample is not None and peak is not None:
        mfu = samples_per_second * flops_per_sample / (peak * layout.ranks)
    price = cluster.price_per_gpu_hour
    return Prediction(
        memory=memory,
        step=step,
        samples_per_second=samples_per_second,
        mfu=mfu,
        start_seconds=costs.start,
        validation_seconds=costs.validation,
        checkpoint_bytes=checkpoint_bytes,
        checkpoint_seconds=costs.checkpoint,
        checkpoint_stall=costs.stall,
        hours=hours,
        gpu_hours=gpu_hours,
        money=None if price is None else gpu_hours.times(price),
        currency=cluster.currency,
        kwh=gpu_hours.times(cluster.device.power_watts / 1000),
        final_loss=final_loss,
    )


REST_ERROR = 0.5
"""Relative spread of what a run takes beside its steps, where these were measured (estimate)."""


def with_measured_step(plan: Plan, step: TimePrediction, fixed_steps: bool) -> Plan:
    """The plan with a step that was measured in place of the foretold one; the layout stays.

    Args:
        plan: with a prediction.
        step: as it was measured.
        fixed_steps: keep the number of steps; else as many as the same hours pay for.
    """
    told = plan.prediction
    assert told is not None
    seconds = told.hours.value * 3600
    rest = max(0.0, seconds - plan.max_steps * told.step.seconds)
    steps = plan.max_steps if fixed_steps else max(1, math.floor((seconds - rest) / step.seconds))
    value = (rest + steps * step.seconds) / 3600
    below, above = (math.hypot(steps * step.seconds * error, rest * REST_ERROR) / 3600 for error in step.relative_error)
    hours = Interval(low=max(0.0, value - below), value=value, high=value + above)
    gpu_hours = hours.times(plan.world_size)
    speed = told.step.seconds / step.seconds
    prediction = told.model_copy(
        update={
            "step": step,
            "samples_per_second": told.samples_per_second * speed,
            "mfu": None if told.mfu is None else told.mfu * speed,
            "hours": hours,
            "gpu_hours": gpu_hours,
            "money": None if plan.price_per_gpu_hour is None else gpu_hours.times(plan.price_per_gpu_hour),
            "kwh": gpu_hours.times(plan.power_watts / 1000),
        }
    )
    return plan.model_copy(update={"prediction": prediction, "max_steps": steps})
