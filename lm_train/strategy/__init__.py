"""From the Plan to Lightning's strategy and precision, and how a rank learns who it is."""

from __future__ import annotations

from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import nn

from lm_train.plan import Plan
from lm_train.strategy.buffers import take_buffers_of_first_rank
from lm_train.strategy.fsdp import FullySharded
from lm_train.strategy.gradients import Norm, clip_gradients
from lm_train.strategy.launched import LaunchedRank
from lm_train.strategy.replicated import Replicated
from lm_train.strategy.units import units_of
from lm_train.strategy.weights import Weights, built_anew, drawn, read_by
from lm_train.strategy.withholding import SpikeRule, Withholding, mean_over_ranks
from lm_train.strategy.zero import Zero


def build_strategy(plan: Plan, weights: Weights) -> Strategy:
    """The Lightning strategy that the plan names.

    Args:
        plan: names strategy, precision and accelerator.
        weights: where a strategy that cuts the network up as it is built gets the values of the shards from.
    """
    match plan.strategy:
        case "single":
            return SingleDeviceStrategy("cuda:0" if plan.accelerator == "gpu" else "cpu")
        case "ddp":
            return Replicated(plan)
        case "fsdp":
            return FullySharded(plan, weights)
        case "zero1" | "zero2" | "zero3" | "zero3_offload":
            return Zero(plan, weights)


def trainer_precision(plan: Plan) -> str | None:
    """What Lightning is told; None where the strategy brings its own, and fp32 where FSDP2 itself casts."""
    match plan.strategy:
        case "zero1" | "zero2" | "zero3" | "zero3_offload":
            return None
        case "fsdp" if plan.precision == "bf16-mixed":
            return "32-true"
    return plan.precision


def is_sharded(strategy: Strategy) -> bool:
    """Whether no rank alone holds all parameters, so that a forward pass is a matter of all of them."""
    return isinstance(strategy, FullySharded) or (isinstance(strategy, Zero) and strategy.zero_stage_3)


def shards_at_build(plan: Plan) -> bool:
    """Whether the strategy cuts the network up as it is built, so that no rank need hold it whole."""
    return plan.strategy in ("fsdp", "zero3", "zero3_offload")


def casts_initial_weights(plan: Plan) -> bool:
    """Whether the strategy rounds the initial weights to 16 bits although its optimizer keeps them in fp32."""
    return plan.strategy.startswith("zero") and plan.precision != "32-true"


def compile_network(net: nn.Module, plan: Plan) -> None:
    """torch.compile, in place; part by part where hooks between the parts gather parameters."""
    if plan.strategy != "fsdp":
        net.compile()
        return
    for unit in units_of(net):
        unit.compile()


__all__ = [
    "FullySharded",
    "LaunchedRank",
    "Norm",
    "Replicated",
    "SpikeRule",
    "Weights",
    "Withholding",
    "Zero",
    "build_strategy",
    "built_anew",
    "casts_initial_weights",
    "clip_gradients",
    "compile_network",
    "drawn",
    "is_sharded",
    "mean_over_ranks",
    "read_by",
    "shards_at_build",
    "take_buffers_of_first_rank",
    "trainer_precision",
]
