"""W&B goes away, or its own process is killed, at random moments: the training is the same, and ends in time."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from lm_train import ledger
from lm_train.runs import read_jsonl
from tests.chaos.bench import Bench, Failed
from tests.chaos.kills import LAYOUTS, REQUEUE, check_same, finish, new_folder
from tests.wandb_server import WandbServer

WAYS = ("server", "process", "server and rank")
LONGEST_S = 60
"""Of a run that takes seconds: W&B's own end is waited for a quarter of a minute."""


def wandb_down(bench: Bench, case: int, draw: random.Random) -> dict[str, Any]:
    """The server dies after some requests; W&B's process is killed; or the server dies and a rank is killed."""
    way, name = WAYS[case % len(WAYS)], f"outage-{case}"
    words = LAYOUTS["ddp x2" if case % 2 else "fsdp x2"]
    run = new_folder(bench, name)
    command = [*bench.words(run.root.parent, *words), "tracking.wandb=online"]
    command.remove("tracking.wandb=disabled")
    faults: list[dict[str, Any]] = []
    if way == "server and rank":
        faults.append({"rank": draw.randrange(2), "phase": "step", "step": draw.randrange(12, 58), "signal": 9})
    requests, step = draw.randint(1, 8), draw.randrange(2, 50)
    with WandbServer() as server:
        reached = {"WANDB_MODE": "online", "WANDB_API_KEY": "0123456789" * 4, "WANDB_BASE_URL": server.url}
        started = bench.start(command, faults, name=f"{name}/output", environment=reached)
        if way == "process":
            started.until(lambda: (ledger.last_step(run.ledger) or 0) >= step, f"step {step}")
            for pid in filter(_is_wandb_core, bench.left()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            started.until(lambda: server.requests >= requests or started.has_ended, f"request {requests}")
            server.die()
        ended = started.wait()
        sent = [row for told in server.runs.values() for row in told.history]
    context = f"W&B's {way}, request {requests}, step {step}, {faults}"
    if ended.status != (REQUEUE if faults else 0) or ended.seconds > LONGEST_S or "Traceback" in ended.output:
        raise Failed(f"{context}: ended with {ended.status} after {ended.seconds:.0f} s:\n{ended.output[-1500:]}")
    if faults:
        finish(bench, name, command, run, context)
    elif way == "process":  # what it had not written is in metrics.jsonl alone
        if "metrics.jsonl has all rows" not in ended.output:
            raise Failed(f"{context}: it does not say where the rows are:\n{ended.output[-1500:]}")
    else:
        rows = _losses(read_jsonl(run.metrics), "step")
        if "not all of this was sent" in ended.output:
            sent = _synced(next(line for line in ended.output.splitlines() if "wandb sync" in line))
        if _losses(sent, "trainer/global_step") != rows:
            raise Failed(f"{context}: W&B has {len(sent)} rows of {len(rows)} in the end:\n{ended.output[-1500:]}")
    check_same(bench, run, words, context)
    shutil.rmtree(run.root.parent)
    return {"points": 1, "way": way, "requests": requests, "step": step, "faults": faults}


def _is_wandb_core(pid: int) -> bool:
    try:
        return b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _losses(rows: Any, step: str) -> list[tuple[int, float]]:
    return [(row[step], row["train/loss"]) for row in rows if "train/loss" in row]


def _synced(told: str) -> list[dict[str, Any]]:
    """What a server has when a person has done what they were told to."""
    with WandbServer() as later:
        environment = os.environ | {"WANDB_BASE_URL": later.url, "WANDB_API_KEY": "0123456789" * 4}
        command = f"{sys.executable} -m {told[told.index('wandb sync') :]}"
        done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise Failed(f"{told}: ended with {done.returncode}:\n{done.stdout[-500:]}{done.stderr[-500:]}")
        return [row for known in later.runs.values() for row in known.history]
