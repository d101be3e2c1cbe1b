"""One recipe and one layout in, its work out."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from lm_train.errors import LMTrainError
from lm_train.plan import DataFacts, Layout, padded_vocab_size
from lm_train.plan.traced import TracedWork
from lm_train.recipe import Recipe, task_of
from lm_train.trace.batches import UnknownBatch, evaluation_batch, training_batch
from lm_train.trace.corrections import as_with_values
from lm_train.trace.network import fake_network, plan_of, training_module
from lm_train.trace.passes import Passes, run_passes
from lm_train.trace.summary import summarise

_LIBRARIES = {"torch", "lightning", "trace"}
"""Parts of the paths of code that is not the user's."""


def trace(recipe: Recipe, facts: DataFacts, layout: Layout, sizes: tuple[int, int]) -> TracedWork:
    """Builds the network and runs it without values, for two sizes of a micro batch.

    The tensors are fakes of a CPU's, whatever the layout's accelerator; without torch.compile, and of a single process: what
    strategies gather and reduce comes on top.

    Args:
        recipe: names network, task and data.
        facts: of the data.
        layout: precision, strategy, checkpointing, chunks.
        sizes: samples; equal ones serve that size alone.

    Raises:
        UnknownBatch: if the data are the user's own and do not say what they are.
        Exception: whatever the network raises that cannot run without values.
    """
    task = task_of(recipe)
    plan = plan_of(layout, task)
    # real tensors are the constants that a network of someone else's keeps outside of its buffers
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    net = fake_network(recipe, plan, facts, layout, fakes)
    with fakes, as_with_values():
        module = training_module(net, recipe, plan, facts)
        module.setup("fit")

        def run(size: int) -> Passes:
            batch, evaluation = (make(recipe, task, facts, size) for make in (training_batch, evaluation_batch))
            return run_passes(net, module, layout, batch, evaluation)

        first = run(sizes[0])
        passes = first, first if sizes[0] == sizes[1] else run(sizes[1])
        return summarise(net, sizes, passes, set(_logit_widths(net, facts)))


def reason_of(error: Exception) -> str:
    """Why a network cannot be traced, in one line, with the place in its own code."""
    if isinstance(error, LMTrainError | UnknownBatch):
        return " ".join(str(error).split())
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not set(Path(f.filename).parts) & _LIBRARIES]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return f"a step of the network depends on values, which a trace has none of{place}: {error}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300] or 'no message'}{place}"


def _logit_widths(net: nn.Module, facts: DataFacts) -> Iterator[int]:
    asked = getattr(net, "vocab_size", None)
    for size in (asked, facts.vocab_size):
        if isinstance(size, int):
            yield from (size, padded_vocab_size(size))
    of_theirs = getattr(getattr(getattr(net, "model", None), "config", None), "vocab_size", None)
    if isinstance(of_theirs, int):
        yield of_theirs
