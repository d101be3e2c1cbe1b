"""The Plan: every decision about a run, made once, written as plan.json and read by every rank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from lm_train.plan.layout import Precision, Strategy
from lm_train.plan.prediction import Prediction
from lm_train.recipe import Task

VOCAB_MULTIPLE = 64
"""Rows of the embedding are padded to this: matrix products run faster on even sizes (A. Karpathy, build-nanogpt)."""


LAYOUT_FIELDS = (
    "accelerator",
    "nodes",
    "devices",
    "strategy",
    "precision",
    "global_batch_size",
    "micro_batch_size",
    "accumulate_grad_batches",
    "activation_checkpointing",
    "cross_entropy_chunks",
    "num_workers",
)
"""What of a plan says how the run is laid out."""


def padded_vocab_size(vocab_size: int) -> int:
    return math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Plan(BaseModel):
    """What will be done. A recipe is never patched: whatever it left `auto` is decided here, with the reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Task
    """What is learnt."""
    accelerator: Literal["cpu", "gpu"]
    device_name: str
    nodes: int
    devices: int
    """Ranks on each node: GPUs, or CPU processes."""
    strategy: Strategy
    precision: Precision
    global_batch_size: int
    micro_batch_size: int
    accumulate_grad_batches: int
    num_workers: int
    max_steps: int
    activation_checkpointing: Literal["none", "full"] | int
    cross_entropy_chunks: int
    compile: bool
    threads_per_rank: int
    """CPU threads of each rank's tensor operations."""
    vocab_size: int | None
    """Token ids; None where only the corpus can tell, or there are none."""
    n_parameters: int | None
    flops_per_sample: int | None
    """Forward and backward."""
    parameter_bytes: int | None
    """Bytes that the rank with most of them holds all through the training; see `lm_train.plan.memory`."""
    gradient_bytes: int | None
    optimizer_bytes: int | None
    block_size: int | None
    """Tokens in one sample of running text; None for other data."""
    peak_flops_per_device: float | None
    """Dense bf16 FLOP/s of one device; None where unknown, and then no MFU is reported."""
    cluster: str
    """Name of the description whose facts were used."""
    price_per_gpu_hour: float | None
    currency: str
    power_watts: float
    """Of one device."""
    limits: dict[str, float]
    """What the run may use in all its starts together, by name as in the recipe's budget; empty: no limit."""
    steps_known: bool = True
    """False: only the data tell how many steps the epochs are; hours and cost are then of `max_steps`, a stand-in."""
    prediction: Prediction | None
    """None where nothing is known of the network before it is built."""
    made_for: dict[str, Any] = {}
    """Values of the recipe that it was made for, where another start is to follow it; empty: not said."""
    reasons: dict[str, str]
    """Why each `auto` became what it is, by the recipe's key."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.devices

    @property
    def tokens_per_step(self) -> int | None:
        """None where samples are not pieces of running text."""
        return None if self.block_size is None else self.global_batch_size * self.block_size

    @property
    def paid_share(self) -> float:
        """About which share of its steps the budget pays for, by the prediction; above 1 it is ample."""
        if self.prediction is None or not self.limits or not self.steps_known:
            return math.inf
        told = self.prediction
        needs = {
            "hours": told.hours,
            "gpu_hours": told.gpu_hours,
            "money": told.money,
            "kwh": told.kwh,
        }
        shares = [limit / need.value for name, limit in self.limits.items() if (need := needs[name]) and need.value > 0]
        return min(shares, default=math.inf)

    def changes_from(self, earlier: Plan) -> list[str]:
        """What is done otherwise than by an earlier plan of the same run, a line each."""
        pairs = ((name, getattr(earlier, name), getattr(self, name)) for name in LAYOUT_FIELDS)
        return [f"{name}: {before} -> {now}" for name, before, now in pairs if before != now]

    @classmethod
    def read(cls, file: Path) -> Plan:
        return cls.model_validate_json(file.read_text(encoding="utf-8"))

    def steps_in_words(self) -> str:
        """`600 of 2,048 tokens`, or of samples."""
        tokens = self.tokens_per_step
        each = f"{self.global_batch_size:,} samples" if tokens is None else f"{tokens:,} tokens"
        return f"{self.max_steps:,} of {each}"


def size_of(number: int) -> str:
    """Bytes for a person, in powers of ten: 6.22 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} bytes"
