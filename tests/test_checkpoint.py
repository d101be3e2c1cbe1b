"""The checkpoint format: complete, exact, independent of who wrote it, and never trusted blindly."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from lm_train import checkpoint, resume, runs
from lm_train.checkpoint import CheckpointReader, RandomState, saving, set_random_state, views_of
from lm_train.errors import CheckpointError, ExitCode, OutputError, UsageError
from lm_train.hardware import Machine
from lm_train.optim import build_optimizer
from lm_train.plan import Plan, make_plan
from lm_train.recipe import Recipe, load
from lm_train.runs import RunFolder, read_jsonl
from lm_train.train import train
from tests.ranks_as_threads import on_ranks

NewRun = Callable[..., RunFolder]
KINDS = ("adamw", "adam", "sgd", "adagrad", "rmsprop")


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(load(["recipe=gpt_debug", f"optim={{kind: {kind}}}"]).optim, model, fused=False)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, n: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(n):
        loss = model(torch.randn(8, 7, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_goes_on_to_the_bit(tmp_path: Path, kind: str) -> None:
    model = net()
    optimizer = optimizer_of(kind, model)
    steps(model, optimizer, 3, seed=1)
    checkpoint.save(tmp_path / "step-3", views_of(model, optimizer), {"step": 3})
    expected = steps(model, optimizer, 4, seed=2)

    other = net(seed=9)
    other_optimizer = optimizer_of(kind, other)
    reader = CheckpointReader(tmp_path / "step-3")
    reader.load(views_of(other, other_optimizer))
    assert reader.state == {"step": 3}
    assert steps(other, other_optimizer, 4, seed=2) == expected


def test_ranks_each_write_a_part_and_any_range_can_be_read(tmp_path: Path) -> None:
    """Three ranks answer for thirds of tensors that three does not divide."""
    model = net()
    optimizer = optimizer_of("adamw", model)
    steps(model, optimizer, 2, seed=1)
    target = tmp_path / "step-2"
    done = on_ranks(
        3, lambda rank, group: checkpoint.save(target, views_of(model, optimizer, rank, 3), {"step": 2}, group)
    )
    assert [answer.folder for answer in done] == [target] * 3
    reader = CheckpointReader(target)
    weight = model[0].weight.detach().flatten()
    for start, length in ((0, 35), (3, 20), (11, 1), (34, 1)):
        assert torch.equal(reader.read("0.weight", "param", start, length), weight[start : start + length])
    moment = optimizer.state[model[0].weight]["exp_avg_sq"].flatten()
    assert torch.equal(reader.read("0.weight", "exp_avg_sq", 5, 25), moment[5:30])
    held = []
    for rank in range(3):
        with safe_open(target / f"shard-{rank}.safetensors", framework="pt") as shard:
            held.append(shard.get_slice(f"0.weight|param|{rank * 35 // 3}").get_shape()[0])
    assert held == [11, 12, 12]


def test_random_states_of_all_generators_come_back() -> None:
    state = json.loads(json.dumps(RandomState().values()))
    drawn = (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())
    set_random_state(state)
    assert (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()) == drawn


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = net()
    optimizer = optimizer_of("adamw", model)
    steps(model, optimizer, 1, seed=1)
    checkpoint.save(tmp_path / "step-1", views_of(model, optimizer), {"step": 1})
    return tmp_path / "step-1"


def test_another_model_or_optimizer_is_refused_by_name(saved: Path) -> None:
    other = nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6))
    with pytest.raises(CheckpointError, match=r"0\.bias: saved \(5,\), model \(6,\); 0\.weight: saved \(5, 7\)"):
        CheckpointReader(saved).load(views_of(other, None))
    model = net()
    with pytest.raises(CheckpointError, match="state of AdamW, the recipe asks for SGD"):
        CheckpointReader(saved).load(views_of(model, optimizer_of("sgd", model)))


def test_a_save_that_fails_leaves_the_older_one_alone(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.os, "write", full)
    model = net()
    with pytest.raises(OutputError, match=r"step-2: the disk is full; free space there, or .*runs_dir="):
        checkpoint.save(saved.with_name("step-2"), views_of(model, optimizer_of("sgd", model)), {"step": 2})
    CheckpointReader(saved)
    assert {p.name for p in saved.parent.iterdir()} == {"latest", "step-1"}


class _Kill(L.Callback):
    """Ends the process' training without a word, as a kill would, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            raise KeyError("killed")


@pytest.mark.parametrize(
    "optim", ["{kind: adamw, learning_rate: 3e-3, warmup_steps: 5}", "{kind: sgd, learning_rate: 0.1}"]
)
def test_an_interrupted_run_goes_on_with_the_losses_of_the_undisturbed_one(new_run: NewRun, optim: str) -> None:
    words = (f"optim={optim}", "model.dropout=0.1", "checkpoint.every_n_steps=10", "trainer.accumulate_grad_batches=2")
    words += ("trainer.val_check_interval=25", "trainer.max_steps=150")  # two passes over the text
    whole, broken = new_run(*words, name="whole"), new_run(*words, name="broken")
    assert train(whole) == ExitCode.DONE
    for kill_at in (17, 98, 141):
        resume_from = runs.latest_checkpoint(broken)
        with pytest.raises(KeyError, match="killed"):
            train(broken, resume_from, [_Kill(kill_at)])
        runs.cut_jsonl(broken.metrics, kill_at // 10 * 10)
    assert train(broken, runs.latest_checkpoint(broken)) == ExitCode.DONE
    keep = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "val/loss")
    rows = [[{k: row[k] for k in keep if k in row} for row in read_jsonl(run.metrics)] for run in (whole, broken)]
    assert len(rows[0]) == 150 + 6
    assert rows[0] == rows[1]


