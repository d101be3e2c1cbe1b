"""Bits flipped and files cut in every file of a checkpoint and in its pointers; and loads of what is whole."""

from __future__ import annotations

import random
import shutil
import signal
from typing import Any

from tests.chaos.bench import Bench, Failed
from tests.chaos.kills import LAYOUTS, REQUEUE, check_same, new_folder, step_of_latest
from tests.chaos.saves import checkpoint_of

BATCH = 100


def _batch(bench: Bench, draw: random.Random, kind: str) -> dict[str, Any]:
    sample = checkpoint_of(bench, *LAYOUTS["ddp x2"])
    answer = bench.call(f"tests.chaos.inside:{kind}", run=str(sample), seed=draw.randrange(2**32), count=BATCH)
    if answer["failures"]:
        raise Failed(f"{len(answer['failures'])} of {BATCH}: {answer['failures'][:3]}")
    return {"points": answer["good"], "files": answer.get("files", {})}


def flips(bench: Bench, case: int, draw: random.Random) -> dict[str, Any]:
    """A hundred single bits, each of which must be found before anything is loaded."""
    return _batch(bench, draw, "flips")


def cuts(bench: Bench, case: int, draw: random.Random) -> dict[str, Any]:
    """A hundred files cut short, emptied, removed or made longer."""
    return _batch(bench, draw, "cuts")


def clean_loads(bench: Bench, case: int, draw: random.Random) -> dict[str, Any]:
    """A hundred whole checkpoints, all read without an alarm."""
    return _batch(bench, draw, "clean_loads")


def resumed_from_damage(bench: Bench, case: int, draw: random.Random) -> dict[str, Any]:
    """The newest checkpoint damaged, then a start: names the file, goes on from the one before, and makes the same ledger."""
    layout = list(LAYOUTS)[case % len(LAYOUTS)]
    words = LAYOUTS[layout]
    name = f"damage-{case}"
    run = new_folder(bench, name)
    folder = run.root.parent
    command = bench.words(folder, *words)
    fault = {"rank": 0, "phase": "step", "step": draw.randrange(32, 58), "signal": int(signal.SIGKILL)}
    ended = bench.start(command, [fault], name=f"{name}/output").wait()
    newest = step_of_latest(run)
    if ended.status != REQUEUE or newest < 20:
        raise Failed(f"it ended with {ended.status} at step {newest}:\n{ended.output[-1500:]}")
    files = sorted((run.checkpoints / f"step-{newest}").iterdir())
    victim = draw.choice(files)
    content = bytearray(victim.read_bytes())
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    victim.write_bytes(content)
    last = bench.start(command, name=f"{name}/output").wait()
    told = last.output[len(ended.output) :]
    if last.status != 0 or victim.name not in told or "going on from step-" not in told:
        raise Failed(f"bit {bit} of {victim.name} flipped: {last.status}:\n{told[-1500:]}")
    check_same(bench, run, words, f"bit {bit} of {victim.name} flipped")
    shutil.rmtree(folder)
    return {"points": 1, "file": victim.name, "newest": newest}
