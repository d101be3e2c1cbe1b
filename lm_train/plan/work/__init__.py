"""One micro batch as a list of operations and stages, for every kind of model with a formula."""

from lm_train.plan.work.ops import WIDTH, Kind, Number, Op, Stage, Work

__all__ = ["WIDTH", "Kind", "Number", "Op", "Stage", "Work"]
