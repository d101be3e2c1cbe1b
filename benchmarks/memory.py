"""Predicted against measured peak memory of real trainings on CPU processes.

    python benchmarks/memory.py [--only NAME ...] [--resume FILE] [--publish] [--out NAME]

Each row of memory_list.py is the whole command, `lm-train train` with its processes, for four optimizer steps, a validation and
a checkpoint. Measured is the highest resident memory of the rank with most (VmHWM, set back as the training starts) less what
the process had just before its network was built; predicted is `lm_train.plan.footprint.memory_of` less the bare process that
it counts. glibc is told to give back what is freed, as the memory of a process is otherwise a matter of its history:
MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=0 MALLOC_ARENA_MAX=1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from memory_list import REPEATED, ROWS, Row
from PIL import Image
from report import RESULTS, write_results

from lm_train.clusters import Cluster, Device, Link
from lm_train.plan import DataFacts, Layout, known_facts, parameter_count, parameter_shapes
from lm_train.plan.footprint import BARE_PROCESS, CPU_RUNTIME, DEEPSPEED, Copies, memory_of
from lm_train.plan.plan import Plan
from lm_train.plan.prediction import MemoryPrediction
from lm_train.plan.work import work_of
from lm_train.recipe import load, task_of

HERE = Path(__file__).resolve().parent
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
STEPS = 4
FIRST_ERRORS = {
    "gpt_a zero3": 0.0751,
    "gpt_b zero3 bf16": 0.0630,
    "llama zero3 accumulated": 0.0783,
    "gpt_a ddp accumulated bf16": -0.1270,
}
"""Of rows that showed a fault of the formulas: the error before its cause was found in the libraries' sources and put right
(ZeRO-3's flat copy ends with its last parameter; under ddp all but the last micro batch make gradients beside the buckets)."""
PIXELS, CLASSES, IMAGES_OF_A_CLASS = 64, 10, 100


def words_of(row: Row, folder: Path) -> list[str]:
    """Everything fixed, so that the scheduler has nothing to decide."""
    total = row.micro_batch_size * row.ranks * row.accumulate
    kind = {
        "text": "kind: embedded, tokenizer: bytes",
        "images": f"kind: images, path: {folder / 'images'}",
        "classes": "kind: text_classes, tokenizer: bytes, max_length: 256",
    }[row.data]
    fixed = [
        "optim={kind: adamw}",
        "trainer.precision=32-true",
        "trainer.activation_checkpointing=none",
        "trainer.cross_entropy_chunks=1",
    ]
    keys = {word.split("=")[0] for word in row.words}
    return [
        "recipe=gpt_debug",
        row.model,
        f"data={{{kind}, global_batch_size: {total}, micro_batch_size: {row.micro_batch_size}, num_workers: 0}}",
        f"trainer.strategy={row.strategy}",
        f"trainer.devices={row.ranks}",
        f"trainer.accumulate_grad_batches={row.accumulate}",
        *(word for word in fixed if word.split("=")[0] not in keys),
        f"trainer.max_steps={STEPS}",
        "trainer.limit_val_batches=1",
        "trainer.limit_test_batches=0",
        "trainer.val_check_interval=null",
        "trainer.log_every_n_steps=1",
        "trainer.sample_tokens=0",
        "checkpoint.every_n_steps=null",
        "tracking.wandb=disabled",
        *row.words,
    ]


def layout_of(row: Row, words: list[str]) -> Layout:
    trainer = load(words).trainer
    checkpointing, chunks = trainer.activation_checkpointing, trainer.cross_entropy_chunks
    assert checkpointing != "auto"
    assert chunks != "auto"
    assert trainer.precision != "auto"
    return Layout(
        nodes=1,
        devices=row.ranks,
        strategy=row.strategy,  # type: ignore[arg-type]
        precision=trainer.precision,
        micro_batch_size=row.micro_batch_size,
        accumulate_grad_batches=row.accumulate,
        activation_checkpointing=checkpointing,
        cross_entropy_chunks=chunks,
        num_workers=0,
        compile=False,
        threads_per_rank=1,
        accelerator="cpu",
    )


def predict(row: Row, words: list[str], copies: Copies = "last") -> tuple[MemoryPrediction, int]:
    """The prediction, and the parameters of the network.

    Args:
        copies: when a save takes a copy; `words` save with the last step alone.
    """
    recipe, layout = load(words), layout_of(row, words)
    facts = known_facts(recipe)
    if row.data == "images":
        facts = DataFacts(input_shape=(3, PIXELS, PIXELS), n_outputs=CLASSES)
    asked = getattr(recipe.model, "vocab_size", "auto")
    if asked != "auto":
        facts = replace(facts, vocab_size=asked)
    task = task_of(recipe)
    shapes, work = parameter_shapes(recipe.model, task, facts), work_of(recipe.model, task, facts, layout)
    assert shapes is not None, row.name
    assert work is not None, row.name
    predicted = memory_of(
        shapes,
        work,
        layout,
        recipe.optim,
        _cluster(),
        copies=copies,
        validates=True,
    )
    return predicted, parameter_count(shapes)


def _cluster() -> Cluster:
    """Of which only the memory counts here, and that is not limited."""
    device = Device(
        name="cpu",
        accelerator="cpu",
        memory_bytes=0,
        peak_flops={},
        achievable={},
        memory_bandwidth=1e10,
        power_watts=0,
    )
    link = Link(name="memory", bandwidth=1e9, latency_seconds=0)
    return Cluster(
        name="here",
        device=device,
        devices_per_node=2,
        nodes=1,
        intra_node=link,
        cpu_cores_per_node=2,
        host_memory_bytes=0,
        disk_bandwidth=1e9,
    )


def measure(row: Row, words: list[str], folder: Path) -> dict[str, Any]:
    """Bytes above the bare process on the rank with most, and the phase in which they were; the run is left in `folder`."""
    log, runs = folder / "log", folder / "runs"
    log.mkdir()
    environment = os.environ | ALLOCATOR
    environment |= {"LM_TRAIN_MEMORY_LOG": str(log), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    paths = [str(HERE / "memory_probe"), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "lm_train", "train", *words, f"runs_dir={runs}", "name=run"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{row.name}: {' '.join(command)}\n{done.stdout}\n{done.stderr}")
    plan = Plan.read(runs / "run" / "plan.json")
    asked = (row.strategy, row.ranks, row.micro_batch_size, row.accumulate)
    assert (plan.strategy, plan.world_size, plan.micro_batch_size, plan.accumulate_grad_batches) == asked, plan
    ranks = []
    for file in sorted(log.glob("rank-*.json")):
        content = json.loads(file.read_text())
        phases: dict[str, int] = {}
        for phase in content["phases"][1:]:  # the first ends as the training starts
            above = phase["VmHWM"] - content["bare"]["VmRSS"]
            phases[phase["phase"]] = max(phases.get(phase["phase"], 0), above)
        ranks.append({"bare": content["bare"]["VmRSS"], "peak": max(phases.values()), "phases": phases})
    assert len(ranks) == row.ranks
    return max(ranks, key=lambda rank: rank["peak"])


def make_images(folder: Path) -> None:
    noise = random.Random(0)
    for number in range(CLASSES):
        place = folder / "images" / f"class{number}"
        place.mkdir(parents=True)
        for i in range(IMAGES_OF_A_CLASS):
            pixels = noise.randbytes(PIXELS * PIXELS * 3)
            Image.frombytes("RGB", (PIXELS, PIXELS), pixels).save(place / f"{i}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of rows; writes no results")
    parser.add_argument("--resume", type=Path, help="file of rows that were measured before, and where new ones go")
    parser.add_argument("--publish", action="store_true", help="measure nothing more; write what --resume has")
    parser.add_argument("--out", default="memory_cpu")
    options = parser.parse_args()
    frozen = hashlib.blake2b((HERE / "memory_list.py").read_bytes(), digest_size=16).hexdigest()
    kept = options.resume
    measured: dict[str, list[dict[str, Any]]] = json.loads(kept.read_text()) if kept and kept.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        make_images(place)
        chosen = [row for row in ROWS if not options.only or row.name in options.only]
        again = [] if options.only else [row for row in ROWS if row.name in REPEATED]
        if options.publish:
            chosen, again = [], []
        random.Random(0).shuffle(chosen)  # so that what an interrupted run has measured is of every kind
        for row, times in [*((row, 1) for row in chosen), *((row, 3) for row in again)]:
            words = words_of(row, place)
            while len(measured.setdefault(row.name, [])) < times:
                with tempfile.TemporaryDirectory(dir=place) as once:
                    measured[row.name].append(measure(row, words, Path(once)))
                if kept:
                    kept.write_text(json.dumps(measured))
            print(line(result_of(row, words_of(row, Path("FOLDER")), measured[row.name])), flush=True)
    if not options.only:
        known = [row for row in ROWS if measured.get(row.name)]
        rows = [result_of(row, words_of(row, Path("FOLDER")), measured[row.name]) for row in known]
        result = {
            "steps": STEPS,
            "allocator": ALLOCATOR,
            "list_blake2b": frozen,
            "not_measured": [row.name for row in ROWS if row not in known],
            "constants": {"BARE_PROCESS": BARE_PROCESS, "CPU_RUNTIME": CPU_RUNTIME, "DEEPSPEED": DEEPSPEED},
            "splits": splits(rows),
            "noise": noise(rows),
            "rows": rows,
        }
        write_results("memory", result, options.out)
        (RESULTS / f"{options.out}.md").write_text(page(result), encoding="utf-8")


def result_of(row: Row, words: list[str], runs: list[dict[str, Any]]) -> dict[str, Any]:
    predicted, parameters = predict(row, words)
    above = predicted.total - BARE_PROCESS
    peak = statistics.median(run["peak"] for run in runs)
    return {
        "name": row.name,
        "split": row.split,
        "words": words,
        "parameters": parameters,
        "ranks": row.ranks,
        "predicted": above,
        "parts": predicted.model_dump() | {"reserve": predicted.reserve - BARE_PROCESS},
        "measured": peak,
        "error": above / peak - 1,
        "first_error": FIRST_ERRORS.get(row.name, above / peak - 1),
        "runs": runs,
    }


def splits(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    found = {}
    names = list(dict.fromkeys(row["split"] for row in rows))
    for name in [*names, "held out"]:
        errors = [
            r["error"] for r in rows if r["split"] == name or (name == "held out" and r["split"] != "calibration")
        ]
        found[name] = summary(errors)
    first = [r["first_error"] for r in rows if r["split"] != "calibration"]
    return found | {"held out, as first predicted": summary(first)}


def summary(errors: list[float]) -> dict[str, float]:
    sizes = sorted(map(abs, errors))
    return {
        "rows": len(sizes),
        "mean_signed": statistics.mean(errors),
        "mean": statistics.mean(sizes),
        "median": statistics.median(sizes),
        "p95": sizes[min(len(sizes) - 1, round(0.95 * (len(sizes) - 1)))],
        "worst": sizes[-1],
    }


def noise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of rows measured several times: the largest distance between two of a row's peaks, by their mean."""
    spread = {}
    for row in rows:
        peaks = [run["peak"] for run in row["runs"]]
        if len(peaks) > 1:
            spread[row["name"]] = (max(peaks) - min(peaks)) / statistics.mean(peaks)
    return spread


def line(row: dict[str, Any]) -> str:
    mib = 1 << 20
    return (
        f"| {row['name']} | {row['split']} | {row['measured'] / mib:,.0f} | {row['predicted'] / mib:,.0f} | "
        f"{row['error']:+.2%} | {row['parts']['moment']} |"
    )


def page(result: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        "# Peak memory of CPU processes: predicted and measured",
        "",
        "MiB above the bare process (Python, torch, Lightning and lm_train imported, the network not yet built) on the rank",
        f"with most; {STEPS} optimizer steps, a validation and a checkpoint of `lm-train train`. By benchmarks/memory.py;",
        f"the list of rows was frozen before measuring (BLAKE2b {result['list_blake2b']}).",
        "",
        "| split | rows | mean signed | mean | median | p95 | worst |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, s in result["splits"].items():
        figures = " | ".join(f"{s[key]:.2%}" for key in ("mean", "median", "p95", "worst"))
        lines.append(f"| {name} | {s['rows']} | {s['mean_signed']:+.2%} | {figures} |")
    if result["not_measured"]:
        lines += ["", f"Rows of the list that were not measured: {', '.join(result['not_measured'])}."]
    lines += ["", "Rows that showed a fault of the formulas, which was then put right, with the error before:", ""]
    lines += [f"* {name}: {error:+.2%}" for name, error in FIRST_ERRORS.items()]
    lines += ["", "The same row measured three times, largest difference of two peaks:", ""]
    lines += [f"* {name}: {spread:.2%}" for name, spread in result["noise"].items()]
    lines += [
        "",
        "| row | split | measured | predicted | error | the predicted peak is in |",
        "|---|---|---|---|---|---|",
    ]
    lines += [line(row) for row in result["rows"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
