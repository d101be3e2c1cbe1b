"""The symbolic tape against what torch's CPU allocator itself reports of real steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lm_train import models
from lm_train.plan import (
    DataFacts,
    Layout,
    flops_per_sample,
    known_facts,
    parameter_count,
    parameter_shapes,
    with_assumptions,
)
from lm_train.plan.layout import Precision, Recomputed
from lm_train.plan.work import Work, work_of
from lm_train.recipe import BERT, GPT, AnyModel, Llama, Seq2Seq, Task, load, task_of
from lm_train.trace import trace
from tests.layouts import PLAIN

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
LAYOUT = PLAIN
VOCABULARY = 1000
FACTS = DataFacts(vocab_size=VOCABULARY, n_outputs=8, guessed_fraction=0.15)


@dataclass(frozen=True)
class Peaks:
    """Bytes that torch's allocator had given out at most since the step began."""

    forward: int
    backward: int


def allocated(step: Callable[[], None]) -> list[tuple[int, int]]:
    """Times at which the allocator gave bytes out or took them back (below 0)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    return sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")


def precision_of(layout: Layout) -> torch.autocast:
    """As Lightning opens it."""
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False, enabled=layout.precision == "bf16-mixed")


def measured(net: nn.Module, loss: Callable[[nn.Module], Tensor], layout: Layout, onednn: bool = False) -> Peaks:
    """Of one micro batch; where gradients accumulate, of the second. oneDNN packs 16-bit matrices into memory of its own."""
    turned = 0

    def step() -> None:
        nonlocal turned
        with precision_of(layout):
            value = loss(net)
        turned = time.time_ns()
        value.backward()

    with torch.backends.mkldnn.flags(enabled=onednn):
        if layout.accumulate_grad_batches > 1:
            step()
        changes = allocated(step)
    alive = list(accumulate(size for _, size in changes))
    forward = sum(when < turned for when, _ in changes)
    return Peaks(max(alive[:forward]), max(alive[forward:]))


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


MODELS: dict[str, tuple[AnyModel, Task]] = {
    "gpt": (GPT(n_layer=5, n_head=4, n_embd=64, block_size=64), "causal_lm"),
    "llama": (Llama(n_layer=5, n_head=4, n_kv_head=2, n_embd=64, block_size=64), "causal_lm"),
    "bert": (BERT(n_layer=5, n_head=4, n_embd=64, block_size=64), "masked_lm"),
    "bert classifier": (BERT(n_layer=5, n_head=4, n_embd=64, block_size=64), "classification"),
    "seq2seq": (Seq2Seq(n_layer=4, n_head=4, n_embd=64, block_size=64), "seq2seq"),
}
Way = tuple[str, Precision, Recomputed, int, int, float]
"""Model, precision, checkpointing, chunks of the loss, accumulated micro batches, dropout."""
FEW: list[Way] = [
    ("gpt", "32-true", "none", 1, 1, 0.0),
    ("gpt", "32-true", 2, 4, 2, 0.1),
    ("gpt", "bf16-mixed", "none", 1, 1, 0.0),
    ("gpt", "bf16-mixed", "full", 4, 2, 0.0),
    ("gpt", "bf16-true", 3, 1, 1, 0.0),
    ("llama", "32-true", "full", 4, 1, 0.0),
    ("llama", "bf16-mixed", "none", 1, 1, 0.1),
    ("llama", "bf16-true", 2, 1, 1, 0.0),
    ("bert", "bf16-mixed", "full", 1, 1, 0.1),
    ("bert", "32-true", "none", 1, 1, 0.1),
    ("bert classifier", "bf16-mixed", 2, 1, 1, 0.0),
    ("seq2seq", "32-true", "none", 1, 1, 0.1),
    ("seq2seq", "bf16-mixed", "full", 4, 1, 0.0),
]
EVERY: list[Way] = [
    (kind, precision, checkpointing, chunks, accumulate, dropout)
    for kind in MODELS
    for precision in ("32-true", "bf16-mixed", "bf16-true")
    for checkpointing in ("none", "full", 2)
    for chunks in (1, 4)
    for accumulate in (1, 2)
    for dropout in (0.0, 0.1)
]


def loss_of(kind: str, model: Any, samples: int) -> Callable[[nn.Module], Tensor]:
    """What a training step computes of a batch as the data make it, up to the division by a number."""
    length = model.block_size
    tokens, targets, lengths = ids(samples, length), ids(samples, length), torch.full((samples,), length)
    match kind:
        case "gpt" | "llama":
            return lambda net: net(tokens, targets) / 2.0
        case "bert":
            count = round(0.15 * length)
            positions = torch.arange(count).expand(samples, count).contiguous()
            return lambda net: net(tokens, positions=positions, targets=targets[:, :count].contiguous()) / 2.0
        case "bert classifier":
            labels = torch.zeros(samples, dtype=torch.int64)
            return lambda net: F.cross_entropy(net(tokens, lengths).float(), labels, reduction="none").sum() / 2.0
    return lambda net: net(tokens, lengths, tokens, targets) / 2.0


def layout_of(way: Way) -> Layout:
    return replace(
        LAYOUT,
        precision=way[1],
        activation_checkpointing=way[2],
        cross_entropy_chunks=way[3],
        accumulate_grad_batches=way[4],
    )


def close(said: float, was: float, what: str, tolerance: float = 0.005) -> None:
    assert abs(said / was - 1) < tolerance, f"{what}: {said:,} predicted, {was:,} measured, {said / was - 1:+.2%}"


def compare(
    way: Way, vocabulary: int = VOCABULARY, tolerance: float = 0.005, onednn: bool = False, **sizes: Any
) -> None:
    layout = layout_of(way)
    model, task = MODELS[way[0]]
    model = model.model_copy(update=sizes | {"dropout": way[5]})
    facts = replace(FACTS, vocab_size=vocabulary)
    work = work_of(model, task, facts, layout)
    assert work is not None
    net = real_network(model, task, facts, layout)
    said = predicted(work, layout)
    was = measured(net, loss_of(way[0], model, layout.micro_batch_size), layout, onednn)
    close(said.forward, was.forward, "forward", tolerance)
    close(said.backward, was.backward, "backward", tolerance)


@pytest.mark.parametrize("way", FEW, ids=str)
def test_peak(way: Way) -> None:
    compare(way)


@pytest.mark.slow
@pytest.mark.parametrize("way", EVERY, ids=str)
def test_peak_in_every_way(way: Way) -> None:
    compare(way)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_peak_of_real_size(kind: str, precision: Precision, checkpointing: Recomputed) -> None:
    way: Way = (kind, precision, checkpointing, 1, 1, 0.0 if kind == "gpt" else 0.1)
    compare(way, 50257, 0.01, onednn=True, n_layer=12, n_head=12, n_embd=768, block_size=256)


def evaluated(kind: str, net: nn.Module, model: Any, samples: int) -> Tensor:
    """What an evaluation does with a batch, as the modules do it."""
    if kind in ("gpt", "llama", "bert classifier"):
        return loss_of(kind, model, samples)(net)
    length = model.block_size
    tokens, lengths = ids(samples, length), torch.full((samples,), length)
    if kind == "bert":
        positions = tokens[:, : round(0.9 * length)].contiguous() % length
        logits, targets = net(tokens, lengths, positions=positions).float(), positions
    else:
        logits, targets = net(tokens, lengths, target_tokens=tokens).float(), tokens
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return torch.stack((loss, (logits.argmax(dim=-1) == targets).sum()))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_peak_of_an_evaluation(kind: str, precision: Precision) -> None:
    layout, (model, task) = replace(LAYOUT, precision=precision, activation_checkpointing="full"), MODELS[kind]
    model = model.model_copy(update={"dropout": 0.1})
    facts = replace(FACTS, guessed_fraction=0.9)
    work = work_of(model, task, facts, layout)
    assert work is not None
    net = real_network(model, task, facts, layout).eval()

    def step() -> None:
        with precision_of(layout), torch.inference_mode():
            evaluated(kind, net, model, layout.micro_batch_size)

    with torch.backends.mkldnn.flags(enabled=False):
        close(work.evaluation_peak, max(accumulate(size for _, size in allocated(step))), "evaluation")


@pytest.mark.parametrize("way", [(kind, "32-true", "none", 1, 1, 0.0) for kind in MODELS], ids=str)
def test_products_are_those_that_torch_counts(way: Way) -> None:
    layout, (model, task) = layout_of(way), MODELS[way[0]]
    work = work_of(model, task, FACTS, layout)
    assert work is not None
    net = real_network(model, task, FACTS, layout)
    with FlopCounterMode(display=False) as counter:
        loss_of(way[0], model, layout.micro_batch_size)(net).backward()
    # fused attention on a CPU is not counted by torch
    assert sum(op.flops * op.times for op in work.ops if op.kind == "matmul") == counter.get_total_flops()


@pytest.mark.parametrize("kind", MODELS)
def test_flops_agree_with_the_formula_of_the_model(kind: str) -> None:
    """6 a parameter and token, and 12 d for each pair of positions; fused attention computes the scores again in the backward
    pass, 14 instead of 12; parameters of norms, biases and positions, and an embedding apart from the head, are no products."""
    sizes = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 512, "dropout": 0.0}
    model, task = MODELS[kind]
    model = model.model_copy(update=sizes | ({"tie_embeddings": True} if kind == "llama" else {}))
    facts = replace(FACTS, vocab_size=32000)
    work, shapes = work_of(model, task, facts, LAYOUT), parameter_shapes(model, task, facts)
    assert work is not None
    assert shapes is not None
    products = sum(op.flops * op.times / (1 if op.kind == "matmul" else 14 / 12) for op in work.ops)
    formula = flops_per_sample(
        model, task, facts if task == "masked_lm" else replace(facts, guessed_fraction=None), parameter_count(shapes)
    )
    assert formula is not None
    assert abs(products / LAYOUT.micro_batch_size / formula - 1) < 0.02


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


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("checkpointing", ["none", "full", 3])
def test_blocks_that_are_not_gone_through_are_as_those_that_are(
    kind: str, checkpointing: Recomputed, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = replace(LAYOUT, precision="bf16-mixed", activation_checkpointing=checkpointing)
    model, task = MODELS[kind]
    model = model.model_copy(update={"n_layer": 9, "dropout": 0.1})
    work = work_of(model, task, FACTS, layout)
    kinds = iter(range(1000))
    monkeypatch.setattr("lm_train.plan.work.blocks.kind_of", lambda again: f"{again} {next(kinds)}")
    slow = work_of(model, task, FACTS, layout)
    assert work is not None
    assert slow is not None
    assert work.stages == slow.stages
    assert work.evaluation_peak == slow.evaluation_peak
    assert work.flops == slow.flops
    assert {replace(op, times=1): op.times for op in work.ops} == {replace(op, times=1): op.times for op in slow.ops}


@pytest.mark.parametrize(("accelerator", "grows"), [("cpu", 4.0), ("gpu", 2.0)])
def test_a_gpu_writes_no_scores_down(accelerator: Any, grows: float) -> None:
    """Dropout takes torch's fused kernel from a CPU, and from a CPU only: memory grows with the square of the length."""
    layout = replace(LAYOUT, accelerator=accelerator)
    peaks = []
    for length in (4096, 8192):
        work = work_of(GPT(n_layer=2, block_size=length, vocab_size=64, dropout=0.1), "causal_lm", FACTS, layout)
        assert work is not None
        peaks.append(predicted(work, layout).backward)
    assert peaks[1] / peaks[0] == pytest.approx(grows, rel=0.05)


