"""Signals to some ranks at seeded points, also in saves, validations and starts; ranks that stand still."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from typing import Any

from lm_train import ledger
from tests.chaos.bench import Bench, Failed
from tests.chaos.kills import LAYOUTS, REQUEUE, check_same, finish, new_folder, random_kill, step_of_latest, words_of

OFTEN = {"agree_every_s": 0.02}
"""For runs of a second: the ranks ask one another so often whether to stop, where users' ask once a second."""
LONG = ("trainer.max_steps=240",)
"""And a run in which they ask once a second."""


def signalled(bench: Bench, case: int, draw: random.Random) -> dict[str, Any]:
    """SIGTERM or SIGUSR1 to one rank or several: 75, the checkpoint of the last step, and then the same ledger."""
    layout = list(LAYOUTS)[case % len(LAYOUTS)]
    plainly = case % 10 == 9
    words = words_of(layout, workers=2 * (case // 4 % 2)) + (LONG if plainly else ())
    straight = bench.straight(*words)
    world = len(straight.beats)
    name = f"signals-{case}"
    run = new_folder(bench, name)
    command = bench.words(run.root.parent, *words)
    fault = random_kill(draw, straight, 0)
    phases = [phase for _, phase, _ in straight.beats[0]]
    where = draw.choice(("anywhere", "anywhere", "save", "validation", "start"))
    if where == "start":
        fault["beat"] = draw.randint(1, phases.index("data"))
    elif where != "anywhere":
        fault["beat"] = draw.choice([i + 1 for i, phase in enumerate(phases[:-40]) if phase == where])
    fault["beat"] = min(fault["beat"], len(phases) * (2 if plainly else 9) // (4 if plainly else 10))
    subset = draw.sample(range(world), 1 if draw.random() < 0.5 else draw.randint(1, world))
    fault |= {"signal": int(draw.choice((signal.SIGTERM, signal.SIGUSR1))), "to": subset, "rank": draw.randrange(world)}
    if draw.random() < 0.15:
        fault["to"] = "supervisor"
    faults: list[dict[str, Any]] = [fault]
    if draw.random() < 0.2:  # and once more in the save that the first one leads to
        faults.append({"phase": "save", "step": 1, "signal": int(signal.SIGTERM), "to": "all", "rank": 0})
    ended = bench.start(command, faults + ([] if plainly else [OFTEN]), name=f"{name}/output").wait()
    context = f"after {faults}"
    if ended.status != REQUEUE:
        raise Failed(f"{context} it ended with {ended.status}, expected 75:\n{ended.output[-1500:]}")
    rows, left = ledger.last_step(run.ledger) or 0, step_of_latest(run)
    if rows != left:
        raise Failed(
            f"{context}: the ledger ends at step {rows}, the newest checkpoint is of {left}:\n{ended.output[-800:]}"
        )
    finish(bench, name, command, run, context)
    check_same(bench, run, words, context)
    shutil.rmtree(run.root.parent)
    return {
        "points": 1,
        "words": list(words),
        "fault": fault,
        "second": len(faults) > 1,
        "stopped_at": left,
        "where": where,
    }


def stopped(bench: Bench, case: int, draw: random.Random) -> dict[str, Any]:
    """A rank that is stopped: named within 30 s, 75, and then the same ledger; every fifth with the time-out of the recipe."""
    layout = list(LAYOUTS)[case % len(LAYOUTS)]
    default = case % 5 == 4
    limit = 30.0 if default else 3.0
    words = words_of(layout)
    straight = bench.straight(*words)
    name = f"stopped-{case}"
    run = new_folder(bench, name)
    plain = bench.words(run.root.parent, *words)
    fault = random_kill(draw, straight, 0) | {"signal": int(signal.SIGSTOP), "to": "self", "delay_us": 0}
    fault["beat"] = min(fault["beat"], len(straight.beats[0]) - 40)
    times = {"stopped": 0.0}
    started = bench.start(
        [*plain, f"trainer.hang_timeout_s={limit}"],
        [fault, {"note": str(run.root.parent / "struck")}],
        name=f"{name}/output",
    )
    struck = run.root.parent / "struck"
    started.until(struck.exists, "stop")
    times["stopped"] = time.monotonic()
    ended = started.wait()
    seconds = time.monotonic() - times["stopped"]
    named = re.search(r"lm-train: rank (\d+) on .*(hangs|stopped)", ended.output)
    context = f"rank {fault['rank']} stopped at beat {fault['beat']}"
    if ended.status != REQUEUE or named is None or int(named[1]) != fault["rank"]:
        raise Failed(f"{context}: {ended.status} after {seconds:.1f} s:\n{ended.output[-1500:]}")
    finish(bench, name, plain, run, context)
    check_same(bench, run, words, context)
    shutil.rmtree(run.root.parent)
    return {"points": 1, f"seconds_at_{limit:.0f}": round(seconds, 1), "fault": fault}


def second_owners(bench: Bench, case: int, draw: random.Random) -> dict[str, Any]:
    """Ten more starts of a run that is at work: each refused within 5 s; the run itself comes to the same ledger.

    Then it is killed and started at once: what a dead one claimed is free.
    """
    words = LAYOUTS["ddp x2"]
    endless = ("trainer.max_steps=1000000",)
    name = f"owners-{case}"
    run = new_folder(bench, name)
    folder = run.root.parent
    command = bench.words(folder, *words, *endless)
    first = bench.start(command, name=f"{name}/first")
    first.until(lambda: (run.root / ".owner").exists() and (run.root / ".owner").stat().st_size > 0, "owner")
    longest = 0.0
    for number in range(10):
        if number % 2:
            time.sleep(draw.random() * 0.5)
        second = bench.start(command, name=f"{name}/second-{number}").wait()
        longest = max(longest, second.seconds)
        if second.status != 73 or f"process {first.pid} on " not in second.output:
            raise Failed(f"a second start ended with {second.status}:\n{second.output[-1500:]}")
    if longest > 5:
        raise Failed(f"a second start was refused only after {longest:.1f} s")
    first.until(lambda: step_of_latest(run) > 0, "checkpoint")
    os.kill(first.pid, signal.SIGKILL)
    taken = bench.start(command, name=f"{name}/taken")  # its ranks may be on their way out
    both = bench.start(command, name=f"{name}/both")
    first.wait()
    rivals = {taken.pid: taken, both.pid: both}
    loser = _first_to_end(taken, both)
    refused = loser.wait()
    if refused.status != 73:
        raise Failed(f"of two starts at once one ended with {refused.status}:\n{refused.output[-1500:]}")
    winner = next(started for pid, started in rivals.items() if pid != loser.pid)
    before = ledger.last_step(run.ledger) or 0
    winner.until(lambda: (ledger.last_step(run.ledger) or 0) > before + 20, "step of the new owner")
    os.kill(winner.pid, signal.SIGTERM)
    ended = winner.wait()
    if ended.status != REQUEUE:
        raise Failed(f"the new owner ended with {ended.status}:\n{ended.output[-1500:]}")
    steps = [row.step for row in ledger.read(run.ledger)]
    if steps != list(range(1, step_of_latest(run) + 1)):
        raise Failed(f"steps {steps[:5]} ... {steps[-5:]} in the ledger, checkpoint of {step_of_latest(run)}")
    shutil.rmtree(folder)
    return {"points": 11, "slowest_refusal_s": round(longest, 2)}


def _first_to_end(*started: Any) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for one in started:
            if one.has_ended:
                return one
    raise Failed("two starts at once, and both go on")
