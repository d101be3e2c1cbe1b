"""What a run writes down about itself: when, and whether the figures fit each other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest

from lm_train.plan import flops_per_sample, known_facts
from lm_train.recipe import load
from lm_train.runs import RunFolder, read_jsonl
from lm_train.train import train

NewRun = Callable[..., RunFolder]


class _Slow(L.Callback):
    """Steps and validations of a known length."""

    def on_train_batch_start(self, *args: Any) -> None:
        time.sleep(0.02)

    def on_validation_start(self, *args: Any) -> None:
        time.sleep(0.5)


def test_first_every_nth_and_last_step_are_logged(new_run: NewRun) -> None:
    run = new_run("trainer.max_steps=23", "trainer.log_every_n_steps=10", "trainer.val_check_interval=10")
    train(run)
    rows = list(read_jsonl(run.metrics))
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 10, 20, 23]
    assert [row["step"] for row in rows if "val/loss" in row] == [10, 20, 23]


def test_times_and_rates_fit_each_other(new_run: NewRun) -> None:
    run = new_run("trainer.max_steps=30", "trainer.log_every_n_steps=10", "trainer.val_check_interval=15")
    plan = json.loads(run.plan.read_text()) | {"peak_flops_per_device": 1e12}
    run.plan.write_text(json.dumps(plan))  # a device whose peak is known
    train(run, None, [_Slow()])
    rows = [row for row in read_jsonl(run.metrics) if "train/loss" in row]
    recipe = load([f"recipe={run.recipe}"])
    n_parameters = 2 * (12 * 64**2 + 13 * 64) + 2 * 64 + 16 * 64 + 320 * 64
    for row in rows:
        seconds = row["perf/step_seconds"]
        assert row["perf/tokens_per_second"] == pytest.approx(256 / seconds)
        assert row["perf/samples_per_second"] == pytest.approx(16 / seconds)
        flops = flops_per_sample(recipe.model, "causal_lm", known_facts(recipe), n_parameters)
        assert row["perf/mfu"] == pytest.approx(row["perf/samples_per_second"] * flops / 1e12)
        assert 0 <= row["perf/data_wait_seconds"] < seconds
        assert row["memory/peak_bytes"] > 100e6
        assert row["tokens"] == row["step"] * 256
    # the second window holds a validation of half a second; it does not count as steps
    assert 0.02 < rows[1]["perf/step_seconds"] < 0.06
    hours = [row["budget/gpu_hours"] for row in rows]
    assert hours == sorted(hours)
    assert hours[-1] >= (30 * 0.02 + 0.5) / 3600


def test_a_test_split_is_evaluated_at_the_end(new_run: NewRun, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("the large model reads the small data and learns.\n" * 20)
    run = new_run("trainer.max_steps=5", f"data.test_path={held_out}")
    train(run)
    *_, last = read_jsonl(run.metrics)
    assert {"test/loss", "test/perplexity", "test/bits_per_byte"} <= set(last)
    assert last["step"] == 5


def test_without_validation_nothing_is_validated(new_run: NewRun) -> None:
    run = new_run("trainer.max_steps=5", "trainer.limit_val_batches=0")
    train(run)
    assert not any("val/loss" in row for row in read_jsonl(run.metrics))
    assert json.loads((run.checkpoints / "latest").read_text())["step"] == 5


@pytest.mark.parametrize("model", ["kind: gpt", "kind: llama, n_kv_head: 1"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_starts_from_the_same_weights_and_learns(new_run: NewRun, precision: str, model: str) -> None:
    words = (
        f"model={{{model}, n_layer: 2, n_head: 2, n_embd: 64, block_size: 16}}",
        "trainer.max_steps=40",
        "trainer.activation_checkpointing=full",
        "trainer.cross_entropy_chunks=3",
    )
    exact, half = new_run(*words, name="exact"), new_run(*words, f"trainer.precision={precision}", name="half")
    train(exact)
    train(half)
    losses = [[row["train/loss"] for row in read_jsonl(run.metrics) if "train/loss" in row] for run in (exact, half)]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=2e-3), "weights drawn in fp32, rounded after"
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=3e-2)
    assert losses[1] != losses[0]
    assert losses[1][-1] < losses[1][0] - 1
