"""Cross-validation, `data.folds=K`: one run for each fold, then mean and deviation of what they validated. Free of torch."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_train import launch, runs
from lm_train.budget import Account
from lm_train.errors import DataError, ExitCode, LMTrainError, OutputError, UsageError
from lm_train.output import aligned
from lm_train.recipe import LabelledData, Recipe
from lm_train.runs import RunFolder
from lm_train.slurm import current_allocation
from lm_train.supervisor import say

LONGEST_NAME = 100
"""Of a run's folder, as the recipe's `name` has it."""
SPLITS = ("val/", "test/")


def number_of_folds(recipe: Recipe) -> int | None:
    """How many folds the recipe means, one after another; None where it means one run."""
    data = recipe.data
    return data.folds if isinstance(data, LabelledData) and data.fold is None else None


def train_folds(recipe: Recipe) -> int:
    """Trains each fold as an ordinary run, NAME-fold-1 to NAME-fold-K in `runs_dir`, and compares their last validations.

    A fold that is finished is not repeated, and one that was interrupted goes on: the same command with the same name
    takes a series up again. The comparison goes to standard output, and as JSON to NAME-folds.json beside the runs.

    Returns:
        DONE, or the exit code of the fold that did not come to its end; the folds behind it are not begun.

    Raises:
        LMTrainError: if a fold cannot be started.
    """
    folds, data = number_of_folds(recipe), recipe.data
    assert folds is not None
    allocation = current_allocation()
    leads = allocation is None or allocation.is_primary
    name = runs.run_name(recipe, allocation) or runs.claim_series(recipe, fold_name)
    if len(fold_name(name, folds)) > LONGEST_NAME:
        raise UsageError(f"name: {name} is too long for its folds' runs, NAME-fold-{folds}; give a shorter name=")
    for fold in range(1, folds + 1):
        if leads:
            say(f"fold {fold} of {folds}: {fold_name(name, fold)}")
        part = recipe.model_copy(update={"name": fold_name(name, fold), "data": data.model_copy(update={"fold": fold})})
        try:
            code = launch.train(part, series=name)
        except LMTrainError:
            with contextlib.suppress(OSError):  # claimed, and not begun
                (Path(recipe.runs_dir) / fold_name(name, 1)).rmdir()
            _say_how_to_go_on(name, fold, folds, leads)
            raise
        if (
            code == ExitCode.DONE
            and Account.read(RunFolder(Path(recipe.runs_dir) / fold_name(name, fold))).stopped_by_budget
        ):
            _say_how_to_go_on(name, fold, folds, leads)  # each fold has the budget to itself
            return code
        if code != ExitCode.DONE:
            _say_how_to_go_on(name, fold, folds, leads)
            return code
    if leads:
        _compare(Path(recipe.runs_dir), name, folds)
    return ExitCode.DONE


def fold_name(name: str, fold: int) -> str:
    """The run of a fold, from 1, in the series of that name."""
    return f"{name}-fold-{fold}"


def _say_how_to_go_on(name: str, fold: int, folds: int, leads: bool) -> None:
    if leads:
        say(f"fold {fold} of {folds} has not come to its end; the same command and name={name} goes on from there")


def _compare(runs_dir: Path, name: str, folds: int) -> None:
    """Prints the table, writes the file, and prints its name.

    Raises:
        DataError: if a fold has validated nothing; there is nothing to compare.
        OutputError: if it cannot be written.
    """
    found = [_last_evaluations(RunFolder(runs_dir / fold_name(name, fold))) for fold in range(1, folds + 1)]
    for fold, metrics in enumerate(found, 1):
        if not any(key.startswith("val/") for key in metrics):
            raise DataError(
                f"fold {fold} of {folds} ({runs_dir / fold_name(name, fold)}) has validated nothing, so that the folds cannot "
                "be compared; start the series anew with another name="
            )
    shared = [key for key in found[0] if all(key in metrics for metrics in found)]
    summary = {key: mean_and_deviation([metrics[key] for metrics in found]) for key in shared}
    for split in SPLITS:
        shown = [key for key in shared if key.startswith(split) and _is_shown(key)]
        if shown:
            rows = [("fold", *shown)]
            rows += [(str(i), *(f"{metrics[key]:.4f}" for key in shown)) for i, metrics in enumerate(found, 1)]
            rows += [
                (label, *(f"{summary[key][i]:.4f}" for key in shown)) for i, label in enumerate(("mean", "deviation"))
            ]
            print("\n".join(aligned(rows)))
    content: dict[str, Any] = {
        "name": name,
        "folds": [
            {"fold": i, "run": fold_name(name, i), "metrics": _as_json(metrics)} for i, metrics in enumerate(found, 1)
        ],
        "mean": _as_json({key: value[0] for key, value in summary.items()}),
        "deviation": _as_json({key: value[1] for key, value in summary.items()}),
    }
    file = runs_dir / f"{name}-folds.json"
    try:
        runs.write_atomically(file, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror}") from None
    print(file, flush=True)


def _last_evaluations(folder: RunFolder) -> dict[str, float]:
    """Metrics of the run's last validation, and of its test split where there is one."""
    last: dict[str, float] = {}
    for row in runs.read_jsonl(folder.metrics):
        last |= {key: float(value) for key, value in row.items() if key.startswith(SPLITS)}
    return last


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation of a sample (divided by n - 1)."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _is_shown(key: str) -> bool:
    """Not each class's own, nor the micro means, which equal the accuracy."""
    return key.count("/") == 1 and not key.endswith("_micro")


def _as_json(metrics: dict[str, float]) -> dict[str, float | str]:
    return {key: value if math.isfinite(value) else str(value) for key, value in metrics.items()}
