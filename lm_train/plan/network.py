"""What is known of a recipe's network before it is built, and the forecasts that follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lm_train.errors import DataError, UsageError
from lm_train.plan.counts import Shapes, flops_per_sample, parameter_count, parameter_shapes
from lm_train.plan.duration import checkpoint_seconds, checkpoint_stall, time_of, validation_seconds
from lm_train.plan.facts import DataFacts, known_facts, with_assumptions
from lm_train.plan.footprint import Copies, memory_of
from lm_train.plan.layout import Layout, Strategy
from lm_train.plan.memory import checkpoint_bytes
from lm_train.plan.prediction import Interval, MemoryPrediction, TimePrediction
from lm_train.plan.rates import Rates, rates_of
from lm_train.plan.target import Target
from lm_train.plan.traced import SIZES, Untraceable, trace_of, traces_of
from lm_train.plan.work import Work, work_of
from lm_train.recipe import Recipe, Task, task_of

_SAME_WORK: dict[Strategy, Strategy] = {"zero3": "zero2", "zero3_offload": "zero2"}
"""Strategies under which a rank does the same operations on its micro batch."""


@dataclass(frozen=True)
class Network:
    """Counts of a recipe's network; with assumptions in place of what only the data can tell."""

    task: Task
    facts: DataFacts
    """Only what is really known."""
    shapes: Shapes | None
    """Name and shape of each parameter; None where only building it tells."""
    known: bool
    """Whether no assumption was needed."""
    flops_per_sample: int | None
    notes: tuple[str, ...] = ()
    is_traced: bool = False
    """Counted by running it without values, since no formula knows it."""

    @property
    def n_parameters(self) -> int | None:
        """None where assumptions were needed."""
        return parameter_count(self.shapes) if self.shapes is not None and self.known else None


class Forecaster:
    """Answers what a layout takes, for one network and one target; the work of a micro batch is counted once a kind.

    Args:
        recipe: its network is meant, its optimizer, how often it validates.
        network: counts.
        target: whose devices and rates.
        shapes: of its parameters.
    """

    def __init__(self, recipe: Recipe, network: Network, target: Target, shapes: Shapes) -> None:
        self.recipe, self.network, self.target, self.shapes = recipe, network, target, shapes
        self._facts, _ = with_assumptions(recipe, network.facts)
        self._works: dict[Layout, Work] = {}
        self._rates: dict[tuple[int, int, int, str, bool], Rates] = {}

    @classmethod
    def of(cls, recipe: Recipe, network: Network, target: Target) -> Forecaster | None:
        """None where nothing is known of the network before it is built."""
        if network.shapes is None:
            return None
        forecast = cls(recipe, network, target, network.shapes)
        if network.is_traced:
            return forecast
        tried = Layout(1, 1, "single", "32-true", 1, 1, "none", 1, 0, False, 1, "cpu")
        return None if work_of(recipe.model, network.task, forecast._facts, tried) is None else forecast

    def work(self, layout: Layout) -> Work:
        """Of one micro batch on one rank.

        Raises:
            UsageError: if a network without formulas cannot be traced under this layout.
        """
        adds = layout.accumulate_grad_batches > 1 and layout.strategy in ("single", "zero1")
        strategy = _SAME_WORK.get(layout.strategy, layout.strategy)
        key = replace(
            layout,
            nodes=1,
            devices=min(2, layout.ranks) if self.recipe.model.kind == "resnet" else 1,  # batch norms over several ranks
            accumulate_grad_batches=2 if adds else 1,
            num_workers=0,
            threads_per_rank=1,
            strategy="zero2" if strategy == "zero1" and not adds else strategy,
        )
        if key not in self._works:
            self._works[key] = self._counted(key)
        return self._works[key]

    def _counted(self, layout: Layout) -> Work:
        if not self.network.is_traced:
            work = work_of(self.recipe.model, self.network.task, self._facts, layout)
            assert work is not None, "a model with formulas for its parameters has them for its work"
            return work
        # one sample lies otherwise in memory than several; it is not worth a trace of its own
        traced = trace_of(self.recipe, self._facts, replace(layout, micro_batch_size=SIZES[0]))
        if isinstance(traced, Untraceable):
            raise UsageError(f"model: {traced.reason}; fix trainer.strategy and trainer.activation_checkpointing")
        return traced.work(layout)

    def rates(self, layout: Layout) -> Rates:
        key = layout.nodes, layout.devices, layout.threads_per_rank, layout.precision, layout.compile
        if key not in self._rates:
            self._rates[key] = rates_of(self.target.cluster, layout, self.recipe.cluster.calibration)
        return self._rates[key]

    def memory(self, layout: Layout) -> MemoryPrediction:
        section, last = self.recipe.checkpoint, self.recipe.trainer.max_steps
        often = (section.every_n_steps, section.keep_every_n_steps, self.recipe.trainer.val_check_interval)
        on_the_way = any(every is not None and (last == "auto" or every < last) for every in often)
        copying: Copies = "never" if section.asynchronous is False else "all along" if on_the_way else "last"

        def with_copies(copies: Copies) -> MemoryPrediction:
            return memory_of(
                self.shapes,
                self.work(layout),
                layout,
                self.recipe.optim,
                self.target.cluster_for(layout.devices),
                copies=copies,
                validates=self.recipe.trainer.limit_val_batches != 0,
            )

        found = with_copies(copying)
        return found if found.fits or section.asynchronous != "auto" else with_copies("never")

    def step(self, layout: Layout) -> TimePrediction:
        return time_of(
            self.shapes,
            self.work(layout),
            layout,
            self.recipe.optim,
            self.rates(layout),
            log_every=self.recipe.trainer.log_every_n_steps,
            clips=self.recipe.trainer.gradient_clip_val is not None,
            sample_seconds=sample_seconds(self.recipe, self._facts, self.rates(layout)),
        )

    def checkpoint_bytes(self, layout: Layout) -> int:
        return checkpoint_bytes(self.shapes, layout.strategy, layout.precision, self.recipe.optim)

    def checkpoint_seconds(self, layout: Layout) -> Interval:
        return checkpoint_seconds(self.checkpoint_bytes(layout), layout, self.rates(layout))

    def checkpoint_stall(self, layout: Layout) -> Interval:
        """For which a save on the way holds up the training."""
        if self.recipe.checkpoint.asynchronous is False:
            return self.checkpoint_seconds(layout)
        return checkpoint_stall(self.checkpoint_bytes(layout), layout, self.rates(layout))

    def validation_seconds(self, layout: Layout) -> float:
        """Of one validation; one whose length only the data tell counts as none."""
        samples = validation_samples(self.recipe, layout)
        if not samples:
            return 0.0
        each = layout.micro_batch_size * layout.ranks
        return validation_seconds(self.work(layout), self.rates(layout), math.ceil(samples / each))


