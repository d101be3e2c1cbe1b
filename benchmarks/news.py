"""Sorting news: the shipped recurrent networks beside TF-IDF with logistic regression, on the same split.

    python benchmarks/news.py FOLDER [seeds] [recipe ...]

FOLDER has train and test files with the columns text and label. The linear model (scikit-learn's defaults but for C=10) sees
the whole training file and whole articles; a network trains on nine tenths of it, and sees max_length tokens. Recipes are
trained whole by their own command.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from report import write_results
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from lm_train.data.rows import open_rows

RECIPES = ("lstm_news", "gru_news")


def linear(folder: str) -> dict[str, float]:
    source = open_rows(folder)
    rows = {split: [row for row, _ in source.splits[split]()] for split in ("train", "test")}  # type: ignore[index]
    texts = {split: [row["text"] for row in some] for split, some in rows.items()}
    labels = {split: [row["label"] for row in some] for split, some in rows.items()}
    began = time.perf_counter()
    model = make_pipeline(TfidfVectorizer(stop_words="english", min_df=2), LogisticRegression(C=10, max_iter=2000))
    model.fit(texts["train"], labels["train"])
    seconds = time.perf_counter() - began
    return {"test_accuracy": model.score(texts["test"], labels["test"]), "seconds": seconds}


def trained(recipe: str, folder: str, seed: int, runs: Path) -> dict[str, float]:
    name = f"{recipe}-{seed}"
    words = [f"recipe={recipe}", f"data.path={folder}", f"seed={seed}", f"name={name}", f"runs_dir={runs}"]
    began = time.perf_counter()
    command = [sys.executable, "-m", "lm_train", "train", *words, "tracking.wandb=disabled"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    rows = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    (test,) = [row for row in rows if "test/accuracy" in row]
    return {"seed": seed, "test_accuracy": test["test/accuracy"], "test_loss": test["test/loss"], "seconds": seconds}


def main() -> None:
    folder = str(Path(sys.argv[1]).resolve())
    seeds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    recipes = sys.argv[3:] or RECIPES
    arms = {"TF-IDF, logistic regression": [linear(folder)]}
    with tempfile.TemporaryDirectory() as runs:
        for recipe in recipes:
            arms[recipe] = []
            for seed in range(seeds):
                arms[recipe].append(trained(recipe, folder, seed, Path(runs)))
                print(recipe, json.dumps(arms[recipe][-1]), file=sys.stderr, flush=True)
    print(f"{'':<30} {'test accuracy':>14} {'lowest':>8} {'seconds':>8}")
    means = {}
    for arm, rows in arms.items():
        accuracies = [row["test_accuracy"] for row in rows]
        means[arm] = statistics.mean(accuracies)
        seconds = statistics.mean(row["seconds"] for row in rows)
        print(f"{arm:<30} {means[arm]:>14.2%} {min(accuracies):>8.2%} {seconds:>8.0f}")
    result = {"scikit-learn": metadata.version("scikit-learn"), "rows": arms, "mean_test_accuracy": means}
    write_results("news", result)


if __name__ == "__main__":
    main()
