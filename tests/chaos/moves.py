"""Runs that go on with other numbers of processes, and under other strategies.

Where the sums over ranks are made in another order, the numbers differ in their last bits, and training makes these
differences larger: samples must be the same to the byte, losses within a bound.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Sequence
from typing import Any

from lm_train import ledger
from lm_train.ledger import Row
from tests.chaos.bench import STEPS, Bench, Failed
from tests.chaos.kills import REQUEUE, new_folder, step_of_latest

EARLY, BOUND, LATER = 20, 1e-6, 1e-5
"""Relative difference of a loss that is allowed in the first steps, which see a change of layout already; and after these."""
WHOLE = (
    "model={kind: gpt, n_layer: 2, n_head: 2, n_embd: 32, block_size: 16, dropout: 0.0}",
    "data.global_batch_size=12",
)
"""Dropout is drawn for each rank, and so for each number of them: another one is another training."""
MICRO = ("data.micro_batch_size=1",)
"""Fits every number of ranks that divides the global batch."""


def worlds(bench: Bench, case: int, draw: random.Random) -> dict[str, Any]:
    """4 processes, then 2, 1 and 3, or in another order, killed in between; compared with one process throughout."""
    counts = [4, 2, 1, 3]
    if case % 3:
        draw.shuffle(counts)
    stages = [(f"trainer.devices={n}", f"trainer.strategy={'ddp' if n > 1 else 'auto'}") for n in counts]
    return _moved(bench, f"worlds-{case}", stages, draw) | {"stages": counts}


def strategies(bench: Bench, case: int, draw: random.Random) -> dict[str, Any]:
    """Through the strategies in a drawn order, killed in between."""
    names = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
    draw.shuffle(names)
    stages = [("trainer.devices=2", f"trainer.strategy={name}") for name in names[:4]]
    return _moved(bench, f"strategies-{case}", stages, draw) | {"stages": names[:4]}


def _moved(bench: Bench, name: str, stages: Sequence[Sequence[str]], draw: random.Random) -> dict[str, Any]:
    single = (*WHOLE, "trainer.devices=1", *MICRO)
    straight = bench.straight(*single)
    reference = [ledger.parse(line) for line in straight.ledger.splitlines()]
    run = new_folder(bench, name)
    folder = run.root.parent
    for number, stage in enumerate(stages):
        command = bench.words(folder, *WHOLE, *stage, *MICRO)
        last = number == len(stages) - 1
        before = step_of_latest(run)
        until = 0 if last else draw.randrange(15 * number + 11, 15 * number + 15)
        kill = {"rank": 0, "phase": "step", "step": until, "signal": int(signal.SIGKILL), "to": "all"}
        ended = bench.start(command, [] if last else [kill], name=f"{name}/output").wait()
        if ended.status != (0 if last else REQUEUE):
            raise Failed(f"{stage} from step {before} ended with {ended.status}:\n{ended.output[-1500:]}")
    rows = list(ledger.read(run.ledger))
    worst = compare(reference, rows)
    shutil.rmtree(folder)
    return {"points": 1, **worst}


def compare(reference: Sequence[Row], rows: Sequence[Row]) -> dict[str, float]:
    """The largest relative differences of a loss.

    Raises:
        Failed: for other steps or samples, or a difference beyond the bound.
    """
    if [row.step for row in rows] != list(range(1, STEPS + 1)):
        raise Failed(f"steps {[row.step for row in rows]}")
    worst = {BOUND: 0.0, LATER: 0.0}
    for expected, row in zip(reference, rows, strict=True):
        if row.samples != expected.samples or row.learning_rate != expected.learning_rate:
            raise Failed(f"step {row.step}: {row} instead of {expected}")
        one, other = float.fromhex(row.loss), float.fromhex(expected.loss)
        bound, difference = BOUND if row.step <= EARLY else LATER, abs(one - other) / abs(other)
        if not difference <= bound:
            raise Failed(f"step {row.step}: the loss differs by {difference:.2e} of itself, beyond {bound:.0e}")
        worst[bound] = max(worst[bound], difference)
    return {"largest_difference_early": worst[BOUND], "largest_difference_later": worst[LATER]}