def sample_seconds(recipe: Recipe, facts: DataFacts, rates: Rates) -> float:
    """Core seconds until one sample is in a batch; 0 where nobody has measured it (texts of their own length, tables, own
    code)."""
    block_size: int | None = getattr(recipe.model, "block_size", None)
    if recipe.data.kind in ("embedded", "text", "shards") and block_size is not None:
        return block_size * rates.making["token"]
    if facts.input_shape is not None and len(facts.input_shape) == 3:
        return math.prod(facts.input_shape) * rates.making["value"]
    return 0.0


def validation_samples(recipe: Recipe, layout: Layout) -> int | None:
    """Samples of one validation over all ranks; None where only the data tell."""
    limit = recipe.trainer.limit_val_batches
    if limit is not None:
        return limit * layout.micro_batch_size * layout.ranks
    data = recipe.data
    if data.kind == "text" and data.streaming:
        return math.ceil(data.val_tokens / getattr(recipe.model, "block_size", 1))
    return None


def network_of(recipe: Recipe) -> Network:
    """What is known of the recipe's network without building it.

    Raises:
        UsageError: if the network cannot be built over such data.
    """
    task, facts = task_of(recipe), known_facts(recipe)
    complete, assumed = with_assumptions(recipe, facts)
    try:
        shapes = parameter_shapes(recipe.model, task, complete)
    except DataError as error:
        raise UsageError(str(error)) from None
    if shapes is None:
        return Network(task, facts, None, False, None)
    flops = flops_per_sample(recipe.model, task, complete, parameter_count(shapes))
    notes = (f"with {assumed}, until the data are read",) if assumed else ()
    return Network(task, facts, shapes, not assumed, flops, notes)


def traced(recipe: Recipe, network: Network, layout: Layout, others: Iterable[Layout]) -> Network:
    """The network counted by running it without values, in a process with torch; if that cannot be, with a note why.

    Args:
        recipe: names model and data.
        network: what is known of it so far.
        layout: of which the counts are.
        others: layouts that will be asked for; the same process traces them.
    """
    complete, assumed = with_assumptions(recipe, network.facts)
    wanted = [replace(one, micro_batch_size=SIZES[0]) for one in (layout, *others)]
    found = traces_of(recipe, complete, wanted)[0]
    if isinstance(found, Untraceable):
        return replace(network, notes=(*network.notes, f"nothing can be foretold: {found.reason}"))
    notes = (f"with {assumed}, until the data are read",) if assumed else ()
    shapes = [(name, shape) for name, shape in found.shapes]
    flops = flops_per_sample(recipe.model, network.task, complete, parameter_count(shapes))
    if flops is None:
        flops = round(found.work(replace(layout, micro_batch_size=SIZES[0])).flops / SIZES[0])
    return replace(network, shapes=shapes, known=not assumed, flops_per_sample=flops, notes=notes, is_traced=True)
