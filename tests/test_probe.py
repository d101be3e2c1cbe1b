"""Probing a plan with real steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm_train.calibrate.probe import Probe, ProbeFailed, corrected, probe_step
from lm_train.clusters import cluster_named, find
from lm_train.errors import UsageError
from lm_train.hardware import Machine
from lm_train.plan import TimePrediction, make_plan
from lm_train.recipe import ClusterSection, load

CPU = Machine(cpu_cores=1, gpus=())
TINY = (
    "recipe=gpt_debug",
    "model={kind: gpt, n_layer: 1, n_head: 1, n_embd: 16, block_size: 8}",
    "data.tokenizer=bytes",
    "data.global_batch_size=4",
    "trainer.max_steps=10000",
)


def test_a_plan_is_probed_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load([*TINY, "trainer.accumulate_grad_batches=2", "budget.hours=1"])
    plan = make_plan(recipe, CPU)
    found = probe_step(recipe, plan, find(ClusterSection(), CPU, None))
    assert 1e-4 < found.step_seconds < 1
    assert found.peak_bytes > 50e6
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_probed() -> None:
    recipe = load(list(TINY))
    plan = make_plan(recipe, CPU)
    with pytest.raises(UsageError, match="is a description"):
        probe_step(recipe, plan, cluster_named("h100x8"))
    here = find(ClusterSection(), CPU, None)
    with pytest.raises(UsageError, match="one node"):
        probe_step(recipe, plan.model_copy(update={"nodes": 2}), here)


def test_a_configuration_that_does_not_train_says_why(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    recipe = load([*TINY, f"data={{kind: text, path: {tmp_path / 'short.txt'}, tokenizer: bytes}}"])
    plan = make_plan(recipe, CPU)
    with pytest.raises(ProbeFailed, match="short"):
        probe_step(recipe, plan, find(ClusterSection(), CPU, None))


def test_a_prediction_is_corrected_by_what_was_measured() -> None:
    before = TimePrediction(
        compute=2.0,
        communication=1.0,
        optimizer=0.5,
        data=0.0,
        host=0.5,
        relative_error=(0.3, 0.5),
        source="data sheets",
    )
    after = corrected(before, Probe(step_seconds=6.0, spread=0.1, peak_bytes=1))
    assert after.seconds == pytest.approx(6.0)
    assert after.compute == pytest.approx(3.0)
    assert after.relative_error == (0.1, 0.1)
    assert corrected(before, Probe(4.0, 0.0, 1)).relative_error[0] > 0
