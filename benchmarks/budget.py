"""Whether runs stay inside their budgets and use them: 300 on a simulated clock, 10 real ones.

    python benchmarks/budget.py [simulated=300] [real=10]

A real run's time is taken from outside, from the start of its command to the end, and held against the budget; what the run's
own account says stands beside it. Budgets of real runs are a minute or two, of which the start takes a good part.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from report import write_results
from simulated_budget import Outcome, simulate

from lm_train import runs
from lm_train.budget import Account, Tariff
from lm_train.hardware import Machine
from lm_train.plan import Plan, make_plan
from lm_train.recipe import load
from lm_train.runs import RunFolder

FIRST_SEED = 10_000
"""The seeds below served to choose the guard's margins."""
WORDS = (
    "recipe=gpt_debug",
    "tracking.wandb=disabled",
    "trainer.val_check_interval=null",
    "trainer.limit_val_batches=4",
)
ENDLESS = "trainer.max_steps=1000000"
PRICE = "cluster.price_per_gpu_hour=36"
TWO = "trainer.devices=2"
CASES: tuple[tuple[str, float, tuple[str, ...], signal.Signals | None], ...] = (
    ("hours", 60, (ENDLESS, "budget.hours={hours}"), None),
    ("gpu_hours", 60, (ENDLESS, "budget.gpu_hours={hours}"), None),
    ("money", 60, (ENDLESS, PRICE, "budget.money={money}"), None),
    ("kwh", 60, (ENDLESS, "budget.kwh={kwh}"), None),
    ("several", 60, (ENDLESS, PRICE, "budget.hours={hours}", "budget.money={twice}", "budget.gpu_hours={twice}"), None),
    ("ddp", 75, (ENDLESS, TWO, "trainer.strategy=ddp", "budget.hours={hours}"), None),
    ("fsdp", 75, (ENDLESS, TWO, "trainer.strategy=fsdp", "budget.hours={hours}"), None),
    ("killed", 90, (ENDLESS, "checkpoint.every_n_steps=10", "budget.hours={hours}"), signal.SIGKILL),
    ("auto", 75, ("trainer.max_steps=auto", "budget.hours={hours}"), None),
    ("preempted", 90, ("trainer.max_steps=auto", "budget.hours={hours}"), signal.SIGTERM),
)
"""Name, seconds that the limit pays for, words, and what hits the first start in the middle of its training."""


def real_run(
    name: str, seconds: float, words: Sequence[str], hit: signal.Signals | None, runs_dir: Path
) -> dict[str, Any]:
    """Runs a case until its command has nothing left to do.

    Returns:
        Its row: what was used by the clock outside and by the account, as shares of the limit.
    """
    hours = seconds / 3600
    ten_watts = 0.01 * hours  # what a CPU process without a known power counts
    filled = [
        word.format(hours=f"{hours:.9f}", money=f"{36 * hours:.9f}", twice=f"{72 * hours:.9f}", kwh=f"{ten_watts:.9f}")
        for word in words
    ]
    command = [sys.executable, "-m", "lm_train", "train", *WORDS, *filled, f"name={name}", f"runs_dir={runs_dir}"]
    run, outside, codes, text = RunFolder(runs_dir / name), 0.0, [], ""
    for start in range(4):
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if hit is not None and start == 0:
            _wait_for_training(run, process)
            time.sleep(6)
            process.send_signal(hit)
        text = process.communicate()[1]
        took = time.monotonic() - began
        codes.append(process.returncode)
        if "the budget is spent" in text or "finished already" in text:
            break
        outside += took
    plan, account = Plan.read(run.plan), Account.read(run)
    used, last, saved = account.used(Tariff.of(plan)), account.starts[-1], runs.latest_checkpoint(run)
    stopped = last.stopped or {}
    return {
        "case": name,
        "words": filled,
        "budget_seconds": seconds,
        "starts": len(account.starts),
        "exit_codes": codes,
        "used_outside": outside / seconds,
        "used": max(used[limit] / amount for limit, amount in plan.limits.items()),
        "forced": bool(stopped.get("forced")),
        "save_seconds": statistics.fmean(account.save_seconds) if account.save_seconds else None,
        "step_seconds": last.step_seconds,
        "saved_step": None if saved is None else int(saved.name.removeprefix("step-")),
        "last_step": stopped.get("step") or (last.horizons[-1][1] if last.horizons else None),
        "horizons": [start.horizons for start in account.starts],
        "said": text.strip().splitlines()[-1].replace(str(runs_dir), "runs"),
    }


def _wait_for_training(run: RunFolder, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        starts = Account.read(run).starts
        if starts and starts[0].began_training is not None:
            return
        time.sleep(0.2)


def simulated(number: int) -> list[Outcome]:
    plan = make_plan(load(["recipe=gpt_debug"]), Machine(cpu_cores=2, gpus=()))
    outcomes = []
    for seed in range(FIRST_SEED, FIRST_SEED + number):
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(simulate(seed, plan, Path(folder)))
    return outcomes


def summary_of(outcomes: list[Outcome]) -> dict[str, Any]:
    large = [o for o in outcomes if o.large and not o.refused]
    counted = sorted(o.counted for o in large)
    return {
        "runs": len(outcomes),
        "overruns": sum(o.used > 1 for o in outcomes),
        "largest_share_used": max(o.used for o in outcomes),
        "of_ten_saves_or_more": sum(o.large for o in outcomes),
        "of_these_left_too_little_for_another_start_by_a_kill": sum(o.large and o.refused for o in outcomes),
        "the_others_below_95_percent": sum(share < 0.95 for share in counted),
        "lowest_share_used": counted[0],
        "median_share_used": statistics.median(counted),
        "kills": sum(o.kills for o in outcomes),
        "ended_by_force_large": sum(o.forced > 0 for o in outcomes if o.large),
        "ended_by_force_small": sum(o.forced > 0 for o in outcomes if not o.large),
    }


def main() -> None:
    options = {"simulated": 300, "real": 10} | {k: int(v) for k, v in (word.split("=") for word in sys.argv[1:])}
    outcomes = simulated(options["simulated"])
    summary = summary_of(outcomes)
    print(json.dumps(summary, indent=1), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, seconds, words, hit in CASES[: options["real"]]:
            rows.append(real_run(name, seconds, words, hit, Path(folder)))
            shown = {
                k: v
                for k, v in rows[-1].items()
                if k in ("case", "used", "used_outside", "starts", "exit_codes", "forced")
            }
            print(json.dumps(shown), flush=True)
    over = sum(row["used_outside"] > 1 for row in rows)
    print(f"{over} of {len(rows)} real runs over their budget")
    write_results(
        "budget",
        {
            "command": "python benchmarks/budget.py",
            "simulated": summary,
            "simulated_rows": [asdict(outcome) for outcome in outcomes],
            "real_overruns": over,
            "real_rows": rows,
        },
    )


if __name__ == "__main__":
    main()
