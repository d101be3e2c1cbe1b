"""Metrics of a classification against scikit-learn and torchmetrics, over uneven batches and several processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    log_loss,
    mean_squared_error,
    precision_recall_fscore_support,
    r2_score,
)
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from lm_train.hardware import Machine
from lm_train.metrics import ClassCounts, ClassScores, counts
from lm_train.modules import Regression
from lm_train.plan import make_plan
from lm_train.recipe import load
from tests.pair import Pair

N_CLASSES = 7
N = 43
"""Divides neither by the batch nor by the processes."""
MEANS = ("precision", "recall", "f1")


@pytest.fixture(scope="module")
def predictions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """Logits and labels in which class 4 has no samples, class 5 is never predicted, and class 6 is neither."""
    draw = np.random.default_rng(0)
    labels = draw.choice([0, 1, 2, 3, 5], size=N, p=[0.4, 0.3, 0.1, 0.1, 0.1])
    logits = draw.normal(size=(N, N_CLASSES))
    logits[np.arange(N), labels] += 1.5
    logits[:, 5:] -= 20
    logits = logits.astype(np.float32)
    assert (logits.argmax(1) == 4).any()
    file = tmp_path_factory.mktemp("predictions") / "given.npz"
    np.savez(file, logits=logits, labels=labels)
    return file, logits, labels


def by_scikit_learn(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    predicted = logits.argmax(1)
    found = {"accuracy": accuracy_score(labels, predicted)}
    for average in ("macro", "micro"):
        scores = precision_recall_fscore_support(labels, predicted, average=average, zero_division=0)
        found |= {f"{name}_{average}": score for name, score in zip(MEANS, scores[:3], strict=True)}
    scores = precision_recall_fscore_support(labels, predicted, labels=range(N_CLASSES), zero_division=0)
    for name, values in zip(MEANS, scores[:3], strict=True):
        found |= {f"{name}/class {i}": value for i, value in enumerate(values)}
    shares = np.exp(logits.astype(np.float64))
    found["loss"] = log_loss(labels, shares / shares.sum(1, keepdims=True), labels=range(N_CLASSES))
    return {f"val/{name}": float(value) for name, value in found.items()}


@pytest.mark.parametrize(
    ("strategy", "size", "micro"), [("ddp", 1, 5), ("ddp", 2, 5), ("fsdp", 2, 5), ("ddp", 2, 40), ("ddp", 2, 1)]
)
def test_equal_to_scikit_learn_over_uneven_splits(
    strategy: str, size: int, micro: int, predictions: Any, ranks: Callable[..., Pair]
) -> None:
    file, logits, labels = predictions
    answers = ranks(strategy, size).run(
        "evaluate_logits", file=str(file), strategy=strategy if size > 1 else "single", micro_batch_size=micro
    )
    for answer in answers:
        assert answer["metrics"] == pytest.approx(by_scikit_learn(logits, labels), abs=1e-6)
        assert answer["confusion"] == confusion_matrix(labels, logits.argmax(1), labels=range(N_CLASSES)).tolist()
        assert answer["collectives"] == (size > 1)  # one for all metrics
        assert answer["saved"] == answer["parameters"] == ["net.weight"]


def test_samples_that_fill_up_a_batch_would_be_seen(predictions: Any, ranks: Callable[..., Pair]) -> None:
    file, logits, labels = predictions
    arguments = {"file": str(file), "strategy": "ddp", "micro_batch_size": 5}
    answer = ranks("ddp").run("evaluate_logits", **arguments, fault=True)[0]
    expected = by_scikit_learn(logits, labels)
    assert abs(answer["metrics"]["val/accuracy"] - expected["val/accuracy"]) > 1e-3
    assert np.sum(answer["confusion"]) == 50


def scores_of(logits: torch.Tensor, labels: torch.Tensor) -> ClassScores:
    n_classes = logits.shape[1]
    counted = ClassCounts(n_classes)
    for part in torch.arange(len(labels)).split(16):
        counted.update(logits[part], labels[part])
    return ClassScores.of([str(i) for i in range(n_classes)], counted.compute().numpy())


@pytest.mark.parametrize("n_classes", [2, 3, 12])
def test_equal_to_torchmetrics(n_classes: int) -> None:
    torch.manual_seed(n_classes)
    logits, labels = torch.randn(50, n_classes), torch.randint(max(2, n_classes - 2), (50,))
    scores = scores_of(logits, labels)
    assert scores.confusion is not None
    torch.testing.assert_close(
        torch.from_numpy(scores.confusion), multiclass_confusion_matrix(logits, labels, n_classes)
    )
    references = (multiclass_precision, multiclass_recall, multiclass_f1_score)
    for name, reference in zip(MEANS, references, strict=True):
        ours = getattr(scores, name)
        assert ours == pytest.approx(reference(logits, labels, n_classes, average=None).numpy(), abs=1e-6)
        for average in ("macro", "micro"):
            expected = float(reference(logits, labels, n_classes, average=average))
            assert scores.metrics()[f"{name}_{average}"] == pytest.approx(expected, abs=1e-6)
    expected = float(multiclass_accuracy(logits, labels, n_classes, average="micro"))
    assert scores.accuracy == pytest.approx(expected, abs=1e-6)


def test_many_classes_are_counted_without_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 30), torch.randint(28, (200,))
    logits[torch.arange(200), labels] += 1
    whole = scores_of(logits, labels)
    monkeypatch.setattr(counts, "MOST_CLASSES", 29)
    short = scores_of(logits, labels)
    assert short.confusion is None
    assert short.metrics() == whole.metrics()
    assert not any("/" in name for name in short.metrics())
    assert short.text() == whole.text().partition("\n\nmost confused")[0]


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_counts_stay_whole_numbers_whatever_the_precision(cast: str) -> None:
    counted = ClassCounts(3)
    module = torch.nn.ModuleList([counted])
    getattr(module, cast)()
    module.to(torch.bfloat16)
    counted.update(torch.eye(3, dtype=torch.bfloat16).repeat(300, 1), torch.arange(3).repeat(300))
    assert counted.compute().tolist() == [[300, 0, 0], [0, 300, 0], [0, 0, 300]]
    assert counted.cells.dtype == torch.int64


def test_a_file_holds_everything(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scores = scores_of(torch.randn(50, 4), torch.randint(4, (50,)))
    scores.write(tmp_path / "val.json", split="val", step=7)
    content = json.loads((tmp_path / "val.json").read_text())
    assert (content["split"], content["step"], content["samples"]) == ("val", 7, 50)
    again = ClassScores.read(content)
    assert again.metrics() == scores.metrics()
    assert again.text() == scores.text()


def test_class_names_that_are_no_names_of_metrics() -> None:
    scores = ClassScores.of(("a/b", "a_b", ""), np.eye(3, dtype=np.int64))
    assert [name for name in scores.metrics() if name.startswith("f1/")] == ["f1/a_b", "f1/a_b_1", "f1/_"]


def test_sums_of_squares_keep_their_precision_where_the_module_is_cast() -> None:
    recipe = load(["recipe=gpt_debug"])
    plan = make_plan(recipe, Machine(cpu_cores=1, gpus=()))
    module = Regression(torch.nn.Identity(), recipe.optim, plan, 0, (1.0,))
    module.predictions = lambda batch: batch["inputs"]  # type: ignore[method-assign]
    module.to(torch.bfloat16)
    torch.manual_seed(0)
    inputs = torch.randn(1000, 1)
    targets = inputs + 0.1 * torch.randn(1000, 1)
    module.start_evaluation()
    module.evaluate({"inputs": inputs, "targets": targets, "valid": torch.ones(1000, dtype=torch.bool)})
    found = module.evaluation("val")
    assert float(found["mse"]) == pytest.approx(mean_squared_error(targets, inputs), abs=1e-6)
    assert float(found["r2"]) == pytest.approx(r2_score(targets, inputs), abs=1e-6)
