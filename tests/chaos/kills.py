"""SIGKILL at seeded points of a run, from its first beat to its last, to a rank, to all, to the supervisor."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_train import ledger
from lm_train.errors import CheckpointError
from lm_train.runs import RunFolder
from lm_train.saved import LATEST, newest_good, step_of
from tests.chaos.bench import STEPS, Bench, Ended, Failed, Straight

LAYOUTS = {
    "ddp x2": ("trainer.devices=2", "trainer.strategy=ddp"),
    "ddp x4": ("trainer.devices=4", "trainer.strategy=ddp"),
    "fsdp x2": ("trainer.devices=2", "trainer.strategy=fsdp"),
    "zero2 x2": ("trainer.devices=2", "trainer.strategy=zero2"),
}
CONFIGURATIONS = [
    (layout, workers, accumulation) for workers in (0, 2) for accumulation in (1, 4) for layout in LAYOUTS
]
"""Every layout with and without loader processes, with and without accumulation."""
KILLS = 2
"""Of a run."""
REQUEUE = 75


def words_of(layout: str, workers: int = 0, accumulation: int = 1) -> tuple[str, ...]:
    return (*LAYOUTS[layout], f"data.num_workers={workers}", f"trainer.accumulate_grad_batches={accumulation}")


def killed(bench: Bench, case: int, draw: random.Random) -> dict[str, Any]:
    """A run that is killed twice; a case of each configuration in turn."""
    layout, workers, accumulation = CONFIGURATIONS[case % len(CONFIGURATIONS)]
    return killed_run(bench, f"kills-{case}", words_of(layout, workers, accumulation), draw)


def killed_run(
    bench: Bench, name: str, words: Sequence[str], draw: random.Random, kills: int = KILLS
) -> dict[str, Any]:
    """Kills a run at random beats, then lets it end and compares."""
    straight = bench.straight(*words)
    run, points = new_folder(bench, name), []
    folder = run.root.parent
    command = bench.words(folder, *words)
    for _ in range(kills):
        resumed = step_of_latest(run)
        fault = random_kill(draw, straight, resumed)
        ended = bench.start(command, [fault], name=f"{name}/output").wait()
        check_resumed(ended, resumed)
        if ended.status == 0:  # it had ended before
            continue
        expected = -signal.SIGKILL if fault["to"] == "supervisor" else REQUEUE
        if ended.status != expected:
            raise Failed(f"after {fault} it ended with {ended.status}, expected {expected}:\n{ended.output[-1500:]}")
        points.append(
            {**fault, "resumed": resumed, "ledger": ledger.last_step(run.ledger), "left": step_of_latest(run)}
        )
    if points:
        finish(bench, name, command, run, f"after {points}")
    check_same(bench, run, words, f"after {points}")
    shutil.rmtree(folder)
    return {"points": len(points), "words": list(words), "kills": points}


def random_kill(draw: random.Random, straight: Straight, resumed: int) -> dict[str, Any]:
    """At any beat that a run which goes on from step `resumed` will come to, and up to 20 ms after it."""
    beats = straight.beats[0]
    before = sum(step < 0 for step, *_ in beats)
    number = draw.randint(1, before + sum(step >= resumed for step, *_ in beats[before:]) - 2)
    to = draw.choices(("self", "all", "supervisor"), (6, 2, 2))[0]
    return {
        "rank": draw.randrange(len(straight.beats)),
        "beat": number,
        "delay_us": draw.choice((0, draw.randrange(2_000), draw.randrange(20_000))),
        "signal": int(signal.SIGKILL),
        "to": to,
    }


def step_of_latest(run: RunFolder) -> int:
    """Of the newest checkpoint, which no kill may have damaged."""
    try:
        choice = newest_good(run.checkpoints)
    except CheckpointError as error:
        raise Failed(f"no good checkpoint is left: {error}") from None
    # the first of a run may be published and not yet the latest
    damage = [text for text in choice.skipped if not text.startswith(f"{run.checkpoints / LATEST}: missing")]
    if damage:
        raise Failed(f"a kill has damaged the newest checkpoint: {damage}")
    return 0 if choice.checkpoint is None else step_of(choice.checkpoint)


def check_resumed(ended: Ended, step: int) -> None:
    """That it went on from the newest checkpoint, as far as it has come to saying so."""
    last = [line for line in ended.own.splitlines() if line.startswith("resuming from ")][-1:]
    if last and not last[0].rstrip("/").endswith(f"step-{step}"):
        raise Failed(f"the newest checkpoint was of step {step}, but it says: {last[0]}")


def finish(bench: Bench, name: str, command: Sequence[str], run: RunFolder, context: str) -> None:
    """Lets a run come to its end."""
    resumed = step_of_latest(run)
    ended = bench.start(command, name=f"{name}/output").wait()
    check_resumed(ended, resumed)
    if ended.status != 0:
        raise Failed(f"{context}: the next start ended with {ended.status}:\n{ended.output[-1500:]}")


def new_folder(bench: Bench, name: str) -> RunFolder:
    folder = bench.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return RunFolder(folder / "run")


def check_same(bench: Bench, run: RunFolder, words: Sequence[str], context: str) -> None:
    """That a run which has ended has the ledger and the weights of the undisturbed one, and no step twice."""
    straight = bench.straight(*words)
    if run.ledger.read_text() != straight.ledger:
        reference = run.root / "straight.jsonl"
        reference.write_text(straight.ledger)
        raise Failed(f"{context}: another ledger: {ledger.compare(run.ledger, reference)}")
    if bench.digest(run) != straight.weights:
        raise Failed(f"{context}: the same ledger, but other weights or generators at the end")
    check_metrics(run.metrics, context)


def check_metrics(file: Path, context: str) -> None:
    seen: set[tuple[int, str]] = set()
    for line in file.read_text().splitlines():
        row = json.loads(line)
        for key in row:
            if key.startswith(("train/", "val/")) and (row["step"], key) in seen:
                raise Failed(f"{context}: metrics.jsonl has {key} of step {row['step']} twice")
            seen.add((row["step"], key))


def killed_plainly(bench: Bench, case: int, draw: random.Random) -> dict[str, Any]:
    """Commands and ranks as users have them, killed from outside once the ledger has come to a step."""
    layout = list(LAYOUTS)[case % len(LAYOUTS)]
    words = words_of(layout, workers=case // len(LAYOUTS) % 2 * 2)
    run = new_folder(bench, f"plain-{case}")
    folder = run.root.parent
    command = bench.words(folder, *words)
    step, to = draw.randrange(8, STEPS - 10), draw.choice(("one", "all", "supervisor"))
    started = bench.plainly(command, name=f"plain-{case}/output")
    started.until(lambda: (ledger.last_step(run.ledger) or 0) >= step, f"step {step}")
    time.sleep(draw.random() * 0.2)
    ranks = started.ranks()
    victims = {"one": [draw.choice(ranks)] if ranks else [], "all": ranks, "supervisor": [started.pid]}[to]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    first = started.wait()
    resumed = step_of_latest(run)
    if first.status not in (0, REQUEUE, -signal.SIGKILL):
        raise Failed(f"killed {to} at step {step}: it ended with {first.status}:\n{first.output[-1500:]}")
    ended = bench.plainly(command, name=f"plain-{case}/output").wait()
    check_resumed(ended, resumed)
    if ended.status != 0:
        raise Failed(f"killed {to} at step {step}: the next start ended with {ended.status}:\n{ended.output[-1500:]}")
    check_same(bench, run, words, f"killed {to} at step {step}, plain start")
    shutil.rmtree(folder)
    return {"points": 1, "words": list(words), "killed": to, "step": step, "resumed": resumed}
