"""Runs every strategy in every precision, on one process, two, two Slurm nodes or the GPUs at hand, and compares the losses.

    python benchmarks/strategies.py [--slurm] [--steps 50] [--out NAME]

Each run is the whole command, `lm-train train` in processes of its own, of a small GPT (two blocks, 64 wide, tied head) on
text of the standard library; `--slurm` adds two nodes by `srun -N2`. What is written is the largest relative difference of
the loss over all steps to one process in fp32 under `single`, and the versions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from report import write_results

from lm_train.hardware import this_machine
from lm_train.runs import RunFolder, read_jsonl

STRATEGIES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
WORDS = (
    "recipe=gpt_debug",
    "model={kind: gpt, n_layer: 2, n_head: 2, n_embd: 64, block_size: 32}",
    "optim={kind: adamw, learning_rate: 1e-3, schedule: constant}",
    "data={kind: embedded, tokenizer: bytes, global_batch_size: 16}",
    "trainer.accumulate_grad_batches=2",
    "trainer.gradient_clip_val=1.0",
    "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=null",
    "trainer.limit_val_batches=0",
    "trainer.sample_tokens=0",
    "checkpoint.every_n_steps=null",
    "tracking.wandb=disabled",
)


def losses(folder: Path, name: str, words: tuple[str, ...], launcher: tuple[str, ...] = ()) -> list[float] | str:
    """Loss of every step, or the line that refused the run."""
    command = [*launcher, sys.executable, "-m", "lm_train", "train", *WORDS, *words, f"name={name}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        return next(line for line in done.stderr.splitlines() if line.startswith("lm-train:"))
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    rows = read_jsonl(RunFolder(folder / "runs" / name).metrics)
    return [row["train/loss"] for row in rows if "train/loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slurm", action="store_true", help="also on two Slurm nodes, with srun")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", default="strategies")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if this_machine().gpus:
        layouts: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {"GPU": ((), ())}
    else:
        layouts = {"1 process": (("trainer.devices=1",), ()), "2 processes": (("trainer.devices=2",), ())}
    if options.slurm:
        layouts["2 Slurm nodes"] = ((), ("srun", "-N2", "--ntasks-per-node=1"))

    with tempfile.TemporaryDirectory() as temporary:
        folder, rows = Path(temporary), []
        steps = f"trainer.max_steps={options.steps}"
        single = ("trainer.strategy=single", "trainer.precision=32-true", steps)
        expected = losses(folder, "reference", single)
        assert isinstance(expected, list)
        for strategy in STRATEGIES:
            for precision in PRECISIONS:
                for layout, (words, launcher) in layouts.items():
                    if strategy == "single" and layout not in ("1 process", "GPU"):
                        continue
                    words = (*words, f"trainer.strategy={strategy}", f"trainer.precision={precision}", steps)
                    name = f"{strategy}-{precision}-{layout.replace(' ', '_')}"
                    found = losses(folder, name, words, launcher)
                    row: dict[str, Any] = {"strategy": strategy, "precision": precision, "layout": layout}
                    if isinstance(found, str):
                        row["refused"] = found
                    else:
                        assert len(found) == len(expected)
                        pairs = zip(expected, found, strict=True)
                        row["largest_relative_difference"] = max(abs(a - b) / abs(a) for a, b in pairs)
                        row["first_loss"], row["last_loss"] = found[0], found[-1]
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    write_results(
        "strategies", {"steps": options.steps, "words": WORDS, "reference": expected, "rows": rows}, options.out
    )
    print(table(rows, tuple(layouts)))


def table(rows: list[dict[str, Any]], layouts: tuple[str, ...]) -> str:
    """Markdown: a line for each strategy and precision."""
    cells = {(row["strategy"], row["precision"], row["layout"]): row for row in rows}
    lines = [f"| strategy | precision | {' | '.join(layouts)} |", "|---" * (2 + len(layouts)) + "|"]
    for strategy in STRATEGIES:
        for precision in PRECISIONS:
            shown = []
            for layout in layouts:
                row = cells.get((strategy, precision, layout), {})
                found = row.get("largest_relative_difference")
                shown.append(f"{found:.1e}" if found is not None else "refused" if "refused" in row else "-")
            lines.append(f"| {strategy} | {precision} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
