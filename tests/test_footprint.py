"""The worst moment of a rank's memory: what must hold whatever the figures are, and real processes held against it."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lm_train.clusters import Cluster, Device, Link
from lm_train.plan import DataFacts, Layout, parameter_shapes, state_bytes
from lm_train.plan.footprint import Copies, memory_of
from lm_train.plan.layout import Strategy
from lm_train.plan.memory import checkpoint_bytes, optimizer_values
from lm_train.plan.moments import Moments, units_of
from lm_train.plan.prediction import MemoryPrediction
from lm_train.plan.update import update_moment
from lm_train.plan.work import work_of
from lm_train.recipe import CNN, GPT, AnyModel, AnyOptim, Recurrent, ResNet, Task
from lm_train.recipe.sections import SGD, Adagrad, Adam, AdamW, Muon, RMSprop
from tests.layouts import PLAIN

GPT_SMALL = GPT(n_layer=12, n_head=12, n_embd=768, block_size=1024)
TEXT, IMAGES = DataFacts(vocab_size=50257), DataFacts(input_shape=(3, 32, 32), n_outputs=10)
ALONE = replace(PLAIN, precision="bf16-mixed", accelerator="gpu")
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload")


def cluster(memory_bytes: int = 80 << 30) -> Cluster:
    device = Device(
        name="a GPU",
        accelerator="gpu",
        memory_bytes=memory_bytes,
        peak_flops={"bf16": 1e14},
        achievable={"bf16": 0.7},
        memory_bandwidth=1e12,
        power_watts=400,
    )
    link = Link(name="a link", bandwidth=1e11, latency_seconds=1e-6)
    return Cluster(
        name="a cluster",
        device=device,
        devices_per_node=8,
        nodes=8,
        intra_node=link,
        inter_node=link,
        cpu_cores_per_node=8,
        host_memory_bytes=0,
        disk_bandwidth=1e9,
    )


def predicted(
    layout: Layout,
    model: AnyModel = GPT_SMALL,
    task: Task = "causal_lm",
    facts: DataFacts = TEXT,
    optim: AnyOptim | None = None,
    validates: bool = True,
    copies: Copies = "never",
) -> MemoryPrediction:
    shapes, work = parameter_shapes(model, task, facts), work_of(model, task, facts, layout)
    assert shapes is not None
    assert work is not None
    return memory_of(shapes, work, layout, optim or AdamW(), cluster(), copies=copies, validates=validates)


def spread(strategy: Strategy, ranks: int, **changes: Any) -> Layout:
    return replace(ALONE, strategy=strategy, devices=ranks, **changes)


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
@pytest.mark.parametrize("strategy", ["single", *STRATEGIES])
def test_the_parts_are_the_peak_and_what_it_holds_at_least(strategy: Strategy, accelerator: Any) -> None:
    layout = spread(strategy, 1 if strategy == "single" else 8, accelerator=accelerator)
    memory = predicted(layout)
    parts = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers", "reserve")
    assert memory.total == sum(getattr(memory, part) for part in parts)
    assert all(getattr(memory, part) >= 0 for part in parts)
    shapes = parameter_shapes(GPT_SMALL, "causal_lm", TEXT)
    assert shapes is not None
    state = state_bytes(shapes, strategy, layout.precision, AdamW(), layout.ranks)
    if strategy != "zero3_offload" or accelerator == "cpu":
        assert (memory.parameters, memory.optimizer) == (state.parameters, state.optimizer)
        assert memory.total > state.total
    else:
        assert memory.host >= state.total
    assert memory.high >= memory.total


@pytest.mark.parametrize("strategy", ["fsdp", "zero1", "zero2", "zero3"])
def test_more_ranks_hold_less_each(strategy: Strategy) -> None:
    totals = [predicted(spread(strategy, ranks)).total for ranks in (2, 8, 64)]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1]


def test_what_is_divided_takes_less() -> None:
    large = GPT(n_layer=36, n_head=20, n_embd=1280, block_size=1024)
    of = {s: predicted(spread(s, 64, micro_batch_size=1, activation_checkpointing="full"), large) for s in STRATEGIES}
    states = {name: memory.parameters + memory.gradients + memory.optimizer for name, memory in of.items()}
    assert states["zero3"] < states["zero2"] < states["ddp"]
    assert of["fsdp"].total < of["zero2"].total < of["ddp"].total
    assert of["zero3"].total < of["ddp"].total
    assert of["zero3_offload"].total < of["zero3"].total


def test_zero3_keeps_a_small_network_whole_from_forward_to_backward_pass() -> None:
    """DeepSpeed lets go of a parameter only if a billion others come before its next use."""
    memory = predicted(spread("zero3", 8, activation_checkpointing="full"))
    assert memory.buffers > 2 * 124_000_000
    giant = GPT(n_layer=40, n_head=40, n_embd=5120, block_size=1024)  # 12.8 billion
    layout = spread("zero3", 64, micro_batch_size=1, activation_checkpointing="full")
    assert predicted(layout, giant).buffers < 2 * 2_000_000_000


def test_accumulation_holds_gradients_all_the_time() -> None:
    layout = replace(ALONE, accelerator="cpu", precision="32-true", micro_batch_size=1)
    once, twice = predicted(layout), predicted(replace(layout, accumulate_grad_batches=2))
    assert twice.total >= once.total
    shapes = parameter_shapes(GPT_SMALL, "causal_lm", TEXT)
    assert shapes is not None
    parameters = sum(math.prod(shape) for _, shape in shapes)
    assert twice.gradients == 4 * parameters


def test_ddp_accumulates_beside_its_buckets() -> None:
    """Hooks that put gradients into the buckets are off until the last micro batch: seen in real processes."""
    layout = spread("ddp", 2, accelerator="cpu", precision="32-true", micro_batch_size=1)
    accumulated = predicted(replace(layout, accumulate_grad_batches=2))
    assert accumulated.moment == "the backward pass"
    assert accumulated.buffers == accumulated.gradients
    assert accumulated.total - predicted(layout).total > 0.5 * accumulated.gradients


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "zero2"])
def test_less_work_at_once_takes_less(strategy: Strategy) -> None:
    layout = spread(strategy, 1 if strategy == "single" else 4, micro_batch_size=16)
    whole = predicted(layout)
    for change in ({"micro_batch_size": 8}, {"activation_checkpointing": "full"}, {"cross_entropy_chunks": 8}):
        assert predicted(replace(layout, **change)).total < whole.total, change  # type: ignore[arg-type]
    chunked = predicted(replace(layout, cross_entropy_chunks=8))
    assert chunked.logits < whole.logits


def test_a_validation_can_be_the_peak() -> None:
    """Where every block recomputes and the loss is computed in pieces, a validation of a masked language model is not."""
    layout = replace(ALONE, accelerator="cpu", precision="32-true", micro_batch_size=64)
    model = Recurrent(cell="rnn", n_layer=1, n_embd=64, hidden_size=64, block_size=64)
    facts = DataFacts(vocab_size=1000)
    assert predicted(layout, model, facts=facts, validates=False).moment != "a validation"
    with_one = predicted(layout, model, facts=facts)
    assert with_one.total >= predicted(layout, model, facts=facts, validates=False).total


@pytest.mark.parametrize("optim", [AdamW(), Adam(weight_decay=0.1), SGD(), Adagrad(), RMSprop(), Muon()])
def test_a_fused_update_needs_no_temporaries(optim: AnyOptim) -> None:
    shapes = parameter_shapes(GPT_SMALL, "causal_lm", TEXT)
    assert shapes is not None
    state = state_bytes(shapes, "single", "bf16-mixed", optim, 1)
    on_gpu = update_moment(shapes, ALONE, optim, state).buffers
    in_loop = update_moment(shapes, replace(ALONE, accelerator="cpu"), optim, state).buffers
    scaled = update_moment(shapes, replace(ALONE, precision="16-mixed"), optim, state).buffers
    if optim.kind in ("adam", "adamw"):
        assert on_gpu == 0
        assert scaled >= state.parameters // 2  # square roots of all second moments of the matrices
    largest = 4 * max(math.prod(shape) for _, shape in shapes)
    copies = {"adam": 3, "adamw": 2, "sgd": 0, "adagrad": 1, "rmsprop": 1, "muon": 2}[optim.kind]
    assert in_loop >= copies * largest
    values = sum(optimizer_values(optim, name, shape) * math.prod(shape) for name, shape in shapes)
    assert state.optimizer == 4 * values


def test_units_are_the_entries_of_the_outermost_lists() -> None:
    shapes = parameter_shapes(ResNet(), "classification", IMAGES)
    assert shapes is not None
    assert list(units_of(shapes)) == ["", "stages.0", "stages.1", "stages.2"]
    shapes = parameter_shapes(CNN(channels=(8, 8), widths=(16,)), "classification", IMAGES)
    assert shapes is not None
    assert list(units_of(shapes)) == ["", "convolutions.0", "convolutions.1", "hidden.0"]
    text = parameter_shapes(Recurrent(n_layer=2), "causal_lm", DataFacts(vocab_size=100))
    assert text is not None
    assert list(units_of(text)) == ["", "encoder.cells.0", "encoder.cells.1"]


@pytest.mark.parametrize(
    ("model", "task", "facts"),
    [
        (GPT(n_layer=3, n_head=2, n_embd=32, block_size=16), "causal_lm", DataFacts(vocab_size=100)),
        (CNN(channels=(8, 16), widths=(16,)), "classification", IMAGES),
        (ResNet(), "classification", IMAGES),
        (Recurrent(n_layer=2), "causal_lm", DataFacts(vocab_size=100)),
    ],
    ids=["gpt", "cnn", "resnet", "recurrent"],
)
def test_every_unit_is_a_stage(model: AnyModel, task: Task, facts: DataFacts) -> None:
    """Else fsdp's gathered parameters would be counted at no moment."""
    layout = spread("fsdp", 2)
    shapes, work = parameter_shapes(model, task, facts), work_of(model, task, facts, layout)
    assert shapes is not None
    assert work is not None
    assert sum(stage.parameters for stage in work.stages) == sum(math.prod(shape) for _, shape in shapes)
    moments = Moments(shapes, work, layout, state_bytes(shapes, "fsdp", "bf16-mixed", AdamW(), 2))
    wanted = [size for name, size in units_of(shapes).items() if name]
    assert [unit for unit in moments.units if unit] == wanted


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_moment_is_below_nothing(strategy: Strategy) -> None:
    for precision, accumulate, accelerator in itertools.product(
        ("32-true", "bf16-mixed", "bf16-true"), (1, 2), ("cpu", "gpu")
    ):
        layout = spread(strategy, 4, accumulate_grad_batches=accumulate, accelerator=accelerator, precision=precision)
        small = GPT(n_layer=3, n_head=2, n_embd=32, block_size=16)
        facts = DataFacts(vocab_size=100)
        shapes, work = parameter_shapes(small, "causal_lm", facts), work_of(small, "causal_lm", facts, layout)
        assert shapes is not None
        assert work is not None
        state = state_bytes(shapes, strategy, layout.precision, AdamW(), 4)
        for moment in Moments(shapes, work, layout, state).all(validates=True):
            assert min(moment.gradients, moment.activations, moment.logits, moment.buffers) >= 0, moment


BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def above_bare(name: str, folder: Path) -> tuple[float, float]:
    """MiB of a row of the benchmark: predicted, and measured in its real processes."""
    command = [sys.executable, str(BENCHMARKS / "memory.py"), "--only", name, "--resume", str(folder / "rows.json")]
    paths = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cells = [cell.strip() for cell in done.stdout.splitlines()[-1].split("|")]
    peak = json.loads((folder / "rows.json").read_text())[name][0]["peak"]
    assert float(cells[3].replace(",", "")) == pytest.approx(peak / 2**20, abs=1)
    return float(cells[4].replace(",", "")), peak / 2**20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_a", "cnn", "lstm bf16", "gpt_a fsdp", "gpt_a zero2", "gpt_b zero3 bf16"])
def test_a_real_training_holds_what_was_predicted(name: str, tmp_path: Path) -> None:
    said, was = above_bare(name, tmp_path)
    assert said == pytest.approx(was, rel=0.05)


@pytest.mark.parametrize("strategy", ["single", *STRATEGIES])
def test_a_copy_to_save_lies_beside_the_training_on_a_cpu_and_on_the_host_of_a_gpu(strategy: Strategy) -> None:
    layout = spread(strategy, 1 if strategy == "single" else 2, accelerator="cpu")
    shapes = parameter_shapes(GPT_SMALL, "causal_lm", TEXT)
    assert shapes is not None
    copy = checkpoint_bytes(shapes, strategy, layout.precision, AdamW()) // layout.ranks
    never, last, along = (predicted(layout, copies=copies) for copies in ("never", "last", "all along"))
    assert along.total == pytest.approx(never.total + copy)
    assert along.copy_to_save == copy
    assert never.copy_to_save == 0
    assert never.total <= last.total <= along.total, "a copy that is taken when the steps are done lies beside less"
    if strategy != "zero3_offload":
        on_gpu = replace(layout, accelerator="gpu")
        difference = predicted(on_gpu, copies="all along").host - predicted(on_gpu, copies="never").host
        assert difference == copy
        assert predicted(on_gpu, copies="all along").total == predicted(on_gpu, copies="never").total
