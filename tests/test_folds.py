"""Cross-validation: a series of runs that can be taken up again, and what is said of it at the end."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lm_train import folds
from lm_train.errors import DataError, UsageError
from lm_train.folds import train_folds
from lm_train.recipe import Recipe, load
from lm_train.runs import RunFolder, read_jsonl
from lm_train.slurm import current_allocation

WORDS = ("recipe=gpt_debug", "model={kind: mlp, widths: [8]}", "data={kind: images, folds: 3}")


def asked(runs_dir: Path, *words: str) -> Recipe:
    return load([*WORDS, f"runs_dir={runs_dir}", *words])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Stands for the training of a run: notes its recipe, and writes two validations."""
    found: list[Recipe] = []

    def train(recipe: Recipe, series: str) -> int:
        assert recipe.name == f"{series}-fold-{recipe.data.fold}"
        found.append(recipe)
        run = RunFolder(Path(recipe.runs_dir) / str(recipe.name))
        run.root.mkdir(parents=True, exist_ok=True)
        loss = recipe.data.fold**2 / 10
        rows = (
            {"step": 1, "val/loss": 9.0, "val/accuracy": 0.1},
            {"step": 2, "val/loss": loss, "val/accuracy": 0.5, "val/f1/a": 0.25, "val/f1_micro": 0.5},
            {"step": 2, "test/loss": 2 * loss},
        )
        run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 0

    monkeypatch.setattr(folds.launch, "train", train)
    return found


def test_each_fold_is_a_run_of_its_own(
    tmp_path: Path, trained: list[Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_folds(asked(tmp_path, "name=trial")) == 0
    assert [recipe.name for recipe in trained] == ["trial-fold-1", "trial-fold-2", "trial-fold-3"]
    assert [(recipe.data.folds, recipe.data.fold) for recipe in trained] == [(3, 1), (3, 2), (3, 3)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(tmp_path / "trial-folds.json")
    assert lines[0].split() == ["fold", "val/loss", "val/accuracy"]
    losses = [0.1, 0.4, 0.9]
    assert [line.split()[1] for line in lines[1:4]] == [f"{loss:.4f}" for loss in losses]
    mean, deviation = statistics.mean(losses), statistics.stdev(losses)
    assert lines[4].split() == ["mean", f"{mean:.4f}", "0.5000"]
    assert lines[5].split() == ["deviation", f"{deviation:.4f}", "0.0000"]
    content = json.loads(Path(lines[-1]).read_text())
    assert [fold["metrics"]["val/loss"] for fold in content["folds"]] == pytest.approx(losses)
    assert content["mean"]["val/loss"] == pytest.approx(mean)
    assert content["deviation"]["test/loss"] == pytest.approx(np.std([2 * loss for loss in losses], ddof=1))
    assert content["mean"]["val/f1/a"] == 0.25


def test_names_of_a_series_are_free_ones(tmp_path: Path, trained: list[Recipe]) -> None:
    (tmp_path / "gpt_debug-4").mkdir()
    for _ in range(2):
        train_folds(asked(tmp_path))
    assert [recipe.name for recipe in trained[::3]] == ["gpt_debug-5-fold-1", "gpt_debug-6-fold-1"]


@pytest.mark.parametrize("failure", [75, 66, DataError("rows.csv:3: bad")])
def test_a_fold_that_does_not_end_ends_the_series(
    failure: int | DataError,
    tmp_path: Path,
    trained: list[Recipe],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole: Callable[[Recipe, str], int] = folds.launch.train

    def until_second(recipe: Recipe, series: str) -> int:
        if recipe.data.fold < 2:
            return whole(recipe, series)
        if isinstance(failure, int):
            return failure
        raise failure

    monkeypatch.setattr(folds.launch, "train", until_second)
    if isinstance(failure, int):
        assert train_folds(asked(tmp_path, "name=trial")) == failure
    else:
        with pytest.raises(DataError):
            train_folds(asked(tmp_path, "name=trial"))
    out, err = capsys.readouterr()
    assert "fold 2 of 3 has not come to its end; the same command and name=trial goes on from there" in err
    assert out == ""
    assert not (tmp_path / "trial-folds.json").exists()
    assert len(trained) == 1


def test_a_fold_that_validated_nothing_is_named(
    tmp_path: Path, trained: list[Recipe], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole: Callable[[Recipe, str], int] = folds.launch.train

    def without_third(recipe: Recipe, series: str) -> int:
        code = whole(recipe, series)
        if recipe.data.fold == 3:
            RunFolder(tmp_path / str(recipe.name)).metrics.write_text('{"step": 1, "train/loss": 1.0}\n')
        return code

    monkeypatch.setattr(folds.launch, "train", without_third)
    with pytest.raises(DataError, match=r"fold 3 of 3 .*trial-fold-3\) has validated nothing"):
        train_folds(asked(tmp_path, "name=trial"))
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "trial-folds.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.limit_val_batches=0"], "validates nothing"),
        (["resume=tests"], "give data.fold"),
        (["data.fold=4"], "try data.fold=3"),
    ],
)
def test_contradictions_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        asked(tmp_path, *words)


def test_a_name_that_leaves_no_room(tmp_path: Path, trained: list[Recipe]) -> None:
    with pytest.raises(UsageError, match="too long"):
        train_folds(asked(tmp_path, f"name={'n' * 95}"))


def test_the_command_trains_every_fold_once(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "lm_train", "train", "recipe=gpt_debug", "model={kind: mlp, widths: [8]}"),
        *("data={kind: images, folds: 2, global_batch_size: 64}", "optim={kind: adamw, learning_rate: 1e-2}"),
        *("trainer={max_steps: 20, val_check_interval: null}", "tracking.wandb=disabled", "name=trial"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "runs/trial-folds.json"
    content = json.loads((tmp_path / "runs/trial-folds.json").read_text())
    samples, losses = [], []
    for fold in content["folds"]:
        run = RunFolder(tmp_path / "runs" / fold["run"])
        losses.append([row for row in read_jsonl(run.metrics) if "val/loss" in row][-1]["val/loss"])
        samples.append(json.loads((run.evaluation / "val.json").read_text())["samples"])
        assert run.outcome() == 0
    assert sum(samples) == 1797 - json.loads((run.evaluation / "test.json").read_text())["samples"]
    assert losses[0] != losses[1]
    assert content["mean"]["val/loss"] == pytest.approx(np.mean(losses))
    assert content["deviation"]["val/loss"] == pytest.approx(np.std(losses, ddof=1))
    (tmp_path / "runs/trial-folds.json").unlink()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0
    assert again.stderr.count("is finished already") == 2
    assert json.loads((tmp_path / "runs/trial-folds.json").read_text()) == content


@pytest.mark.parametrize("task", [0, 1])
def test_all_tasks_of_a_slurm_step_mean_the_same_runs(
    task: int,
    tmp_path: Path,
    trained: list[Recipe],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    environ = {
        "SLURM_JOB_ID": "41",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task),
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "ENVIRONMENT": "BATCH",
    }
    monkeypatch.setattr(folds, "current_allocation", lambda: current_allocation(environ))
    assert train_folds(asked(tmp_path)) == 0
    assert [recipe.name for recipe in trained] == [f"gpt_debug-41-fold-{i}" for i in (1, 2, 3)]
    out, err = capsys.readouterr()
    assert bool(out) == bool(err) == (task == 0)  # one task speaks and writes for all
    assert (tmp_path / "gpt_debug-41-folds.json").exists() == (task == 0)
