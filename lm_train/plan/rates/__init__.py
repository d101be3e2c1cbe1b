"""Seconds of operations, collectives, updates and disk writes on one rank."""

from __future__ import annotations

from lm_train.clusters.types import Cluster
from lm_train.plan.layout import Layout
from lm_train.plan.rates.base import Collective, Loop, Rates
from lm_train.plan.rates.facts import FactRates


def from_facts(cluster: Cluster, layout: Layout) -> Rates:
    """By data sheets."""
    return FactRates(cluster, layout)


__all__ = ["Collective", "FactRates", "Loop", "Rates", "from_facts"]
