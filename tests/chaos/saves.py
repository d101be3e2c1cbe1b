"""SIGKILL inside of saves, by the kernel's timer and before a call to the file system; full disks."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from lm_train import ledger
from lm_train.runs import RunFolder
from tests.chaos.bench import STEPS, Bench, Failed
from tests.chaos.kills import LAYOUTS, REQUEUE, check_same, finish, new_folder, step_of_latest

SETUPS = [
    (layout, asynchronous)
    for layout in ("single", "single", "ddp x2", "fsdp x2", "zero2 x2")
    for asynchronous in (True, False)
]
KILLS = 10
"""In a case, one after another in one run folder."""
CONSTANT = ("optim={kind: adamw, learning_rate: 3e-3, schedule: constant}", "trainer.val_check_interval=20")
LAST_CALL = 80
"""So many calls to the file system a save and the removal of an old one have at the most."""


def killed_in_saves(bench: Bench, case: int, draw: random.Random) -> dict[str, Any]:
    """A run that saves after every step and is killed in ten saves: each time `latest` loads, and nothing older is lost."""
    layout, asynchronous = SETUPS[case % len(SETUPS)]
    ranks = LAYOUTS.get(layout, ("trainer.devices=1",))
    words = (
        *ranks,
        *CONSTANT,
        "trainer.restarts_without_progress=null",
        "checkpoint.every_n_steps=1",
        f"checkpoint.asynchronous={str(asynchronous).lower()}",
    )
    name = f"saves-{case}"
    run = new_folder(bench, name)
    command = bench.words(run.root.parent, *words)
    points: list[dict[str, Any]] = []
    while len(points) < KILLS:
        resumed = step_of_latest(run)
        fault = random_kill_in_save(draw, resumed, layout)
        ended = bench.start(command, [fault], name=f"{name}/output").wait()
        if ended.status == 0:
            break
        if ended.status not in (REQUEUE, -signal.SIGKILL):
            raise Failed(f"after {fault} it ended with {ended.status}:\n{ended.output[-1500:]}")
        left = step_of_latest(run)
        # a write may be under way while the next step is computed, and that of the step before has ended
        least = max(resumed, fault["step"] - (2 if asynchronous else 1))
        if left < least:
            raise Failed(f"after {fault}, resumed from {resumed}: the newest checkpoint is of step {left}, not {least}")
        loaded = bench.call("tests.chaos.inside:digest", run=str(run.root)) if left else {"step": 0}
        if loaded["step"] != left:
            raise Failed(f"after {fault}: step {left} is the newest, step {loaded['step']} was loaded")
        rows = ledger.last_step(run.ledger) or 0
        if rows < left:
            raise Failed(f"after {fault}: the checkpoint is of step {left}, the ledger ends at {rows}")
        points.append(fault | {"resumed": resumed, "left": left})
    finish(bench, name, command, run, f"after {points}")
    check_same(bench, run, words, f"after {points}")
    check_nothing_is_left(run)
    shutil.rmtree(run.root.parent)
    return {"points": len(points), "words": list(words), "kills": points}


def random_kill_in_save(draw: random.Random, resumed: int, layout: str) -> dict[str, Any]:
    fault: dict[str, Any] = {
        "rank": 0 if layout == "single" or draw.random() < 0.6 else 1,
        "phase": "save",
        "step": min(resumed + draw.randint(1, 4), STEPS - 2),
        "signal": int(signal.SIGKILL),
        "to": draw.choices(("self", "all", "supervisor"), (8, 1, 1))[0],
    }
    # rank 0 publishes; a late call of another rank would never come
    last = LAST_CALL if fault["rank"] == 0 else 8
    how = {"call": draw.randint(1, last)} if draw.random() < 0.6 else {"delay_us": draw.randrange(30_000)}
    return fault | how


def check_nothing_is_left(run: RunFolder) -> None:
    """Of torn saves, once a later one has succeeded."""
    left = sorted(
        path.name for path in run.checkpoints.iterdir() if not path.name.startswith(("step-", "latest", "best"))
    )
    if left:
        raise Failed(f"left over from killed saves: {left}")


def disk_full(bench: Bench, case: int, draw: random.Random) -> dict[str, Any]:
    """A disk with too little room: ends with 73, the newest checkpoint is good, and with room it goes on."""
    words = (*LAYOUTS["ddp x2"], *CONSTANT, f"checkpoint.asynchronous={str(case % 2 == 0).lower()}")
    straight = bench.straight(*words)
    name = f"disk-{case}"
    run = new_folder(bench, name)
    folder, other = run.root.parent, run.root.parent / "disk"
    other.mkdir()
    size = draw.randrange(900, 2400)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(other)], capture_output=True
    ).returncode:
        shutil.rmtree(folder)
        return {"points": 0, "skipped": "mount is not allowed here"}
    try:
        run = RunFolder(other / "run")
        command = bench.words(other, *words)
        filler = other / "filler"
        first = bench.start(command, name=f"{name}/output").wait()
        if first.status not in (0, 73):
            raise Failed(f"on a disk of {size} kB it ended with {first.status}, expected 73:\n{first.output[-1500:]}")
        if first.status == 73 and "free" not in first.output:
            raise Failed(f"on a disk of {size} kB it does not say what to free:\n{first.output[-1500:]}")
        left = step_of_latest(run) if run.checkpoints.exists() else 0
        filler.unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,size=64m", str(other)], check=True)
        finish(bench, name, command, run, f"a disk of {size} kB")
        if run.ledger.read_text() != straight.ledger:
            raise Failed(f"a disk of {size} kB, then room: another ledger")
        check_same(bench, run, words, f"a disk of {size} kB, then room")
    finally:
        subprocess.run(["umount", "-l", str(other)], check=False)
    with contextlib.suppress(OSError):
        shutil.rmtree(folder)
    return {"points": int(first.status == 73), "kilobytes": size, "left": left, "status": first.status}


def checkpoint_of(bench: Bench, *words: str) -> Path:
    """The newest checkpoint of an undisturbed run, with its pointers beside it; made once."""
    folder = bench.folder / "straight" / bench.code / "sample"
    if not (folder / "run" / "exit_code").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        ended = bench.start(bench.words(folder, *words), name=str(folder / "output")).wait()
        if ended.status != 0:
            raise Failed(f"{words} ended with {ended.status}:\n{ended.output[-1500:]}")
    return folder / "run"
