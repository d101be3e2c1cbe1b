"""Metrics of a classification: counted on the device, derived once at the end of an evaluation, shown to a person."""

from lm_train.metrics.counts import ClassCounts
from lm_train.metrics.scores import ClassScores

__all__ = ["ClassCounts", "ClassScores"]
