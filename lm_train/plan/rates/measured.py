"""Rates by a calibration: what was measured on this machine, and between the measured sizes what lies between."""

from __future__ import annotations

from lm_train.clusters.types import Cluster
from lm_train.plan.layout import Layout
from lm_train.plan.rates.base import Collective, Loop, Rates, StrategyCost
from lm_train.plan.rates.calibration import Calibration
from lm_train.plan.rates.facts import FactRates
from lm_train.plan.rates.tables import Curve
from lm_train.plan.work import Op
from lm_train.recipe import AnyOptim

OVERHEAD = 2.0
"""What an operation costs beyond its own time in a network with views, modules and hooks, over the same in a plain chain. A
guess, which large networks hardly feel."""
RELATIVE_ERROR = (0.20, 0.50)
QUICK_ERROR = (0.35, 0.80)
"""Of a step, below and above, by a full and by a quick calibration. The first holds for nine of ten rows in
benchmarks/results/step_time_cpu.md; the second is an estimate."""


class MeasuredRates(Rates):
    """Where the calibration is silent (collectives over more nodes than it had), the cluster's figures speak."""

    def __init__(self, calibration: Calibration, cluster: Cluster, layout: Layout) -> None:
        self.layout, self.facts = layout, FactRates(cluster, layout)
        self.setting = calibration.setting(layout.devices, layout.threads_per_rank)
        self.calibration = calibration
        self.source = calibration.title
        self.asynchronous = self.facts.asynchronous
        self.overlap, self.interference = self.facts.overlap, self.facts.interference
        training = calibration.training
        self.making = {**self.facts.making, **calibration.sample_seconds}
        self.loop = Loop(step=training.step, micro_batch=training.micro_batch, row=training.row)
        below, above = QUICK_ERROR if calibration.quick else RELATIVE_ERROR
        same = (self.setting.ranks, self.setting.threads) == (layout.devices, layout.threads_per_rank)
        further = 0.0 if same and self.setting.nodes >= layout.nodes else 0.15
        noise = max(0.0, self.setting.noise - 0.03, calibration.noise - 0.03)
        self.relative_error = (min(0.9, below + further + noise), above + further + noise)
        # threads or neighbours that nobody has measured: by the data sheet's proportions
        self._scale = 1.0 if same else _relative(cluster, layout, self.setting.ranks, self.setting.threads)

    def device(self, op: Op) -> float:
        seconds = self.setting.tables.seconds(op)
        if seconds is None:
            return self.facts.device(op)
        if self.asynchronous:
            return self._scale * seconds
        overhead = self.setting.backward_overhead if op.backward else self.setting.forward_overhead
        return self._scale * seconds + overhead * OVERHEAD

    def launch(self, op: Op) -> float:
        if not self.asynchronous:
            return 0.0
        return self.setting.backward_overhead if op.backward else self.setting.forward_overhead

    def stream(self, size: float) -> float:
        seconds = self.setting.tables.stream(size)
        return self.facts.stream(size) if seconds is None else self._scale * seconds

    def update(self, optim: AnyOptim, sizes: tuple[tuple[int, int], ...], width: int, on_host: bool = False) -> float:
        curve = self.setting.curve_of_pass("adamw" if optim.kind == "muon" else optim.kind)
        if on_host and self.asynchronous:
            curve = None
        if curve is None:
            return self.facts.update(optim, sizes, width, on_host)
        return self._over(curve, sizes, width)

    def norm(self, sizes: tuple[tuple[int, int], ...], width: int, clips: bool) -> float:
        curve = self.setting.curve_of_pass("clip" if clips else "norm")
        return self.facts.norm(sizes, width, clips) if curve is None else self._over(curve, sizes, width)

    def collective(self, kind: Collective, size: float) -> float:
        curve = self.setting.curve_of_collective(kind)
        measured = self.setting.ranks * self.setting.nodes
        if curve is None or (self.layout.nodes > 1 and self.setting.nodes != self.layout.nodes):
            return self.facts.collective(kind, size)
        ranks = self.layout.ranks
        if ranks == 1:
            return 0.0
        # a ring passes (n - 1) / n of the size; processes of one CPU share its memory, and take n / n' times as long besides
        factor = ((ranks - 1) / ranks) / ((measured - 1) / measured)
        return curve(size) * factor * (1.0 if self.asynchronous else ranks / measured)

    def offload(self, size: float) -> float:
        bandwidth = self.calibration.offload_bandwidth
        return self.facts.offload(size) if bandwidth is None else size / bandwidth

    def strategy(self, name: str) -> StrategyCost:
        measured = self.calibration.training.strategies.get(name.removesuffix("_offload"))
        return self.facts.strategy(name) if measured is None else StrategyCost(*measured)

    def written(self, size: float) -> float:
        disk = self.calibration.disk
        return disk.save_seconds + size / disk.bandwidth

    def _over(self, curve: Curve, sizes: tuple[tuple[int, int], ...], width: int) -> float:
        """Passes were measured over fp32 values: narrower ones count for as many fewer."""
        return self._scale * sum(number * curve(elements * width / 4) for elements, number in sizes)


def _relative(cluster: Cluster, layout: Layout, ranks: int, threads: int) -> float:
    """Time of an operation under the layout over that under the measured setting: both computing and memory are shared."""
    if cluster.device.accelerator == "gpu":
        return 1.0
    cores = cluster.cpu_cores_per_node
    used = min(layout.threads_per_rank, cores / layout.devices)
    measured = min(threads, cores / ranks)
    return max(1.0, measured / used) if layout.devices >= ranks else measured / used
