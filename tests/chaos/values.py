"""Bad numbers: a loss that is not finite on one rank, a spike, a flipped bit of a parameter; with kills beside them."""

from __future__ import annotations

import random
import re
import shutil
import signal
from typing import Any

import lightning.pytorch as L
import torch

from lm_train import ledger
from tests.chaos.bench import STEPS, Bench, Failed
from tests.chaos.kills import LAYOUTS, REQUEUE, check_same, finish, new_folder, step_of_latest, words_of

IN_VAIN, BUG = 76, 70


class Flip(L.Callback):
    """Flips one bit of a parameter on this rank after a step."""

    def __init__(self, step: int, bit: int) -> None:
        self.step, self.bit = step, bit

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            parameters = list(pl_module.net.parameters())
            with torch.no_grad():
                bits = parameters[self.bit % len(parameters)].view(torch.int32).view(-1)
                bits[self.bit % bits.numel()] ^= 1 << self.bit % 23


def not_finite(bench: Bench, case: int, draw: random.Random) -> dict[str, Any]:
    """One rank's loss or gradient is bad at two steps: both withheld, and the same ledger with a kill in between.

    Every fifth: steps in a row, more than patience has, so that there are enough of them again when the run has gone back,
    be it to a checkpoint amid them: ends with 76 and says so.
    """
    layout = list(LAYOUTS)[case % len(LAYOUTS)]
    words = (*words_of(layout), "trainer.spike_threshold=8", "trainer.spike_window=16")
    world = int(words[0].rpartition("=")[2])
    what = draw.choice(("nan", "inf", "times"))
    name = f"values-{case}"
    ever = case % 5 == 4
    first = draw.randrange(24, 36)
    steps = list(range(first, first + 6)) if ever else sorted(draw.sample(range(24, 55), 2))
    spoil = {"spoil": steps, "what": "nan" if ever else what, "rank": draw.randrange(world)}
    whole = new_folder(bench, f"{name}-whole")
    ended = bench.start(bench.words(whole.root.parent, *words), [spoil], name=f"{name}-whole/output").wait()
    if ever:
        if ended.status != IN_VAIN or "Traceback" in ended.output:
            raise Failed(f"{spoil}: ended with {ended.status}, expected 76:\n{ended.output[-1500:]}")
        shutil.rmtree(whole.root.parent)
        return {"points": 1, "spoil": spoil}
    withheld = [row.step for row in ledger.read(whole.ledger) if row.withheld]
    if ended.status != 0 or withheld != steps:
        raise Failed(f"{spoil}: ended with {ended.status}, withheld {withheld}:\n{ended.output[-1500:]}")
    run = new_folder(bench, name)
    command = bench.words(run.root.parent, *words)
    kill = {
        "rank": draw.randrange(world),
        "phase": "step",
        "step": draw.randrange(steps[0], 58),
        "signal": int(signal.SIGKILL),
    }
    ended = bench.start(command, [spoil, kill], name=f"{name}/output").wait()
    if ended.status != REQUEUE:
        raise Failed(f"{spoil}, {kill}: ended with {ended.status}:\n{ended.output[-1500:]}")
    ended = bench.start(command, [spoil], name=f"{name}/output").wait()
    if ended.status != 0 or run.ledger.read_bytes() != whole.ledger.read_bytes():
        raise Failed(
            f"{spoil}, {kill}: {ended.status}, {ledger.compare(run.ledger, whole.ledger)}:\n{ended.output[-800:]}"
        )
    if bench.digest(run) != bench.digest(whole):
        raise Failed(f"{spoil}, {kill}: the same ledger, other weights")
    for folder in (run, whole):
        shutil.rmtree(folder.root.parent)
    return {"points": 1, "spoil": spoil, "kill": kill}


def flipped(bench: Bench, case: int, draw: random.Random) -> dict[str, Any]:
    """A bit of one rank's parameters: found, the rank named, no checkpoint of it; then the same ledger."""
    layout = "ddp x4" if case % 2 else "ddp x2"
    words = words_of(layout)
    every = draw.choice((1, 3, 7))
    name = f"replica-{case}"
    run = new_folder(bench, name)
    step, rank = draw.randrange(12, STEPS - 12), draw.randrange(4 if case % 2 else 2)
    command = bench.words(run.root.parent, *words)
    flip = {"flip": step, "bit": draw.randrange(2**31), "rank": rank}
    ended = bench.start(
        [*command, f"trainer.replica_check_every_n_steps={every}"], [flip], name=f"{name}/output"
    ).wait()
    context = f"{flip}, compared every {every} steps"
    left = step_of_latest(run)
    named = re.search(rf"rank {rank}\b", ended.output)
    if ended.status != BUG or (case % 2 and not named) or left > step:
        raise Failed(f"{context}: ended with {ended.status}, newest checkpoint {left}:\n{ended.output[-1500:]}")
    finish(bench, name, command, run, context)
    check_same(bench, run, words, context)
    shutil.rmtree(run.root.parent)
    return {"points": 1, "flip": flip, "every": every}