def test_the_newest_and_the_best_are_kept(new_run: NewRun) -> None:
    run = new_run("checkpoint.every_n_steps=10", "trainer.val_check_interval=5", "checkpoint.keep_last=2")
    train(run)
    losses = {row["step"]: row["val/loss"] for row in read_jsonl(run.metrics) if "val/loss" in row}
    best = json.loads((run.checkpoints / "best").read_text())
    assert best["step"] == min(losses, key=lambda step: losses[step])
    assert best["value"] == pytest.approx(losses[best["step"]])
    assert json.loads((run.checkpoints / "latest").read_text())["step"] == 50
    kept = {p.name for p in run.checkpoints.glob("step-*")}
    assert {"step-50", best["checkpoint"]} <= kept
    assert len(kept) in (2, 3)


def test_a_run_cut_off_after_its_last_save_gets_its_last_validation(new_run: NewRun) -> None:
    run = new_run("trainer.val_check_interval=25")
    train(run)
    rows = list(read_jsonl(run.metrics))
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    (run.checkpoints / "best").unlink()
    assert train(run, runs.latest_checkpoint(run)) == ExitCode.DONE
    assert list(read_jsonl(run.metrics)) == [*rows[:-1], pytest.approx(rows[-1], rel=1e-6)]
    assert json.loads((run.checkpoints / "best").read_text())["step"] == 50
    before = run.metrics.read_bytes()
    assert train(run, runs.latest_checkpoint(run)) == ExitCode.DONE
    assert run.metrics.read_bytes() == before, "nothing was left to do"


def test_early_stopping_goes_on_counting_after_a_resume(new_run: NewRun) -> None:
    words = ("optim={kind: sgd, learning_rate: 2.0, momentum: 0.0}", "trainer.gradient_clip_val=null")
    words += ("trainer.val_check_interval=2", "trainer.early_stopping_patience=3", "checkpoint.every_n_steps=2")
    whole, broken = new_run(*words, name="whole"), new_run(*words, name="broken")
    train(whole)
    end = max(row["step"] for row in read_jsonl(whole.metrics))
    assert 8 <= end < 50
    with pytest.raises(KeyError, match="killed"):
        train(broken, None, [_Kill(end - 3)])
    runs.cut_jsonl(broken.metrics, end - 4)
    train(broken, runs.latest_checkpoint(broken))
    steps = [[row["step"] for row in read_jsonl(run.metrics)] for run in (whole, broken)]
    assert steps[0] == steps[1]


def test_slurm_variables_of_the_surroundings_change_nothing(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("JOB_ID", "5"), ("JOB_NAME", "x"), ("NTASKS", "4"), ("PROCID", "3"), ("LOCALID", "3")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert train(new_run("trainer.max_steps=2")) == ExitCode.DONE


def test_resuming_on_other_data_is_refused(new_run: NewRun, tmp_path: Path) -> None:
    train(new_run("trainer.max_steps=2"))
    found = runs.latest_checkpoint(RunFolder(tmp_path / "run"))
    other_text = tmp_path / "other.txt"
    other_text.write_text("something else entirely, and enough of it. " * 300)
    with pytest.raises(CheckpointError, match="other data or another tokenizer"):
        train(new_run("trainer.max_steps=4", f"data.path={other_text}"), found)


def asked(*words: str) -> tuple[Recipe, Plan]:
    recipe = load(["recipe=gpt_debug", *words])
    return recipe, make_plan(recipe, Machine(cpu_cores=2, gpus=()))


def test_what_cannot_go_on_is_refused_before_anything_is_written(new_run: NewRun) -> None:
    run = new_run("trainer.max_steps=2")
    train(run)
    found = runs.latest_checkpoint(run)
    assert found is not None
    same = load([f"recipe={run.recipe}"])
    plan = make_plan(same, Machine(cpu_cores=2, gpus=()))
    assert resume.check_resumable(found, same, plan) == 2
    for words, said in (
        (["seed=3"], r"trained with seed=1337 \(now 3\), which makes another run of it; .*allow_change=\[seed\]"),
        (["optim=sgd"], "holds the state of AdamW, the recipe asks for sgd; give optim.kind=adamw"),
        (["model.n_layer=3"], r"trained with model.n_layer=2 \(now 3\)"),
    ):
        other = load([f"recipe={run.recipe}", *words])
        with pytest.raises(CheckpointError, match=said):
            resume.check_resumable(found, other, make_plan(other, Machine(cpu_cores=2, gpus=())))
    (found / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state.json: damaged: expected [0-9,]+ bytes, found 1"):
        resume.check_resumable(found, same, plan)


def test_where_a_start_goes_on_from(new_run: NewRun, tmp_path: Path) -> None:
    source, run = new_run("trainer.max_steps=2", name="source"), new_run("trainer.max_steps=2", name="run")
    train(source)

    def found(word: str, folder: RunFolder | None) -> Path | None:
        return resume.checkpoint_to_resume(asked(f"resume={word}")[0], folder)[0].checkpoint

    theirs = source.checkpoints / "step-2"
    assert found("auto", None) is None
    assert found("auto", run) is None
    assert found(str(source.root), run) == theirs
    assert found(str(theirs), None) == theirs
    train(run)
    own = run.checkpoints / "step-2"
    assert found("auto", run) == own
    assert found(str(source.root), run) == own, "a requeued run goes on from its own progress"
    assert found(str(own), run) == own
    with pytest.raises(UsageError, match=r"resume=never: .*run has checkpoints"):
        found("never", run)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        found(str(tmp_path), None)
