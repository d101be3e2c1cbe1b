"""A plan for a person: one line a decision with its reason, then what it foretells."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from lm_train.plan.plan import Plan, size_of
from lm_train.plan.prediction import Interval, Prediction

UNKNOWN = "known with the data"
REASON_WIDTH = 76
"""Characters of a line of reasons."""
REASONS_FROM = 62
"""Column beyond which a long value does not push the reasons of the other lines."""


class Row(NamedTuple):
    name: str
    value: str
    reason: str = ""


def plan_table(plan: Plan) -> str:
    """The plan as text, without a heading."""
    rows = [*_decisions(plan), *_sizes(plan)]
    if plan.prediction is not None:
        rows += _foretold(plan, plan.prediction)
    width = max(len(row.value) for row in rows if len(row.value) <= REASONS_FROM)
    lines = []
    for name, value, reason in rows:
        first, *further = textwrap.wrap(reason, REASON_WIDTH) or [""]
        lines.append(f"  {name:<13} {value:<{width}}  {first}".rstrip())
        lines += [f"  {'':<13} {'':<{width}}  {line}" for line in further]
    return "\n".join(lines)


def _decisions(plan: Plan) -> Iterator[Row]:
    def row(name: str, value: str, key: str) -> Row:
        return Row(name, value, plan.reasons.get(key, "as asked" if key.startswith("trainer.") else ""))

    yield row("devices", f"{plan.nodes} x {plan.devices} {plan.accelerator} ({plan.device_name})", "trainer.devices")
    yield row("strategy", plan.strategy, "trainer.strategy")
    yield row("precision", plan.precision, "trainer.precision")
    batch = (
        f"{plan.global_batch_size} = {plan.micro_batch_size} micro x {plan.accumulate_grad_batches} accumulated x "
        f"{plan.world_size} ranks"
    )
    yield row("global batch", batch, "data.micro_batch_size")
    if "data.global_batch_size" in plan.reasons:
        yield Row("", "", plan.reasons["data.global_batch_size"])
    if plan.activation_checkpointing != "none":
        every = plan.activation_checkpointing
        blocks = "every block" if every == "full" else f"every {every}th block"
        yield row("recomputed", blocks, "trainer.activation_checkpointing")
    if plan.cross_entropy_chunks != 1:
        yield row("loss", f"in {plan.cross_entropy_chunks} pieces", "trainer.cross_entropy_chunks")
    yield Row("task", plan.task.replace("_", " "))
    yield Row("steps", plan.steps_in_words(), plan.reasons.get("trainer.max_steps", ""))


def _sizes(plan: Plan) -> Iterator[Row]:
    if plan.block_size is not None or plan.vocab_size is not None:
        yield Row("vocabulary", "as the corpus has" if plan.vocab_size is None else f"{plan.vocab_size:,}")
    yield Row("parameters", UNKNOWN if plan.n_parameters is None else f"{plan.n_parameters:,}")
    if plan.prediction is None:
        yield Row("state a rank", _state(plan))


def _state(plan: Plan) -> str:
    if plan.parameter_bytes is None or plan.gradient_bytes is None or plan.optimizer_bytes is None:
        return UNKNOWN
    parts = {"parameters": plan.parameter_bytes, "gradients": plan.gradient_bytes, "optimizer": plan.optimizer_bytes}
    where = " in host memory" if plan.strategy == "zero3_offload" else ""
    return " + ".join(f"{size_of(size)} {name}" for name, size in parts.items()) + where


def _foretold(plan: Plan, prediction: Prediction) -> Iterator[Row]:
    memory, step = prediction.memory, prediction.step
    of = f" of {size_of(memory.capacity)}" if memory.capacity else ""
    yield Row(
        "memory",
        f"{size_of(memory.total)}{of}, up to {size_of(memory.high)}",
        f"in {memory.moment}: {_parts(_memory(prediction))}",
    )
    seconds = f"{_seconds(step.seconds)} ({_seconds(step.interval.low)} to {_seconds(step.interval.high)})"
    yield Row("step", seconds, f"{_parts(_step(prediction))}; rates: {step.source}")
    yield Row("speed", _speed(plan, prediction))
    if plan.steps_known:
        yield Row("run", f"{_interval(prediction.hours)} h", _costs(plan, prediction))
    else:
        yield Row("run", UNKNOWN)
    save = prediction.checkpoint_seconds
    stall = prediction.checkpoint_stall
    yield Row(
        "checkpoint",
        f"{size_of(prediction.checkpoint_bytes)}, {_seconds(save.value)} ({_seconds(save.low)} to {_seconds(save.high)})",
        ""
        if stall is None or stall == save
        else f"written beside the training, which loses {_seconds(stall.value)} for it",
    )
    if prediction.final_loss is not None and plan.steps_known:
        loss = prediction.final_loss
        yield Row(
            "final loss",
            f"{loss.value:.2f} ({loss.low:.2f} to {loss.high:.2f})",
            "a prior: other people's models on other data (Besiroglu et al. 2024)",
        )


def _memory(prediction: Prediction) -> dict[str, str]:
    memory = prediction.memory
    names = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers", "copy_to_save", "reserve")
    return {name.replace("_", " "): size_of(getattr(memory, name)) for name in names if getattr(memory, name)}


def _step(prediction: Prediction) -> dict[str, str]:
    names = ("compute", "communication", "optimizer", "data", "host")
    shares = {name: getattr(prediction.step, name) / prediction.step.seconds for name in names}
    return {name: f"{share:.0%}" for name, share in shares.items() if share >= 0.005}


def _parts(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _speed(plan: Plan, prediction: Prediction) -> str:
    rate, unit = prediction.samples_per_second, "samples"
    if plan.block_size is not None:
        rate, unit = rate * plan.block_size, "tokens"
    mfu = "" if prediction.mfu is None else f", MFU {prediction.mfu:.0%}"
    return f"{rate:,.0f} {unit}/s{mfu}"


def _costs(plan: Plan, prediction: Prediction) -> str:
    parts = [f"{_interval(prediction.gpu_hours)} gpu-hours"]
    if prediction.money is not None:
        parts.append(f"{_interval(prediction.money)} {prediction.currency} at {plan.price_per_gpu_hour:g} each")
    if prediction.kwh.value:
        parts.append(f"{_interval(prediction.kwh)} kWh")
    units = {"gpu_hours": "gpu-hours", "money": prediction.currency, "hours": "h", "kwh": "kWh"}
    budget = " and ".join(f"{value:g} {units[name]}" for name, value in plan.limits.items())
    return "; ".join(parts) + (f"; budget {budget}" if budget else "")


def _interval(interval: Interval) -> str:
    return f"{interval.value:.3g} ({interval.low:.3g} to {interval.high:.3g})"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
