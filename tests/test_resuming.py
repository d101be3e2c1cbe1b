"""Going on with another recipe: what differs is said, what would make another run of it refused, the rest takes effect."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest

from lm_train import resume, runs
from lm_train.errors import CheckpointError, ExitCode, OutputError, UsageError
from lm_train.hardware import Machine
from lm_train.launch import _check_space
from lm_train.plan import Plan, make_plan
from lm_train.recipe import Recipe, load
from lm_train.resume import Terms
from lm_train.runs import RunFolder, read_jsonl
from lm_train.saved import BEST, checkpoints_in, pointed, step_of
from lm_train.saved.publish import Keeping, kept
from lm_train.saved.sealed import read_sealed, sealed
from lm_train.train import train

NewRun = Callable[..., RunFolder]
WORDS = ("trainer.max_steps=6", "checkpoint.every_n_steps=2")


@pytest.fixture(autouse=True)
def no_terms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(resume.VARIABLE, raising=False)
    yield
    monkeypatch.delenv(resume.VARIABLE, raising=False)


def asked(run: RunFolder, *words: str) -> tuple[Recipe, Plan]:
    recipe = load([f"recipe={run.recipe}", *words])
    return recipe, make_plan(recipe, Machine(cpu_cores=2, gpus=()))


def test_what_would_change_the_run_in_silence_must_be_named(new_run: NewRun, tmp_path: Path) -> None:
    run = new_run(*WORDS)
    train(run)
    found = run.checkpoints / "step-6"
    dangerous = {
        "seed=7": "seed=1337 (now 7)",
        "model.dropout=0.2": "model.dropout=0.0 (now 0.2)",
        "model.n_head=4": "model.n_head=2 (now 4)",
        "data.global_batch_size=32": "data.global_batch_size=16 (now 32)",
        "data.tokenizer=chars": "data.tokenizer=bytes (now chars)",
    }
    for word, told in dangerous.items():
        recipe, plan = asked(run, word)
        key = word.partition("=")[0]
        with pytest.raises(CheckpointError) as error:
            resume.check_resumable(found, recipe, plan)
        assert told in str(error.value)
        assert f"allow_change=[{key}] to go on" in str(error.value)
        assert "\n" not in str(error.value)
        for words in ((key,), (key.split(".")[0],)):
            assert resume.check_resumable(found, recipe, plan, Terms(allow_change=words)) == 6
        with pytest.raises(CheckpointError):
            resume.check_resumable(found, recipe, plan, Terms(allow_change=("model.n_layer", "data.val_fraction")))
    recipe, plan = asked(run, "model.dropout=0.2", "seed=7")
    with pytest.raises(CheckpointError, match=r"allow_change=\[seed,model.dropout\] to go on"):
        resume.check_resumable(found, recipe, plan, Terms(allow_change=("seed",)))
    harmless = (
        "optim.learning_rate=1e-5",
        "optim.beta2=0.99",
        "trainer.max_steps=9",
        "data.num_workers=1",
        "keep_last=3",
    )
    recipe, plan = asked(run, *harmless[:-1], "checkpoint.keep_last=3")
    assert resume.check_resumable(found, recipe, plan) == 6
    assert resume.differences(found, recipe) == [
        "checkpoint.keep_last: 2 -> 3",
        "data.num_workers: auto -> 1",
        "optim.beta2: 0.95 -> 0.99",
        "optim.learning_rate: 0.001 -> 1e-05",
        "trainer.max_steps: 6 -> 9",
    ]
    assert resume.differences(found, asked(run)[0]) == []


def test_words_that_allow_a_change_are_checked() -> None:
    assert load(["recipe=gpt_debug", "allow_change=[data,model.dropout]"]).allow_change == ("data", "model.dropout")
    assert load(["recipe=gpt_debug", "allow_change=seed"]).allow_change == ("seed",)
    for word in ("allow_change=[optim]", "allow_change=[../x]", "allow_change=3"):
        with pytest.raises(UsageError, match=r"expected seed, data, model|expected sections or keys"):
            load(["recipe=gpt_debug", word])


def test_other_data_are_taken_where_that_was_named(
    new_run: NewRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(new_run(*WORDS))
    other = tmp_path / "other.txt"
    other.write_text("something else entirely, and enough of it. " * 300)
    run = new_run("trainer.max_steps=8", f"data.path={other}")
    with pytest.raises(CheckpointError, match=r"other data or another tokenizer.*allow_change=\[data\]"):
        train(run, run.checkpoints / "step-6")
    Terms(allow_change=("data",)).tell_ranks()
    assert train(run, run.checkpoints / "step-6") == ExitCode.DONE


class _Groups(L.Callback):
    """What the optimizer works with in a step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_before_zero_grad(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        self.seen.append({"step": trainer.global_step, "groups": groups})


def test_a_changed_learning_rate_betas_and_decay_take_effect(new_run: NewRun) -> None:
    train(new_run(*WORDS))
    optim = "optim={kind: adamw, learning_rate: 5e-5, schedule: constant, beta1: 0.5, beta2: 0.7, weight_decay: 0.3, eps: 1e-6}"
    run, groups = new_run("trainer.max_steps=8", optim), _Groups()
    train(run, run.checkpoints / "step-6", [groups])
    last = groups.seen[-1]["groups"]
    assert [group["betas"] for group in last] == [(0.5, 0.7)] * len(last)
    assert {group["lr"] for group in last} == {5e-5}
    assert {group["weight_decay"] for group in last} == {0.3, 0.0}
    assert {group["eps"] for group in last} == {1e-6}
    rows = {row["step"]: row for row in read_jsonl(run.metrics) if "train/loss" in row}
    assert rows[8]["train/learning_rate"] == pytest.approx(5e-5)


def test_going_back_leaves_the_later_way(new_run: NewRun) -> None:
    """resume=PATH inside the run's own folder: what lies beyond goes once something new is saved."""
    run = new_run(*WORDS, "checkpoint.keep_last=5")
    train(run)
    assert [step_of(path) for path in checkpoints_in(run.checkpoints)] == [6, 4, 2]
    runs.cut_jsonl(run.metrics, 2)
    train(new_run("trainer.max_steps=3", "checkpoint.keep_last=5"), run.checkpoints / "step-2")
    assert [step_of(path) for path in checkpoints_in(run.checkpoints)] == [3, 2]
    assert runs.latest_checkpoint(run) == run.checkpoints / "step-3"


def test_a_damaged_newest_is_done_again_and_the_curve_is_the_same(
    new_run: NewRun, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("trainer.max_steps=8", "checkpoint.every_n_steps=3")
    whole = new_run(*words, name="whole")
    train(whole)
    run = new_run("trainer.max_steps=6", "checkpoint.every_n_steps=3")
    train(run)
    shard = run.checkpoints / "step-6" / "shard-0.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 16
    shard.write_bytes(content)
    new_run(*words)
    assert train(run, run.checkpoints / "step-6") == ExitCode.DONE
    told = capfd.readouterr().err
    assert f"warning: {shard}: damaged: expected " in told
    assert "going on from step-3; 3 steps are lost and done again" in told
    assert f"resuming from {run.checkpoints / 'step-3'}" in told
    losses = [{row["step"]: row.get("train/loss") for row in read_jsonl(r.metrics)} for r in (whole, run)]
    assert losses[0] == losses[1]
    content = bytearray(shard.read_bytes())
    assert runs.latest_checkpoint(run) == run.checkpoints / "step-8"
    assert pointed(run.checkpoints, BEST) is not None


def test_a_named_checkpoint_is_taken_or_none(new_run: NewRun, tmp_path: Path) -> None:
    run = new_run(*WORDS)
    train(run)
    (run.checkpoints / "step-6" / "state.json").write_text("{}")

    def chosen(word: str) -> tuple[Path | None, bool]:
        choice, terms = resume.checkpoint_to_resume(load(["recipe=gpt_debug", f"resume={word}"]), None)
        return choice.checkpoint, terms.strict

    with pytest.raises(
        CheckpointError, match=r"state.json: damaged.*; resume=.*step-4 takes the newest good one there"
    ):
        chosen(str(run.root))
    assert chosen(str(run.checkpoints / "step-4")) == (run.checkpoints / "step-4", True)
    found, terms = resume.checkpoint_to_resume(load(["recipe=gpt_debug"]), run)
    assert found.checkpoint == run.checkpoints / "step-4"
    assert "2 steps are lost" in found.skipped[-1]
    assert not terms.strict
    other = new_run(*WORDS, name="other")
    with pytest.raises(CheckpointError, match="damaged"):
        train(other, run.checkpoints / "step-6")  # another run's: no stepping back there


def test_a_fall_back_from_a_named_checkpoint_is_refused_by_the_ranks(new_run: NewRun) -> None:
    run = new_run(*WORDS)
    train(run)
    shard = run.checkpoints / "step-6" / "shard-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    Terms(strict=True).tell_ranks()
    with pytest.raises(CheckpointError, match=r"shard-0.safetensors: damaged"):
        train(run, run.checkpoints / "step-6")


def test_all_of_it_is_in_the_checkpoint(new_run: NewRun) -> None:
    run = new_run(*WORDS)
    train(run)
    state = json.loads((run.checkpoints / "step-6" / "state.json").read_text())
    assert {"step", "seed", "recipe", "data", "horizon", "gpu_hours", "module", "precision", "skipped"} <= state.keys()
    assert state["recipe"]["model.n_layer"] == 2
    assert state["recipe"]["optim.learning_rate"] == 1e-3
    assert state["global_batch_size"] == 16
    assert not {"name", "runs_dir", "resume", "plugins"} & state["recipe"].keys()


@pytest.mark.parametrize("mode", ["min", "max"])
def test_best_by_a_metric_and_every_nth_for_ever(new_run: NewRun, mode: str) -> None:
    run = new_run(
        "trainer.max_steps=12",
        "trainer.val_check_interval=1",
        "checkpoint.every_n_steps=2",
        "checkpoint.keep_every_n_steps=5",
        "checkpoint.keep_last=1",
        "checkpoint.monitor=val/perplexity",
        f"checkpoint.mode={mode}",
    )
    train(run)
    values = {row["step"]: row["val/perplexity"] for row in read_jsonl(run.metrics) if "val/perplexity" in row}
    best = (min if mode == "min" else max)(values, key=lambda step: values[step])
    pointer = read_sealed(run.checkpoints / BEST)
    assert (pointer["step"], pointer["monitor"], pointer["mode"]) == (best, "val/perplexity", mode)
    assert pointer["value"] == pytest.approx(values[best])
    assert {step_of(path) for path in checkpoints_in(run.checkpoints)} == {5, 10, 12, best}


def test_a_metric_that_no_validation_gives_is_refused(new_run: NewRun) -> None:
    run = new_run("trainer.max_steps=2", "trainer.val_check_interval=1", "checkpoint.monitor=val/accuracyy")
    with pytest.raises(
        UsageError, match=r"checkpoint.monitor=val/accuracyy: a validation of this run gives .*val/loss"
    ):
        train(run)


def test_what_is_kept_and_why() -> None:
    reasons = kept([5, 10, 15, 20, 25, 30], 25, Keeping(2, 10), best=5)
    assert reasons == {25: ["latest"], 20: ["last", "every 10"], 10: ["every 10"], 5: ["best"]}
    assert 30 not in reasons, "beyond the latest lies a way that was left"
    assert kept([], 5, Keeping(1), None) == {}


def test_two_checkpoints_must_fit_before_the_first_step(tmp_path: Path) -> None:
    recipe = load(["recipe=gpt_debug", f"runs_dir={tmp_path}", "checkpoint.every_n_steps=10"])
    plan = make_plan(recipe, Machine(cpu_cores=2, gpus=()))
    if plan.prediction is None:
        pytest.skip("no prediction of this machine")
    _check_space(recipe, plan, None)
    huge = plan.prediction.model_copy(update={"checkpoint_bytes": 10**15})
    with pytest.raises(OutputError, match=r"two checkpoints need 2000.0 TB, .* are free; free .* runs_dir=DIR"):
        _check_space(recipe, plan.model_copy(update={"prediction": huge}), None)


def test_what_was_sealed_is_read_back(tmp_path: Path) -> None:
    value = {"checkpoint": "step-1", "é": [1, 2.5, None], "blake": {"x": "y"}}
    (tmp_path / "file").write_text(sealed(value))
    content = read_sealed(tmp_path / "file")
    assert {key: content[key] for key in value} == value
