"""What will be done: recipe and machine in, one frozen Plan out. Free of torch."""

from lm_train.plan.counts import flops_per_sample, parameter_count, parameter_shapes
from lm_train.plan.counts.dense import pooled_shape
from lm_train.plan.facts import DataFacts, known_facts, with_assumptions
from lm_train.plan.forecast import with_measured_step
from lm_train.plan.given import made_for, plan_for
from lm_train.plan.layout import Layout, Precision, Strategy
from lm_train.plan.memory import StateBytes, checkpoint_bytes, state_bytes
from lm_train.plan.places import Place, places
from lm_train.plan.plan import Plan, padded_vocab_size, size_of
from lm_train.plan.planner import Schedule, make_plan, schedule
from lm_train.plan.prediction import Interval, MemoryPrediction, Prediction, TimePrediction
from lm_train.plan.table import plan_table
from lm_train.plan.target import Target

__all__ = [
    "DataFacts",
    "Interval",
    "Layout",
    "MemoryPrediction",
    "Place",
    "Plan",
    "Precision",
    "Prediction",
    "Schedule",
    "StateBytes",
    "Strategy",
    "Target",
    "TimePrediction",
    "checkpoint_bytes",
    "flops_per_sample",
    "known_facts",
    "made_for",
    "make_plan",
    "padded_vocab_size",
    "parameter_count",
    "parameter_shapes",
    "places",
    "plan_for",
    "plan_table",
    "pooled_shape",
    "schedule",
    "size_of",
    "state_bytes",
    "with_assumptions",
    "with_measured_step",
]
