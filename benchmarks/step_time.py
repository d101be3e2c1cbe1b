"""Predicted against measured step time of CPU trainings after `lm-train calibrate`, and what choosing by it costs.

    python benchmarks/step_time.py measure [--rounds 2] [--only NAME ...] [--minutes M]     trains, adds rows to the raw file
    python benchmarks/step_time.py regret [--only NAME ...] [--minutes M]      tries every layout of three recipes
    python benchmarks/step_time.py making                                                   seconds until a value is in a batch
    python benchmarks/step_time.py report                                                   predicts, and writes the results

The rows are those of memory_list.py, frozen before anything was measured, and small ones besides (SMALL). Each is the whole
command, `lm-train train` with its processes, in the environment that a person has (glibc's allocator as it is). Rounds go through
all rows, the second one backwards; a row's figure is the median of its stretches of steps but the first. Raw figures
lie in results/step_time_cpu_raw.json, so that predictions can be made anew without measuring.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from memory import CLASSES, PIXELS, make_images, words_of
from memory_list import ROWS
from report import RESULTS, write_results

from lm_train.clusters import Cluster, find
from lm_train.data import build as build_data
from lm_train.data.loading import make_loader
from lm_train.hardware import this_machine
from lm_train.plan import DataFacts, Layout, known_facts, make_plan, parameter_shapes
from lm_train.plan.duration import time_of
from lm_train.plan.facts import with_assumptions
from lm_train.plan.network import sample_seconds
from lm_train.plan.plan import Plan
from lm_train.plan.prediction import TimePrediction
from lm_train.plan.rates import find_calibration, from_facts, rates_of
from lm_train.plan.work import work_of
from lm_train.recipe import ClusterSection, load, task_of
from lm_train.runs import RunFolder, read_jsonl

HERE = Path(__file__).resolve().parent
RAW = RESULTS / "step_time_cpu_raw.json"
SECONDS = 6.0
"""Of steps in one run, about."""
MOST_STEPS, STRETCHES = 240, 4
QUIET = (
    "trainer.val_check_interval=null",
    "trainer.limit_val_batches=0",
    "trainer.limit_test_batches=0",
    "trainer.sample_tokens=0",
    "trainer.max_tokens=null",
    "trainer.max_epochs=null",
    "checkpoint.every_n_steps=null",
    "tracking.wandb=disabled",
)
TEXT = "data={kind: embedded, tokenizer: bytes, global_batch_size: 16}"
SMALL = {
    "gpt_debug": ("recipe=gpt_debug",),
    "gpt_debug 2 processes": ("recipe=gpt_debug", "trainer.devices=2", "trainer.strategy=ddp"),
    "gpt_debug fsdp": ("recipe=gpt_debug", "trainer.devices=2", "trainer.strategy=fsdp"),
    "bert_debug": ("recipe=bert_debug",),
    "seq2seq_debug": ("recipe=seq2seq_debug",),
    "llama small": (
        "recipe=gpt_debug",
        "model={kind: llama, n_layer: 4, n_head: 4, n_embd: 128, block_size: 128}",
        TEXT,
    ),
    "lstm small": (
        "recipe=gpt_debug",
        "model={kind: recurrent, cell: lstm, n_layer: 1, n_embd: 128, hidden_size: 128, block_size: 64}",
        TEXT,
    ),
    "cnn_digits": ("recipe=cnn_digits",),
    "mlp_digits": ("recipe=mlp_digits",),
    "tabular_debug": ("recipe=tabular_debug",),
}
"""Recipes whose steps take milliseconds, where the loop and each operation's overhead count: the split `small`."""
SEARCHED = {
    "gpt_debug": ("recipe=gpt_debug",),
    "lstm": (
        "recipe=gpt_debug",
        "model={kind: recurrent, cell: lstm, n_layer: 2, n_embd: 192, hidden_size: 256, block_size: 128}",
        "data={kind: embedded, tokenizer: bytes, global_batch_size: 32}",
    ),
    "cnn_digits": ("recipe=cnn_digits",),
}
"""Recipes of which every layout is tried."""


