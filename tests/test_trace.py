"""Tracing without values, held against the same steps with values: torch's own CPU allocator counts the bytes."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lm_train import models
from lm_train.plan import DataFacts, Layout, known_facts, parameter_shapes, traced, with_assumptions
from lm_train.plan.traced import Untraceable, traced_work, traces_of
from lm_train.plan.work import Op, Work, work_of
from lm_train.recipe import Recipe, load, shipped_recipes, task_of
from lm_train.trace import reason_of, trace
from lm_train.trace.batches import evaluation_batch, training_batch
from lm_train.trace.network import autocast, lowered, plan_of, training_module
from lm_train.trace.passes import Passes, run_passes
from lm_train.trace.summary import summarise
from tests.layouts import PLAIN

CUSTOM = ("plugins=tests", "model={kind: custom, factory: tests.custom_parts:build}")
MEASURED = {
    "gpt": (["recipe=gpt_debug", "data.tokenizer=bytes", "model.n_layer=2"], {}),
    "gpt, bf16, recomputed, in chunks": (
        ["recipe=gpt_debug", "data.tokenizer=bytes"],
        {"precision": "bf16-mixed", "activation_checkpointing": "full", "cross_entropy_chunks": 4},
    ),
    "bert in bf16": (["recipe=bert_debug", "model.dropout=0.1"], {"precision": "bf16-true"}),
    "hf": (["recipe=hf_gpt2", "data.tokenizer=bytes"], {}),
    "custom": (["recipe=gpt_debug", "data.tokenizer=bytes", *CUSTOM], {}),
    "cnn": (["recipe=cnn_digits"], {}),
}


def facts_of(recipe: Recipe) -> DataFacts:
    facts = with_assumptions(recipe, known_facts(recipe))[0]
    return dataclasses.replace(facts, pair_lengths=None)  # a trace has texts of the greatest length only


def real_parts(recipe: Recipe, layout: Layout):
    """Network, module and batch of `layout.micro_batch_size` samples, with values."""
    facts, task = facts_of(recipe), task_of(recipe)
    plan = plan_of(layout, task)
    net = models.build(recipe.model, plan, facts).to(lowered(layout) or torch.float32)
    module = training_module(net, recipe, plan, facts)
    return (
        net,
        module,
        *(make(recipe, task, facts, layout.micro_batch_size) for make in (training_batch, evaluation_batch)),
    )


def allocated_peak(module: L.LightningModule, layout: Layout, batch: dict) -> int:
    """Most bytes that two micro batches have allocated at once, by torch's CPU allocator."""
    for parameter in module.parameters():
        parameter.grad = None
    module.train()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        for micro in range(2):
            with autocast(layout):
                loss = module.training_step(batch, micro)
            loss.backward()
            del loss
    events = [e for e in told.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def added_peak(passes: Passes) -> int:
    """Most bytes of the second micro batch's backward pass beside the first one's gradients."""
    alive = peak = 0
    for event in passes.recording.events:
        if event.storage in passes.given or event.storage in passes.gradients or event.phase == "evaluation":
            continue
        size = passes.recording.storages[event.storage].size
        alive += {"birth": size, "death": -size, "arrival": 0}[event.what]
        if event.micro == 1 and event.phase == "backward":
            peak = max(peak, alive)
    return peak


def recorded_peak(passes: Passes) -> int:
    """The same by a recording, gradients included."""
    alive = peak = 0
    for event in passes.recording.events:
        if event.storage in passes.given or event.phase == "evaluation":
            continue
        size = passes.recording.storages[event.storage].size
        alive += {"birth": size, "death": -size, "arrival": 0}[event.what]
        peak = max(peak, alive)
    return peak


def times(work: Work) -> Counter[Op]:
    """How often each operation is done."""
    counted: Counter[Op] = Counter()
    for op in work.ops:
        counted[dataclasses.replace(op, times=1)] += op.times
    return counted


@pytest.mark.parametrize("case", MEASURED)
def test_no_values_and_values_take_the_same_memory(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words, options = MEASURED[case]
    monkeypatch.setenv("LM_TRAIN_PLUGINS", "tests")
    recipe, layout = load(words), dataclasses.replace(PLAIN, **options)
    net, module, batch, evaluation = real_parts(recipe, layout)
    real = run_passes(net, module, layout, batch, evaluation, micro_batches=2)
    widths = {256, 320}  # of logits, with and without padding
    counted = summarise(net, (4, 4), (real, real), widths)
    found = trace(recipe, facts_of(recipe), layout, (2, 4))
    assert found.shapes == counted.shapes
    more = times(counted.work(layout)) - times(found.work(layout))
    # transformers looks for packed sequences with a few operations on position ids
    assert not more if case != "hf" else {op.name for op in more} == {"model.transformer"}
    assert not times(found.work(layout)) - times(counted.work(layout))
    near = 0.02 if case == "hf" else 0
    assert found.work(layout).evaluation_peak == pytest.approx(counted.work(layout).evaluation_peak, rel=near)
    for one, other in zip(found.work(layout).stages, counted.work(layout).stages, strict=True):
        assert (one.name, one.parameters) == (other.name, other.parameters)
        assert one.forward_peak == pytest.approx(other.forward_peak, rel=near)
        assert one.backward_peak == pytest.approx(other.backward_peak, rel=near)
        assert one.backward_peak_with_gradients == pytest.approx(other.backward_peak_with_gradients, rel=near)
    adds = found.work(dataclasses.replace(layout, accumulate_grad_batches=2))
    assert max(stage.backward_peak for stage in adds.stages) == pytest.approx(added_peak(real), rel=near, abs=16)
    batch = {k: v.to(lowered(layout)) if k == "inputs" and lowered(layout) else v for k, v in batch.items()}
    # bf16 products and convolutions have scratch memory inside their kernels, a few hundred kB here
    scratch = 0 if layout.precision == "32-true" and case != "cnn" else 400_000
    assert -scratch - 200 <= recorded_peak(real) - allocated_peak(module, layout, batch) <= 0


@pytest.mark.parametrize("size", [7, pytest.param(64, marks=pytest.mark.slow)])
def test_other_sizes_follow_from_two(size: int) -> None:
    recipe = load(["recipe=gpt_debug", "data.tokenizer=bytes", "model.n_layer=2"])
    layout = dataclasses.replace(PLAIN, activation_checkpointing=2, micro_batch_size=size)
    follows = trace(recipe, facts_of(recipe), layout, (2, 4)).work(layout)
    itself = trace(recipe, facts_of(recipe), layout, (size, size)).work(layout)
    assert (follows.stages, follows.evaluation_peak) == (itself.stages, itself.evaluation_peak)
    assert times(follows) == times(itself)


def test_one_sample_is_traced_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        traced, "_ask", lambda r, f, cases, t: asked.extend(cases) or [Untraceable("no") for _ in cases]
    )
    recipe = load(["recipe=gpt_debug"])
    layouts = [dataclasses.replace(PLAIN, micro_batch_size=size) for size in (1, 2, 8)]
    layouts += [dataclasses.replace(layout, devices=4, strategy="fsdp", num_workers=2) for layout in layouts]
    found = traces_of(recipe, facts_of(recipe), layouts)
    assert [sizes for _, sizes in asked] == [(1, 1), (16, 32)]
    assert found == [Untraceable("no")] * 6


def test_flops_are_those_of_torch_and_of_attention() -> None:
    recipe = load(["recipe=gpt_debug", "data.tokenizer=bytes"])
    _, module, batch, _ = real_parts(recipe, PLAIN)
    with FlopCounterMode(display=False) as counter:
        module.training_step(batch, 0).backward()
    model = recipe.model
    # two products forward, five backward: the scores are computed again
    attention = 14 * model.n_layer * model.n_embd * model.block_size**2 * PLAIN.micro_batch_size
    work = trace(recipe, facts_of(recipe), PLAIN, (2, 4)).work(PLAIN)
    assert work.flops == counter.get_total_flops() + attention
    assert sum(op.flops * op.times for op in work.ops if op.kind == "attention") == attention
    assert {op.name for op in work.ops if op.kind == "matmul"} >= {"blocks.attention.qkv", "blocks.mlp.down"}


def test_gradients_are_complete_where_their_stage_ends() -> None:
    recipe = load(["recipe=gpt_debug", "data.tokenizer=bytes", "model.n_layer=3"])
    stages = trace(recipe, facts_of(recipe), PLAIN, (2, 4)).stages
    shapes = dict(parameter_shapes(recipe.model, "causal_lm", facts_of(recipe)) or ())
    count = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    assert [stage.name for stage in stages] == ["embedding", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert stages[1].parameters == sum(n for name, n in count.items() if name.startswith("blocks.1."))
    # the head's weight is the embedding's
    assert stages[0].parameters == count["token_embedding.weight"] + count["position_embedding.weight"]
    assert sum(stage.parameters for stage in stages) == sum(count.values())


# ---- the process


@pytest.mark.slow
def test_a_process_traces_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = load(["recipe=hf_gpt2", "data.tokenizer=bytes"])
    found = traced_work(recipe, facts_of(recipe), PLAIN)
    assert not isinstance(found, Untraceable), found.reason
    shapes, work = found
    assert shapes[0] == ("model.transformer.wte.weight", (257, 128))
    assert work.flops > 0
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("it is known"))
    layout = dataclasses.replace(PLAIN, micro_batch_size=8, devices=2, strategy="ddp", num_workers=3)
    again = traced_work(recipe, facts_of(recipe), layout)
    assert not isinstance(again, Untraceable)
    assert again[1].flops == 2 * work.flops


class Looks(L.LightningModule):
    """Looks at its loss in the middle of a step."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.net = nn.Embedding(vocab_size, vocab_size)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss = self.net(batch["tokens"]).mean()
        return loss if loss.item() > 0 else -loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def looks(facts: DataFacts) -> L.LightningModule:
    assert facts.vocab_size is not None
    return Looks(facts.vocab_size)


REASONS = [
    (
        ["model={kind: custom, factory: tests.test_trace:looks}"],
        "depends on values, which a trace has none of (test_trace.py:",
    ),
    (["model={kind: custom, factory: tests.custom_parts:no_loss}"], "training_step of NoLoss gave None"),
    (["model={kind: custom, factory: tests.custom_parts:by_hand}"], "optimises by hand"),
    (["model={kind: hf, config: {model_type: gpt2, n_head: 5}}"], "must be divisible by num_heads"),
    (["model={kind: hf, config: {model_type: gpt3}}"], "did you mean gptj"),
]


@pytest.mark.parametrize(("words", "reason"), REASONS)
def test_what_cannot_be_traced_has_a_reason(words: list[str], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_TRAIN_PLUGINS", "tests")
    recipe = load(["recipe=gpt_debug", "data.tokenizer=bytes", *words])
    with pytest.raises(Exception, match=r".") as caught:
        trace(recipe, facts_of(recipe), PLAIN, (2, 4))
    told = reason_of(caught.value)  # type: ignore[arg-type]
    assert reason in told
    assert "\n" not in told


@pytest.mark.slow
def test_the_process_passes_a_reason_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LM_TRAIN_PLUGINS", "")
    words, reason = REASONS[0]
    recipe = load(["recipe=gpt_debug", "data.tokenizer=bytes", "plugins=tests", *words])
    found = traced_work(recipe, facts_of(recipe), PLAIN)
    assert isinstance(found, Untraceable)
    assert reason in found.reason
    assert not (tmp_path / "lm_train" / "traces").exists()


def test_code_that_is_not_allowed_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LM_TRAIN_PLUGINS", raising=False)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("started"))
    recipe = load(["recipe=gpt_debug", "model={kind: custom, factory: tests.custom_parts:build}"])
    found = traced_work(recipe, DataFacts(vocab_size=256), PLAIN)
    assert isinstance(found, Untraceable)
    assert "plugins=tests" in found.reason


def test_data_of_the_users_own_may_not_say_what_a_batch_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load(["recipe=gpt_debug", *CUSTOM, "data={kind: custom, factory: tests.custom_parts:points}"])
    with pytest.raises(ValueError, match="only its own loader"):
        training_batch(recipe, task_of(recipe), DataFacts(), 2)


def test_a_slow_trace_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = traced_work(load(["recipe=gpt_debug"]), DataFacts(vocab_size=2048), PLAIN, timeout_s=0.05)
    assert isinstance(found, Untraceable)
    assert "more than" in found.reason


# ---- shipped recipes

SMALLER = {
    **{key: ["model.n_layer=2"] for key in ("gpt_xl", "gpt_large", "gpt_medium", "llama_8b", "llama_1b")},
    "gru_news": ["data.max_length=40"],
}
"""Blocks are alike, and so are the steps of a cell."""
MANY = ("cnn", "resnet", "mlp")
"""Kinds whose samples are small beside what does not grow with them: 64 of them."""


def check_formulas(name: str, options: dict[str, Any]) -> None:
    """That the closed formulas count what a trace finds: parameters and FLOPs exactly, memory within a percent."""
    recipe = load([f"recipe={name}", *SMALLER.get(name, [])])
    facts, task, kind = facts_of(recipe), task_of(recipe), recipe.model.kind
    layout = dataclasses.replace(PLAIN, micro_batch_size=64 if kind in MANY else 4, **options)
    found = trace(recipe, facts, layout, traced.SIZES)
    assert sum(stage.parameters for stage in found.stages) == found.trained
    shapes, formula, counted = (
        parameter_shapes(recipe.model, task, facts),
        work_of(recipe.model, task, facts, layout),
        found.work(layout),
    )
    if kind == "hf":
        assert shapes is None
        assert formula is None
        return
    assert shapes == list(found.shapes)
    assert formula is not None
    if kind != "recurrent" or recipe.model.cell == "lstm":  # other cells pass step by step, as many small products
        assert formula.flops == counted.flops
    if kind == "recurrent":
        return  # the formulas count what is resident of oneDNN's workspace, a third of what it allocates
    assert sum(stage.parameters for stage in formula.stages) == found.trained
    # the formulas count what kernels take for themselves, too, which a trace does not see: oneDNN's convolutions, and the copy
    # that a softmax makes of logits with a padded vocabulary; and a batch in bf16 with what it was made from
    less, more = (0.025, 0.25) if kind in MANY else (0.015, 0.02)
    slack = 2 * counted.batch_bytes + 2**16
    logits_copy = 1.5 if task == "masked_lm" else 1.0

    def agree(formula_peak: int, traced_peak: int, copies: float = 1.0) -> bool:
        least, most = traced_peak * (1 - less), traced_peak * (1 + more) * copies
        return least - slack <= formula_peak <= most + slack

    assert agree(formula.evaluation_peak, counted.evaluation_peak, logits_copy)
    for peak in ("forward_peak", "backward_peak_with_gradients"):
        highest = [max(getattr(stage, peak) for stage in work.stages) for work in (formula, counted)]
        assert agree(*highest), (peak, highest)


@pytest.mark.parametrize("name", ["gpt_nano", "llama_1b", "bert_news", "resnet_cifar10", "seq2seq_debug"])
def test_formulas_count_what_a_trace_finds(name: str) -> None:
    check_formulas(name, {"precision": "bf16-mixed"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16-true", "accumulate_grad_batches": 2},
        {"precision": "bf16-mixed", "activation_checkpointing": "full", "cross_entropy_chunks": 4},
        {"precision": "bf16-mixed", "strategy": "fsdp"},
        {"precision": "bf16-mixed", "activation_checkpointing": 2, "strategy": "ddp"},
    ],
    ids=lambda options: ",".join(map(str, options.values())) or "plain",
)
@pytest.mark.parametrize("name", shipped_recipes())
def test_formulas_of_every_shipped_recipe(name: str, options: dict[str, Any]) -> None:
    check_formulas(name, options)
