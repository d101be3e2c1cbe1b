"""The end of a classification's run: tables on standard output, files, a picture, and W&B's copy of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

from lm_train import data, runs
from lm_train.checkpoint import CheckpointReader, views_of
from lm_train.hardware import Machine
from lm_train.metrics import ClassScores
from lm_train.metrics.drawing import draw_confusion
from lm_train.models import build
from lm_train.plan import Plan, make_plan
from lm_train.recipe import load
from lm_train.runs import RunFolder, read_jsonl
from lm_train.train import train
from tests.digits import DigitsData
from tests.test_tracking import history, records

WORDS = (
    "recipe=gpt_debug",
    "model={kind: mlp, widths: [16]}",
    "data={kind: images, global_batch_size: 32}",
    "optim={kind: adamw, learning_rate: 1e-2, schedule: constant}",
    "trainer={max_steps: 30, val_check_interval: 10, log_every_n_steps: 10}",
)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def digits_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunFolder]:
    monkeypatch.setattr(data, "build", lambda section, plan, seed, folder: DigitsData(plan, seed))

    def make(*words: str) -> RunFolder:
        given = [*WORDS, "name=digits", f"runs_dir={tmp_path}", *words]
        recipe = load(given)
        return runs.create(recipe, make_plan(recipe, Machine(cpu_cores=2, gpus=())))

    return make


def shown(text: str) -> list[str]:
    """The tables of each split."""
    return [part.partition("--- end of evaluation ---")[0] for part in text.split("--- evaluation: ")[1:]]


def predictions_of(run: RunFolder, split: Any) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and what the saved network says in a bare loop."""
    recipe, plan = load([f"recipe={run.recipe}"]), Plan.read(run.plan)
    net = build(recipe.model, plan, DigitsData.facts)
    checkpoint = runs.latest_checkpoint(run)
    assert checkpoint is not None
    CheckpointReader(checkpoint).load(views_of(net, None, 0, 1))
    digits = DigitsData(plan, 0)
    digits.prepare(None)
    rows = digits.samples[split]
    with torch.no_grad():
        return rows.labels.numpy(), net(inputs=rows.inputs).argmax(1).numpy()


def test_tables_files_and_picture(digits_run: Callable[..., RunFolder], capsys: pytest.CaptureFixture[str]) -> None:
    run = digits_run("tracking.wandb=disabled")
    train(run)
    out, err = capsys.readouterr()
    rows = list(read_jsonl(run.metrics))
    for split, table, size in zip(("val", "test"), shown(out), (197, 203), strict=True):
        content = json.loads((run.evaluation / f"{split}.json").read_text())
        expected = confusion_matrix(*predictions_of(run, split))
        assert content["confusion"] == expected.tolist()
        assert (content["step"], content["samples"]) == (30, size)
        row = [row for row in rows if f"{split}/loss" in row][-1]
        assert row[f"{split}/accuracy"] == pytest.approx(expected.trace() / size)
        for name in ("loss", "accuracy", "precision_macro", "f1_macro", "f1_micro"):
            assert content[name] == pytest.approx(row[f"{split}/{name}"])
        assert [c["f1"] for c in content["classes"]] == pytest.approx(
            [row[f"{split}/f1/{n}"] for n in DigitsData.class_names]
        )
        assert f"{split} split, {size} samples, step 30" in table
        lines = table.splitlines()
        seven = next(line.split() for line in lines if line.startswith("seven"))
        assert seven == [
            "seven",
            *(f"{content['classes'][7][k]:.4f}" for k in ("precision", "recall", "f1")),
            str(expected[7].sum()),
        ]
        matrix = [line.split()[1:] for line in lines[-10:]]
        assert np.array(matrix, dtype=int).tolist() == expected.tolist()
        picture = run.evaluation / f"confusion_{split}.png"
        assert picture.read_bytes().startswith(PNG)
    assert err.count("accuracy") >= 4  # three validations and the test
    assert "f1 macro 0." in err


def test_a_run_that_is_resumed_after_its_last_step(
    digits_run: Callable[..., RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    run = digits_run("tracking.wandb=disabled")
    train(run)
    tables = shown(capsys.readouterr().out)
    train(run, runs.latest_checkpoint(run))
    assert shown(capsys.readouterr().out) == tables
    runs.write_atomically(
        run.metrics, "".join(json.dumps(row) + "\n" for row in read_jsonl(run.metrics) if row["step"] < 30)
    )
    for file in run.evaluation.iterdir():  # ended between the last step and its validation
        file.unlink()
    train(run, runs.latest_checkpoint(run))
    assert shown(capsys.readouterr().out) == tables
    assert len(list(run.evaluation.glob("*.png"))) == 2


def test_wandb_gets_table_and_picture(digits_run: Callable[..., RunFolder]) -> None:
    run = digits_run("tracking.wandb=offline", "trainer.max_steps=10")
    train(run)
    logged: dict[str, dict[str, Any]] = {}
    for record in records(run):
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                if len(item.nested_key) == 2:
                    name, key = item.nested_key
                    logged.setdefault(name, {})[key] = json.loads(item.value_json)
    for split in ("val", "test"):
        picture, table = logged[f"{split}/confusion"], logged[f"{split}/classes"]
        files = run.root / "wandb"
        saved = next(files.glob(f"offline-run-*/files/{picture['filenames'][0]}"))
        assert saved.read_bytes() == (run.evaluation / f"confusion_{split}.png").read_bytes()
        content = json.loads(next(files.glob(f"offline-run-*/files/{table['path']}")).read_text())
        assert content["columns"] == ["class", "precision", "recall", "f1", "samples"]
        expected = json.loads((run.evaluation / f"{split}.json").read_text())
        assert [row[3] for row in content["data"]] == [c["f1"] for c in expected["classes"]]
    assert any("val/f1/seven" in row for row in history(records(run)))


@pytest.mark.parametrize("n_classes", [1, 2, 20, 90])
def test_pictures_of_any_number_of_classes(n_classes: int, tmp_path: Path) -> None:
    matrix = np.full((n_classes, n_classes), 3) + np.diag(np.full(n_classes, 12345))
    scores = ClassScores.of([f"a class of $ome length, {i}" for i in range(n_classes)], matrix)
    draw_confusion(scores, tmp_path / "picture.png", "title_with_$")
    image = Image.open(tmp_path / "picture.png").convert("RGB")
    assert max(image.size) <= 2500
    dark = np.asarray(image).astype(int)[..., 0] < 60
    assert dark.sum() > 0.2 * dark.size / n_classes / 2  # the diagonal
    assert len(scores.text().splitlines()) <= 50
    assert max(map(len, scores.text().splitlines())) <= 200