def rows_to_measure(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Split and words of each row by name."""
    without = ("trainer.max_steps", "trainer.limit_val_batches", "trainer.log_every_n_steps")
    found = {
        row.name: (row.split, [w for w in words_of(row, folder) if w.partition("=")[0] not in without]) for row in ROWS
    }
    return found | {name: ("small", list(words)) for name, words in SMALL.items()}


def here() -> Cluster:
    return find(ClusterSection(), this_machine(), None)


def layouts(plan: Plan) -> Layout:
    return Layout(
        nodes=plan.nodes,
        devices=plan.devices,
        strategy=plan.strategy,
        precision=plan.precision,
        micro_batch_size=plan.micro_batch_size,
        accumulate_grad_batches=plan.accumulate_grad_batches,
        activation_checkpointing=plan.activation_checkpointing,
        cross_entropy_chunks=plan.cross_entropy_chunks,
        num_workers=plan.num_workers,
        compile=plan.compile,
        threads_per_rank=plan.threads_per_rank,
        accelerator=plan.accelerator,
    )


def predicted(words: Iterable[str], plan: Plan, calibrated: bool = True) -> TimePrediction:
    """Of the layout that was run, by the calibration or by the rules of thumb for this machine."""
    recipe, layout, cluster = load(list(words)), layouts(plan), here()
    facts = known_facts(recipe)
    if str(getattr(recipe.data, "path", "")).endswith("/images"):  # made by make_images
        facts = DataFacts(input_shape=(3, PIXELS, PIXELS), n_outputs=CLASSES)
    asked = getattr(recipe.model, "vocab_size", "auto")
    if isinstance(asked, int):
        facts = replace(facts, vocab_size=asked)
    facts, _ = with_assumptions(recipe, facts)
    task = task_of(recipe)
    shapes, work = parameter_shapes(recipe.model, task, facts), work_of(recipe.model, task, facts, layout)
    assert shapes is not None
    assert work is not None
    rates = rates_of(cluster, layout) if calibrated else from_facts(cluster, layout)
    return time_of(
        shapes,
        work,
        layout,
        recipe.optim,
        rates,
        log_every=recipe.trainer.log_every_n_steps,
        clips=recipe.trainer.gradient_clip_val is not None,
        sample_seconds=sample_seconds(recipe, facts, rates),
    )


def run(words: list[str], steps: int, folder: Path) -> dict[str, Any]:
    """One training: seconds of a step in each stretch but the first, and the plan that was followed."""
    every = max(1, steps // (STRETCHES + 1))
    words = [*QUIET, *words, f"trainer.max_steps={steps}", f"trainer.log_every_n_steps={every}"]
    keys = [word.partition("=")[0] for word in words]
    words = [w for i, w in enumerate(words) if keys[i] not in keys[i + 1 :]]  # the last of a key wins
    command = [sys.executable, "-m", "lm_train", "train", *words, f"runs_dir={folder}", "name=run"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    root = RunFolder(folder / "run")
    rows = [row for row in read_jsonl(root.metrics) if "perf/step_seconds" in row]
    late = [row for row in rows if row["step"] > every]
    return {
        "words": [word.replace(str(folder), "FOLDER") for word in words],
        "steps": steps,
        "seconds": [row["perf/step_seconds"] for row in late],
        "data_wait_seconds": [row["perf/data_wait_seconds"] for row in late],
        "wall_seconds": time.monotonic() - began,
        "plan": json.loads(root.plan.read_text()) | {"prediction": None},
    }


def steps_of(words: list[str], raw: dict[str, Any], name: str) -> int:
    """As many as fill `SECONDS`, by what was measured before, else by the rule of thumb."""
    if raw["rows"].get(name):
        each = statistics.median(raw["rows"][name][0]["seconds"])
    else:
        return 2 * (STRETCHES + 1) if "micro_batch_size" in " ".join(words) else 12 * (STRETCHES + 1)
    return max(2 * (STRETCHES + 1), min(MOST_STEPS, round(SECONDS / each / (STRETCHES + 1)) * (STRETCHES + 1)))


def read_raw() -> dict[str, Any]:
    if RAW.exists():
        return json.loads(RAW.read_text())
    file = find_calibration(here())
    if file is None:
        raise SystemExit("no calibration of this machine: lm-train calibrate first")
    return {
        "list_blake2b": hashlib.blake2b(
            (HERE / "memory_list.py").read_bytes() + repr((SMALL, SEARCHED)).encode(), digest_size=16
        ).hexdigest(),
        "rows": {},
        "regret": {},
    }


def write_raw(raw: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    RAW.write_text(json.dumps(raw) + "\n")


def measure(rounds: int, only: list[str] | None, minutes: float) -> None:
    raw, until = read_raw(), time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        make_images(place)
        todo = rows_to_measure(place)
        names = [name for name in todo if not only or name in only]
        for turn in range(rounds):
            for name in names if turn % 2 == 0 else reversed(names):
                done = raw["rows"].setdefault(name, [])
                if len(done) > turn:
                    continue
                if time.monotonic() > until:
                    raise SystemExit("out of minutes; the same command goes on")
                words = todo[name][1]
                with tempfile.TemporaryDirectory() as folder:
                    found = run(words, steps_of(words, raw, name), Path(folder))
                found["words"] = [word.replace(str(place), "FOLDER") for word in found["words"]]
                done.append(found)
                write_raw(raw)
                print(f"{name:<32} {statistics.median(found['seconds']) * 1e3:10.1f} ms", flush=True)


def regret(only: list[str] | None, minutes: float) -> None:
    """Throughput of every layout of the searched recipes, one after another."""
    raw, until = read_raw(), time.monotonic() + 60 * minutes
    for name, words in SEARCHED.items():
        if only and name not in only:
            continue
        total = load(list(words)).data.global_batch_size
        assert isinstance(total, int)
        tried = raw["regret"].setdefault(name, {})
        recurrent = "recurrent" in " ".join(words)
        transformer = "gpt" in name
        choices = product((1, 2), (total // 8, total // 4, total // 2, total), ("none", "full"), (1, 4))
        for ranks, micro, checkpointing, chunks in choices:
            if micro * ranks > total or total % (micro * ranks):
                continue
            if (checkpointing != "none" and not transformer) or (chunks > 1 and not (transformer or recurrent)):
                continue
            layout = [
                f"trainer.devices={ranks}",
                f"trainer.strategy={'ddp' if ranks > 1 else 'single'}",
                f"data.micro_batch_size={micro}",
                f"trainer.accumulate_grad_batches={total // ranks // micro}",
                f"trainer.activation_checkpointing={checkpointing}",
                f"trainer.cross_entropy_chunks={chunks}",
                "trainer.precision=32-true",
            ]
            key = f"{ranks} x {micro}, recomputed {checkpointing}, {chunks} chunks"
            if key in tried:
                continue
            if time.monotonic() > until:
                raise SystemExit("out of minutes; the same command goes on")
            with tempfile.TemporaryDirectory() as folder:
                tried[key] = run([*words, *layout], 30, Path(folder))
            write_raw(raw)
            print(f"{name}: {key:<40} {statistics.median(tried[key]['seconds']) * 1e3:9.1f} ms", flush=True)


def making() -> None:
    """Core seconds of one value of an augmented image, and of one token of running text, until it is in a batch."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        make_images(place)
        images = f"data={{kind: images, path: {place / 'images'}, global_batch_size: 64, crop: 4, flip: true, num_workers: 0}}"
        for name, words in {"value": ("recipe=resnet_cifar10", images), "token": ("recipe=gpt_debug", TEXT)}.items():
            recipe = load([*words, "trainer.max_steps=1000000"])
            plan = make_plan(recipe, this_machine())
            folder = RunFolder(place / name)
            folder.root.mkdir()
            data = build_data(recipe.data, plan, recipe.seed, folder)
            data.prepare(recipe.model)
            batches = iter(make_loader(data.train_batches(0), plan, 0))
            sizes = [max(part.numel() for part in next(batches).values() if isinstance(part, torch.Tensor))]
            began = time.process_time()
            while time.process_time() - began < 3:
                sizes.append(max(part.numel() for part in next(batches).values() if isinstance(part, torch.Tensor)))
            each = (time.process_time() - began) / sum(sizes[1:])
            print(f"{name:<8} {each * 1e9:.1f} ns in batches of {sizes[0]:,}")


def result_rows(raw: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    splits = {row.name: row.split for row in ROWS} | dict.fromkeys(SMALL, "small")
    for name, runs in raw["rows"].items():
        plan = Plan.model_validate(runs[0]["plan"])
        found, plain = (predicted(runs[0]["words"], plan, calibrated) for calibrated in (True, False))
        medians = [statistics.median(each["seconds"]) for each in runs]
        seconds = statistics.median(medians)
        rows.append(
            {
                "name": name,
                "split": splits[name],
                "strategy": plan.strategy,
                "ranks": plan.world_size,
                "measured": seconds,
                "runs": medians,
                "predicted": found.seconds,
                "parts": found.model_dump(exclude={"source", "relative_error"}),
                "inside_interval": seconds in found.interval,
                "error": found.seconds / seconds - 1,
                "error_rules_of_thumb": plain.seconds / seconds - 1,
            }
        )
    return rows


def summary(rows: list[dict[str, Any]], key: str = "error") -> dict[str, float]:
    errors = [row[key] for row in rows]
    sizes = sorted(map(abs, errors))
    return {
        "rows": len(rows),
        "mean_signed": statistics.mean(errors),
        "mean": statistics.mean(sizes),
        "median": statistics.median(sizes),
        "p95": sizes[round(0.95 * (len(sizes) - 1))],
        "worst": sizes[-1],
        "inside_interval": statistics.mean(row["inside_interval"] for row in rows),
    }


def regret_rows(raw: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name, tried in raw["regret"].items():
        measured = {key: statistics.median(each["seconds"]) for key, each in tried.items()}
        foretold = {
            key: predicted(each["words"], Plan.model_validate(each["plan"])).seconds for key, each in tried.items()
        }
        chosen, best = min(foretold, key=foretold.__getitem__), min(measured, key=measured.__getitem__)
        found.append(
            {
                "recipe": name,
                "layouts": len(tried),
                "chosen": chosen,
                "best": best,
                "lost_throughput": 1 - measured[best] / measured[chosen],
                "worst_layout_loses": 1 - measured[best] / max(measured.values()),
                "measured": measured,
                "predicted": foretold,
            }
        )
    return found


def report() -> None:
    raw = read_raw()
    rows = result_rows(raw)
    names = list(dict.fromkeys(row["split"] for row in rows))
    splits = {name: summary([row for row in rows if row["split"] == name]) for name in names}
    held_out = [row for row in rows if row["split"] != "calibration"]
    repeated = [abs(row["runs"][0] / row["runs"][1] - 1) for row in rows if len(row["runs"]) > 1]
    result = {
        "list_blake2b": raw["list_blake2b"],
        "calibration": here().device.name if find_calibration(here()) else None,
        "splits": splits,
        "held_out": summary(held_out) if held_out else None,
        "rules_of_thumb": summary(held_out, "error_rules_of_thumb") if held_out else None,
        "noise": {"rows": len(repeated), "median": statistics.median(repeated), "worst": max(repeated)}
        if repeated
        else None,
        "regret": regret_rows(raw),
        "rows": rows,
    }
    write_results("step_time", result, "step_time_cpu")
    (RESULTS / "step_time_cpu.md").write_text(page(result), encoding="utf-8")
    print(page(result))


def page(result: dict[str, Any]) -> str:
    lines = [
        "# Step time of CPU processes: predicted and measured",
        "",
        "Milliseconds of an optimizer step of `lm-train train`, after `lm-train calibrate` on the same machine. By",
        f"benchmarks/step_time.py; the list of rows was frozen before measuring (BLAKE2b {result['list_blake2b']}).",
        "No constant is fitted to these rows. After they had been measured once, `calibrate` learned to time larger recurrent",
        "layers and to count their steps one by one (lstm, gru and rnn in one process were 2 to 10 times off before), and the",
        "interval was set by them.",
        "`lstm classes`: its texts are shorter than model.block_size, which nobody knows before the data are read.",
        "",
        "| split | rows | mean signed | mean | median | p95 | worst | in the interval |",
        "|---|---|---|---|---|---|---|---|",
    ]
    summaries = result["splits"] | {"held out": result["held_out"], "held out, uncalibrated": result["rules_of_thumb"]}
    for name, s in summaries.items():
        if s is not None:
            figures = " | ".join(f"{s[key]:.1%}" for key in ("mean", "median", "p95", "worst"))
            lines.append(f"| {name} | {s['rows']} | {s['mean_signed']:+.1%} | {figures} | {s['inside_interval']:.0%} |")
    if result["noise"]:
        noise = result["noise"]
        twice = f"{noise['median']:.1%} (median of {noise['rows']}), {noise['worst']:.1%} at worst"
        lines += ["", f"The same row measured twice differs by {twice}."]
    if result["regret"]:
        lines += [
            "",
            "Throughput that the layout with the shortest predicted step loses against the best of all that were tried:",
            "",
            "| recipe | layouts | chosen | best | lost | the worst layout loses |",
            "|---|---|---|---|---|---|",
        ]
    for r in result["regret"]:
        lost = f"{r['lost_throughput']:.1%} | {r['worst_layout_loses']:.1%}"
        lines.append(f"| {r['recipe']} | {r['layouts']} | {r['chosen']} | {r['best']} | {lost} |")
    names = ("compute", "communication", "optimizer", "host")
    lines += ["", f"| row | split | measured | predicted | error | {' | '.join(names)} |", "|---" * 9 + "|"]
    for row in result["rows"]:
        parts = " | ".join(f"{row['parts'][part] * 1e3:,.1f}" for part in names)
        times = f"{row['measured'] * 1e3:,.1f} | {row['predicted'] * 1e3:,.1f} | {row['error']:+.1%}"
        lines.append(f"| {row['name']} | {row['split']} | {times} | {parts} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("measure", "regret", "making", "report"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="names of rows, or of recipes")
    parser.add_argument("--minutes", type=float, default=1e9, help="begins no run after so many")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.pop("OMP_NUM_THREADS", None)  # the plan's own number
    match options.do:
        case "measure":
            measure(options.rounds, options.only, options.minutes)
        case "regret":
            regret(options.only, options.minutes)
        case "making":
            making()
        case "report":
            report()


if __name__ == "__main__":
    main()