@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_a_strategy_that_casts_the_weights_itself_computes_as_in_16_bits(strategy: Any) -> None:
    mixed = replace(LAYOUT, strategy=strategy, precision="bf16-mixed")
    works = [
        work_of(GPT(n_layer=2), "causal_lm", FACTS, each) for each in (mixed, replace(mixed, precision="bf16-true"))
    ]
    assert works[0] == works[1]
    assert works[0] != work_of(GPT(n_layer=2), "causal_lm", FACTS, replace(mixed, strategy="single"))


def test_memory_is_of_the_longest_pairs_and_time_of_the_usual_ones() -> None:
    model = Seq2Seq(n_layer=2, block_size=64)
    longest = work_of(model, "seq2seq", FACTS, LAYOUT)
    usual = work_of(model, "seq2seq", replace(FACTS, pair_lengths=(12.3, 20.0)), LAYOUT)
    assert longest is not None
    assert usual is not None
    assert usual.stages == longest.stages
    short = work_of(model.model_copy(update={"block_size": 20}), "seq2seq", FACTS, LAYOUT)
    assert short is not None
    assert usual.flops < short.flops < longest.flops


def test_nothing_is_told_before_the_data_are_known() -> None:
    assert work_of(GPT(), "causal_lm", DataFacts(), LAYOUT) is None
    assert work_of(BERT(), "classification", DataFacts(vocab_size=99), LAYOUT) is None


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "checkpointing"), [("32-true", "none"), ("bf16-mixed", "full")])
@pytest.mark.parametrize("name", ["gpt_small", "llama_1b"])
def test_a_recipe_of_real_size_is_as_its_trace(name: str, precision: Precision, checkpointing: Recomputed) -> None:
    """Of decoders: elsewhere a trace misses temporaries inside of operations, and adds up gradients out of place."""
    recipe = load([f"recipe={name}"])
    task, facts = task_of(recipe), with_assumptions(recipe, known_facts(recipe))[0]
    layout = replace(LAYOUT, precision=precision, activation_checkpointing=checkpointing)
    work = work_of(recipe.model, task, facts, layout)
    assert work is not None
    traced = trace(recipe, facts, layout, (2, 4)).work(layout)
    said, was = predicted(work, layout), predicted(traced, layout)
    close(said.forward, was.forward, "forward")
    close(said.backward, was.backward, "backward")
    close(work.evaluation_peak, traced.evaluation_peak, "evaluation")
    products = [sum(op.flops * op.times for op in each.ops if op.kind == "matmul") for each in (work, traced)]
    close(*products, "products")
