"""Trainings that write checkpoints on the way: predicted against measured peak memory, time of a save, and what it holds up.

    python benchmarks/saves.py [--only NAME ...] [--publish]

Rows of memory_list.py, each saving at its second and its last step. The copy that a save writes from then lies in memory beside
all that follows; memory is measured as benchmarks/memory.py measures it. Of the save on the way: `blocked` is how long the
training stood still, `took` the time until it was published, as budget.jsonl has them; predicted are those of the run's own
plan, by the calibration of this machine (`lm-train calibrate`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from memory import make_images, measure, predict, summary, words_of
from memory_list import ROWS
from report import RESULTS, write_results

from lm_train.plan import Plan
from lm_train.plan.footprint import BARE_PROCESS
from lm_train.runs import RunFolder, read_jsonl

NAMES = (
    "gpt_a", "gpt_a bf16", "gpt_a full", "gpt_a adagrad", "gpt_a muon", "gpt_b", "bert", "cnn", "lstm", "gpt_a ddp", "gpt_a fsdp",
    "gpt_a zero1", "gpt_a zero2", "gpt_a zero3", "gpt_b fsdp full accumulated",
)  # fmt: skip
EVERY = 2


def measured(name: str, place: Path) -> dict[str, Any]:
    row = next(row for row in ROWS if row.name == name)
    words = [word.replace("every_n_steps=null", f"every_n_steps={EVERY}") for word in words_of(row, place)]
    with tempfile.TemporaryDirectory(dir=place) as once:
        most = measure(row, words, Path(once))
        run = RunFolder(Path(once) / "runs/run")
        prediction = Plan.read(run.plan).prediction
        saves = [entry for entry in read_jsonl(run.budget) if entry.get("took") is not None]
    assert prediction is not None
    assert prediction.checkpoint_stall is not None
    on_the_way = next(save for save in saves if save["step"] == EVERY)
    predicted, _ = predict(row, words, copies="all along")
    above = predicted.total - BARE_PROCESS
    return {
        "name": name,
        "peak": most["peak"],
        "phases": most["phases"],
        "predicted_peak": above,
        "copy": predicted.copy_to_save,
        "error": above / most["peak"] - 1,
        "blocked": on_the_way["blocked"],
        "took": on_the_way["took"],
        "predicted_took": prediction.checkpoint_seconds.model_dump(),
        "predicted_stall": prediction.checkpoint_stall.model_dump(),
    }


def line(row: dict[str, Any]) -> str:
    mib = 1 << 20
    took, stall = row["predicted_took"], row["predicted_stall"]
    return (
        f"| {row['name']} | {row['peak'] / mib:,.0f} | {row['predicted_peak'] / mib:,.0f} | {row['error']:+.2%} | "
        f"{row['copy'] / mib:,.0f} | {row['blocked']:.3f} | {stall['low']:.3f} to {stall['high']:.3f} | {row['took']:.2f} | "
        f"{took['low']:.2f} to {took['high']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--publish", action="store_true")
    options = parser.parse_args()
    head = [
        "| row | MiB measured | predicted | error | of it the copy | blocked s | predicted stall | took s | predicted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(head), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        make_images(Path(temporary))
        for name in options.only:
            rows.append(measured(name, Path(temporary)))
            print(line(rows[-1]), flush=True)
    errors = summary([row["error"] for row in rows])
    print(errors)
    if options.publish:
        write_results("saves", {"every": EVERY, "memory": errors, "rows": rows}, "saves_cpu")
        text = [
            "# Checkpoints written beside the training: predicted and measured",
            "",
            "MiB above the bare process on the rank with most; seconds of the save on the way. By benchmarks/saves.py.",
            "",
            *head,
            *map(line, rows),
            "",
            f"Memory: mean {errors['mean']:.2%}, worst {errors['worst']:.2%} of {errors['rows']} rows.",
        ]
        (RESULTS / "saves_cpu.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
