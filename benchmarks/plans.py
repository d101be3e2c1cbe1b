"""What the scheduler decides for every shipped recipe on every shipped cluster, and how long it takes to decide.

    python benchmarks/plans.py [recipe ...]

Each plan is made by the command itself, `lm-train plan`, in a process of its own; its CPU time is that process', start of Python
included. A network without formulas is traced once, and then found in the cache: the first of its rows shows the trace. Writes
results/plans.json and the table results/plans.md.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

from report import RESULTS, write_results

from lm_train.clusters import shipped_clusters
from lm_train.recipe import shipped_recipes

HEAD = """\
# Plans of the shipped recipes on the shipped clusters

Written by `python benchmarks/plans.py`. Every figure is a prediction from data sheets; nothing on this page was measured on a
GPU. Where a recipe's network depends on data that have not been read, the plan says what it assumed.

| recipe | cluster | GPUs | strategy | micro x accumulated | recomputed | pieces of the loss | memory, GB | step, ms | MFU | \
hours | GPU-hours | cost |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def row_of(recipe: str, cluster: str) -> dict[str, Any]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "lm_train", "plan", f"recipe={recipe}", f"cluster={cluster}", "format=json"]
    done = subprocess.run(command, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    row: dict[str, Any] = {"recipe": recipe, "cluster": cluster, "exit_code": done.returncode, "cpu_seconds": seconds}
    if done.returncode:
        return row | {"message": done.stderr.strip().removeprefix("lm-train: ")}
    made = json.loads(done.stdout)
    plan, told = made["plan"], made["plan"]["prediction"]
    row |= {
        "devices": plan["nodes"] * plan["devices"],
        "strategy": plan["strategy"],
        "micro_batch_size": plan["micro_batch_size"],
        "accumulate_grad_batches": plan["accumulate_grad_batches"],
        "activation_checkpointing": plan["activation_checkpointing"],
        "cross_entropy_chunks": plan["cross_entropy_chunks"],
        "rejected": len(made["rejected"]),
        "notes": made["notes"],
    }
    if told is None:
        return row
    memory, step = told["memory"], told["step"]
    parts = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers", "reserve")
    return row | {
        "memory_bytes": sum(memory[part] for part in parts),
        "step_seconds": sum(step[part] for part in ("compute", "communication", "optimizer", "data", "host")),
        "mfu": told["mfu"],
        "hours": told["hours"]["value"],
        "gpu_hours": told["gpu_hours"]["value"],
        "money": None if told["money"] is None else told["money"]["value"],
        "currency": told["currency"],
    }


def line_of(row: dict[str, Any]) -> str:
    if "message" in row:
        return f"| {row['recipe']} | {row['cluster']} | {row['message']} |" + " |" * 10
    cells = [
        row["recipe"],
        row["cluster"],
        row["devices"],
        row["strategy"],
        f"{row['micro_batch_size']} x {row['accumulate_grad_batches']}",
        row["activation_checkpointing"],
        row["cross_entropy_chunks"],
    ]
    if "hours" in row:
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.0%}"
        money = "" if row["money"] is None else f"{row['money']:,.2f} {row['currency']}"
        cells += [f"{row['memory_bytes'] / 1e9:.2f}", f"{row['step_seconds'] * 1e3:,.3g}", mfu]
        cells += [f"{row['hours']:,.3g}", f"{row['gpu_hours']:,.3g}", money]
    else:
        cells += ["; ".join(row["notes"]), *[""] * 5]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    recipes = sys.argv[1:] or list(shipped_recipes())
    rows = []
    for recipe in recipes:
        for cluster in shipped_clusters():
            rows.append(row_of(recipe, cluster))
            print(line_of(rows[-1]), f"{rows[-1]['cpu_seconds']:.2f} s", flush=True)
    slowest = max(rows, key=lambda row: row["cpu_seconds"])
    write_results("plans", {"rows": rows, "slowest": slowest})
    foot = (
        f"\nLongest CPU time of a plan: {slowest['cpu_seconds']:.1f} s ({slowest['recipe']} on {slowest['cluster']}).\n"
    )
    (RESULTS / "plans.md").write_text(HEAD + "\n".join(map(line_of, rows)) + "\n" + foot, encoding="utf-8")


if __name__ == "__main__":
    main()
