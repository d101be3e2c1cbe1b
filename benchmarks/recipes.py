"""What the shipped recipes reach: each trained whole by its own command, with several seeds.

    python benchmarks/recipes.py DATA [recipe ...] [seeds=3] [threads=2] [key=value ...]

DATA is a folder with the data sets that the recipes name (mnist, fashion-mnist, cifar10, bbc_news, tinyshakespeare); without
recipes all of TARGETS run. The metric is that of the whole test split after the last step (of the validation split, where
there is no test split). Results are added to benchmarks/results/recipes.json, recipe by recipe.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from report import RESULTS, write_results


class Target(NamedTuple):
    """What a recipe is measured by."""

    metric: str
    at_least: float | None
    """What the mean should reach; None where the figure only stands beside others."""
    data: str = ""
    """Folder or file below DATA; empty for the embedded default."""
    seeds: int = 3


TARGETS = {
    "cnn_digits": Target("test/accuracy", 0.98),
    "mlp_digits": Target("test/accuracy", None),
    "tabular_debug": Target("test/accuracy", None),
    "mlp_mnist": Target("test/accuracy", 0.982, "mnist"),
    "mlp_fashion": Target("test/accuracy", 0.89, "fashion-mnist"),
    "cnn_mnist": Target("test/accuracy", 0.99, "mnist"),
    "cnn_cifar10": Target("test/accuracy", 0.70, "cifar10", seeds=1),
    "resnet_cifar10": Target("test/accuracy", 0.90, "cifar10", seeds=1),
    "lstm_news": Target("test/accuracy", 0.95, "bbc_news"),
    "gru_news": Target("test/accuracy", None, "bbc_news"),
    "bert_news": Target("test/accuracy", None, "bbc_news"),
    "lstm_lm": Target("val/loss", None, "tinyshakespeare"),
    "gpt_char": Target("val/loss", None, "tinyshakespeare"),
    "bert_debug": Target("val/accuracy", None),
    "seq2seq_debug": Target("test/exact_match", 0.99),
    "hf_gpt2": Target("val/loss", None, seeds=1),
}


def run(recipe: str, target: Target, data: Path, seed: int, threads: int, words: list[str]) -> dict[str, Any]:
    """Trains once; the last row of every metric of validation and test, and what the training waited for its data."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lm_train", "train", f"recipe={recipe}", f"seed={seed}", "name=run"]
        command += [f"runs_dir={folder}", "tracking.wandb=disabled", *words]
        if target.data:
            path = data / target.data
            (*texts,) = path.glob("input.txt")
            command.append(f"data.path={texts[0] if texts else path}")
        began = time.perf_counter()
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
        )
        seconds = time.perf_counter() - began
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "train/loss" in row]
    evaluated: dict[str, float] = {}
    for row in rows:
        evaluated |= {name: value for name, value in row.items() if name.startswith(("val/", "test/"))}
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "steps": training[-1]["step"],
        "epochs": round(training[-1]["epoch"], 2),
        "median_step_seconds": statistics.median(row["perf/step_seconds"] for row in training),
        "median_data_wait_seconds": statistics.median(row["perf/data_wait_seconds"] for row in training),
        "peak_memory_bytes": training[-1]["memory/peak_bytes"],
        **{name: value for name, value in evaluated.items() if name.count("/") == 1},
    }


def main() -> None:
    data = Path(sys.argv[1]).resolve()
    options = {"seeds": 0, "threads": os.cpu_count() or 1}
    recipes, words = [], []
    for word in sys.argv[2:]:
        key, equals, value = word.partition("=")
        if key in options and equals:
            options[key] = int(value)
        elif equals:
            words.append(word)
        else:
            recipes.append(word)
    file = RESULTS / "recipes.json"
    results = json.loads(file.read_text())["result"] if file.exists() else {}
    for recipe in recipes or TARGETS:
        target = TARGETS[recipe]
        rows = []
        for seed in range(options["seeds"] or target.seeds):
            rows.append(run(recipe, target, data, seed, options["threads"], words))
            print(recipe, json.dumps(rows[-1]), flush=True)
        mean = statistics.mean(row[target.metric] for row in rows)
        wanted = "" if target.at_least is None else f"  (wanted: {target.at_least})"
        print(f"{recipe}: mean {target.metric} {mean:.4f} of {len(rows)} seeds{wanted}", flush=True)
        results[recipe] = {
            "metric": target.metric,
            "at_least": target.at_least,
            "mean": mean,
            "words": words,
            "threads": options["threads"],
            "rows": rows,
        }
        write_results("recipes", results)


if __name__ == "__main__":
    main()
