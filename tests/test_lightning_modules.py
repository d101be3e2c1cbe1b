"""A LightningModule of the user's own in our loop: its steps, optimizer, scheduler and log, under every strategy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lm_train import data, models, modules
from lm_train.errors import ExitCode, UsageError
from lm_train.plan import Plan
from lm_train.recipe import load
from lm_train.runs import RunFolder, read_jsonl
from lm_train.train import train
from tests.conftest import Ranks
from tests.custom_parts import Counting
from tests.test_strategies import LOSS_BOUND, NORM_BOUND, STRATEGIES, curve, difference

NewRun = Callable[..., RunFolder]


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_TRAIN_PLUGINS", "tests")


def model_word(function: str) -> str:
    return f'model={{kind: custom, factory: "tests.custom_parts:{function}", block_size: 16}}'


def rows_with(folder: RunFolder, key: str) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(folder.metrics) if key in row]


def test_it_trains_as_a_bare_loop_with_its_own_optimizer_and_scheduler(new_run: NewRun) -> None:
    run = new_run(model_word("lightning"), "trainer.max_steps=8", "trainer.gradient_clip_val=null")
    assert train(run) == ExitCode.DONE
    recipe, plan = load([f"recipe={run.recipe}"]), Plan.read(run.plan)
    datamodule = data.build(recipe.data, plan, recipe.seed, run)
    datamodule.prepare(recipe.model)
    torch.manual_seed(recipe.seed)
    net: Any = models.build(recipe.model, plan, datamodule.facts)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    found = []
    for step, batch in zip(range(8), datamodule.train_batches(0), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * 0.5 ** (step // 3)
        loss = F.cross_entropy(net(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    rows = rows_with(run, "train/loss")
    assert [row["train/loss"] for row in rows] == pytest.approx(found, rel=1e-6)
    assert [row["train_loss"] for row in rows] == pytest.approx(found, rel=1e-6)
    assert [row["train/learning_rate"] for row in rows] == pytest.approx([1e-2 * 0.5 ** (s // 3) for s in range(8)])
    (last,) = rows_with(run, "val/loss")
    assert last["val/perplexity"] > 1
    assert (run.checkpoints / "best").exists()


@pytest.mark.parametrize(
    "strategy", [s if s in ("fsdp", "zero3") else pytest.param(s, marks=pytest.mark.slow) for s in STRATEGIES]
)
def test_two_processes_compute_what_one_computes(ranks: Ranks, new_run: NewRun, strategy: str) -> None:
    words = (model_word("lightning"), "trainer.max_steps=12", "trainer.accumulate_grad_batches=2")
    one = new_run(*words, name="alone")
    both = new_run(*words, "trainer.devices=2", f"trainer.strategy={strategy}", name="both")
    assert train(one) == ExitCode.DONE
    ranks(strategy).run("run", folder=str(both.root))
    largest = difference(curve(one), curve(both))
    assert largest.loss <= LOSS_BOUND
    assert largest.norm <= NORM_BOUND
    for key in ("train_loss", "train/learning_rate"):
        assert [row[key] for row in rows_with(both, key)] == pytest.approx(
            [r[key] for r in rows_with(one, key)], rel=1e-5
        )
    assert rows_with(both, "val/loss")[-1]["val/loss"] == pytest.approx(
        rows_with(one, "val/loss")[-1]["val/loss"], rel=1e-5
    )


@pytest.mark.parametrize("strategy", ["single", "fsdp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_its_scheduler_goes_on_where_it_stood(ranks: Ranks, new_run: NewRun, strategy: str) -> None:
    def run(folder: RunFolder, resume_from: Path | None = None) -> None:
        if strategy == "single":
            assert train(folder, resume_from) == ExitCode.DONE
        else:
            ranks(strategy).run("run", folder=str(folder.root), resume_from=resume_from and str(resume_from))

    words = (
        model_word("lightning"),
        *(["trainer.devices=2"] if strategy != "single" else []),
        f"trainer.strategy={strategy}",
    )
    whole = new_run(*words, "trainer.max_steps=10", name="whole")
    half = new_run(*words, "trainer.max_steps=5", name="half")
    rest = new_run(*words, "trainer.max_steps=10", name="rest")
    run(whole)
    run(half)
    run(rest, half.checkpoints / "step-5")
    assert curve(half) + curve(rest) == curve(whole)
    rates = [row["train/learning_rate"] for f in (half, rest) for row in rows_with(f, "train/learning_rate")]
    assert rates == pytest.approx([1e-2 * 0.5 ** (s // 3) for s in range(10)])


@pytest.mark.parametrize(
    ("function", "said"),
    [("by_hand", "automatic_optimization"), ("two_optimizers", "2 of them"), ("own_backward", "defines backward"),
     ("no_loss", "gave None; expected a loss")],
)  # fmt: skip
def test_what_our_loop_has_no_place_for_is_one_line(new_run: NewRun, function: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        train(new_run(model_word(function), "trainer.max_steps=2"))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_debug_says_that_its_loss_has_no_known_scale(new_run: NewRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(model_word("asks_its_trainer"), "trainer.max_steps=12", "debug=true")
    assert train(run) == ExitCode.DONE
    told = capsys.readouterr().err
    assert "overfit one batch: left out, since the loss of Asking is its own" in told
    assert "shapes of the first batch" in told
    assert "slowest operations" in told


def test_the_module_is_trained_by_the_task_module_of_lightning(new_run: NewRun) -> None:
    run = new_run(model_word("lightning"))
    recipe, plan = load([f"recipe={run.recipe}"]), Plan.read(run.plan)
    datamodule = data.build(recipe.data, plan, recipe.seed, run)
    datamodule.prepare(recipe.model)
    net = models.build(recipe.model, plan, datamodule.facts)
    assert isinstance(modules.build(net, recipe, plan, datamodule), modules.CustomTraining)


def test_metrics_in_training_cover_the_steps_since_the_row_before(new_run: NewRun) -> None:
    run = new_run(model_word("counting"), "trainer.max_steps=7", "trainer.log_every_n_steps=3")
    assert train(run) == ExitCode.DONE
    assert [(row["step"], row["steps"]) for row in rows_with(run, "steps")] == [(1, 1), (3, 2), (6, 3), (7, 1)]


def test_metrics_leave_out_batches_that_only_fill_up(new_run: NewRun) -> None:
    run = new_run(model_word("counting"))
    recipe, plan = load([f"recipe={run.recipe}"]), Plan.read(run.plan)
    net: Any = Counting(257)
    module = modules.CustomTraining(net, recipe.optim, plan, 0)
    tokens = torch.arange(4 * 16).view(4, 16)
    batch = {"tokens": tokens, "targets": tokens, "valid": torch.ones(4, dtype=torch.bool)}
    filling = batch | {"valid": torch.zeros(4, dtype=torch.bool)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torchmetrics' on what was asked before an update
        for given in (filling, batch, filling, batch, filling):
            module.validation_step(given, 0)
        assert float(net.seen.compute()) == 8
    assert net.firsts.compute().tolist() == [0, 16, 32, 48] * 2
    assert net.seen.update_count == 2
    assert module._averages(module._logged)["val_loss"] > 0
