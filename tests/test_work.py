"""The symbolic tape against what torch's CPU allocator itself reports of real steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lm_train import models
from lm_train.plan import DataFacts, Layout
from lm_train.plan.layout import Precision, Recomputed
from lm_train.plan.work import Work, work_of
from lm_train.recipe import GPT, AnyModel, Llama, Task

LAYOUT = Layout(
    nodes=1,
    devices=1,
    strategy="single",
    precision="32-true",
    micro_batch_size=4,
    accumulate_grad_batches=1,
    activation_checkpointing="none",
    cross_entropy_chunks=1,
    num_workers=0,
    compile=False,
    threads_per_rank=1,
    accelerator="cpu",
)
VOCABULARY = 1000


@dataclass(frozen=True)
class Peaks:
    """Bytes that torch's allocator had given out at most since the step began."""

    forward: int
    backward: int


def measured(net: nn.Module, loss: Callable[[nn.Module], Tensor], layout: Layout) -> Peaks:
    """Of one micro batch; where gradients accumulate, of the second."""

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False, enabled=layout.precision == "bf16-mixed"):
            value = loss(net)
        with torch.profiler.record_function("BACKWARD"):
            value.backward()

    if layout.accumulate_grad_batches > 1:
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == "BACKWARD")
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    alive = 0
    forward = backward = 0
    for when, size in changes:
        alive += size
        if when < start:
            forward = max(forward, alive)
        else:
            backward = max(backward, alive)
    return Peaks(forward, backward)


def predicted(work: Work, layout: Layout) -> Peaks:
    accumulates = layout.accumulate_grad_batches > 1
    backward = max(s.backward_peak if accumulates else s.backward_peak_with_gradients for s in work.stages)
    return Peaks(max(s.forward_peak for s in work.stages), backward)


def real_network(model: AnyModel, task: Task, facts: DataFacts, layout: Layout) -> nn.Module:
    plan: Any = SimpleNamespace(
        activation_checkpointing=layout.activation_checkpointing,
        cross_entropy_chunks=layout.cross_entropy_chunks,
        task=task,
        world_size=1,
    )
    torch.manual_seed(0)
    net = models.build(model, plan, facts).train()
    return net.to(torch.bfloat16) if layout.precision == "bf16-true" else net


def ids(*shape: int) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def compare(model: AnyModel, task: Task, layout: Layout, loss: Callable[[nn.Module], Tensor], facts: DataFacts) -> None:
    work = work_of(model, task, facts, layout)
    assert work is not None
    said, was = predicted(work, layout), measured(real_network(model, task, facts, layout), loss, layout)
    for name in ("forward", "backward"):
        a, b = getattr(said, name), getattr(was, name)
        assert abs(a / b - 1) < 0.01, f"{name}: {a:,} predicted, {b:,} measured, {a / b - 1:+.2%}"


def decoder_loss(model: AnyModel, layout: Layout) -> Callable[[nn.Module], Tensor]:
    shape = layout.micro_batch_size, model.block_size  # type: ignore[union-attr]
    tokens, targets = ids(*shape), ids(*shape)
    return lambda net: net(tokens, targets) / 2.0


DECODERS: dict[str, AnyModel] = {
    "gpt": GPT(n_layer=5, n_head=4, n_embd=64, block_size=64),
    "llama": Llama(n_layer=5, n_head=4, n_kv_head=2, n_embd=64, block_size=64),
}
FEW: list[tuple[str, Precision, Recomputed, int, int]] = [
    ("gpt", "32-true", "none", 1, 1),
    ("gpt", "32-true", "full", 4, 1),
    ("gpt", "32-true", 2, 1, 2),
    ("gpt", "bf16-mixed", "none", 1, 1),
    ("gpt", "bf16-mixed", "full", 1, 2),
    ("gpt", "bf16-true", 3, 1, 1),
    ("llama", "32-true", 2, 4, 1),
    ("llama", "bf16-mixed", "none", 1, 1),
    ("llama", "bf16-true", "full", 1, 1),
]


def every_way() -> Iterator[tuple[str, Precision, Recomputed, int, int]]:
    precisions: tuple[Precision, ...] = ("32-true", "bf16-mixed", "bf16-true")
    ways: tuple[Recomputed, ...] = ("none", "full", 2)
    for kind in DECODERS:
        for precision in precisions:
            for checkpointing in ways:
                for chunks in (1, 4):
                    for accumulate in (1, 2):
                        yield kind, precision, checkpointing, chunks, accumulate


def check_decoder(
    kind: str, precision: Precision, checkpointing: Recomputed, chunks: int, accumulate: int, **sizes: Any
) -> None:
    layout = replace(
        LAYOUT,
        precision=precision,
        activation_checkpointing=checkpointing,
        cross_entropy_chunks=chunks,
        accumulate_grad_batches=accumulate,
    )
    model = DECODERS[kind].model_copy(update=sizes)
    compare(model, "causal_lm", layout, decoder_loss(model, layout), DataFacts(vocab_size=VOCABULARY))


@pytest.mark.parametrize(("kind", "precision", "checkpointing", "chunks", "accumulate"), FEW)
def test_peak_of_a_decoder(
    kind: str, precision: Precision, checkpointing: Recomputed, chunks: int, accumulate: int
) -> None:
    check_decoder(kind, precision, checkpointing, chunks, accumulate)


def test_work_is_found_in_time_and_does_not_grow_with_depth() -> None:
    seconds = {}
    for depth in (12, 96):
        model = GPT(n_layer=depth)
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            work = work_of(model, "causal_lm", DataFacts(vocab_size=50257), LAYOUT)
            taken.append(time.perf_counter() - start)
        assert work is not None
        assert len(work.stages) == depth + 2
        seconds[depth] = min(taken)
    assert seconds[12] < 0.01  # 0.6 ms on an idle machine
    assert seconds[96] < 4 * seconds[12]  # eight times as deep


@pytest.mark.parametrize("checkpointing", ["none", "full", 3])
def test_blocks_that_are_not_gone_through_are_as_those_that_are(checkpointing: Recomputed, monkeypatch: Any) -> None:
    layout = replace(LAYOUT, precision="bf16-mixed", activation_checkpointing=checkpointing)
    work = work_of(GPT(n_layer=9, dropout=0.1), "causal_lm", DataFacts(vocab_size=999), layout)
    kinds = iter(range(1000))
    monkeypatch.setattr(
        "lm_train.plan.work.blocks.kind_of", lambda again: ("recomputed" if again else "") + str(next(kinds))
    )
    slow = work_of(GPT(n_layer=9, dropout=0.1), "causal_lm", DataFacts(vocab_size=999), layout)
    assert work is not None
    assert slow is not None
    assert work.stages == slow.stages
    assert work.flops == slow.flops
    assert {op: op.times for op in work.ops} == {op: op.times for op in slow.ops}
