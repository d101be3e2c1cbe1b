"""What will be done: recipe and machine in, one frozen Plan out. Free of torch."""

from lm_train.plan.counts import flops_per_sample, parameter_count, parameter_shapes
from lm_train.plan.counts.dense import pooled_shape
from lm_train.plan.facts import ASSUMED, DataFacts, assumed_facts, known_facts
from lm_train.plan.given import made_for, plan_for
from lm_train.plan.layout import Layout, Precision, Strategy
from lm_train.plan.memory import StateBytes, checkpoint_bytes, state_bytes
from lm_train.plan.places import Place, places
from lm_train.plan.plan import Plan, padded_vocab_size, size_of
from lm_train.plan.planner import make_plan
from lm_train.plan.prediction import Interval, MemoryPrediction, Prediction, TimePrediction

__all__ = [
    "ASSUMED",
    "DataFacts",
    "Interval",
    "Layout",
    "MemoryPrediction",
    "Place",
    "Plan",
    "Precision",
    "Prediction",
    "StateBytes",
    "Strategy",
    "TimePrediction",
    "assumed_facts",
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
    "pooled_shape",
    "size_of",
    "state_bytes",
]
