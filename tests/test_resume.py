"""A run that goes on from a checkpoint writes the ledger of one that was never interrupted, byte by byte."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lm_train import ledger
from lm_train.checkpoint import seed_random
from lm_train.errors import ExitCode
from lm_train.runs import RunFolder
from lm_train.train import train
from tests.conftest import Ranks

NewRun = Callable[..., RunFolder]
WORDS = (
    "trainer.max_steps=9",
    "checkpoint.every_n_steps=4",
    "checkpoint.keep_last=9",
    "trainer.log_every_n_steps=3",
    "data.global_batch_size=24",
    "trainer.limit_val_batches=0",
    "model={kind: gpt, n_layer: 2, n_head: 2, n_embd: 32, block_size: 16, dropout: 0.1}",
)


def ledgers(ranks: Ranks, new_run: NewRun, strategy: str, size: int, *words: str) -> tuple[Path, Path]:
    """Of an undisturbed run, and of one that begins at its checkpoint of step 4."""
    words = (*WORDS, f"trainer.devices={size}", f"trainer.strategy={strategy}", *words)
    straight, resumed = new_run(*words, name="straight"), new_run(*words, name="resumed")
    processes = ranks(strategy, size=size)
    assert {answer["code"] for answer in processes.run("run", folder=str(straight.root))} == {0}
    checkpoint = str(straight.checkpoints / "step-4")
    assert {answer["code"] for answer in processes.run("run", folder=str(resumed.root), resume_from=checkpoint)} == {0}
    return straight.ledger, resumed.ledger


def cases() -> list:
    kept = {("single", 1, ()), ("ddp", 3, ()), ("zero2", 2, ())}
    found = []
    for strategy in ("single", "ddp", "fsdp", "zero1", "zero2", "zero3"):
        for size in (1,) if strategy == "single" else (2, 3):
            for words in (
                (),
                ("trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=null"),
                ("trainer.precision=bf16-mixed",),
            ):
                marks = [] if (strategy, size, words) in kept else [pytest.mark.slow]
                name = f"{strategy}-{size}" + "".join(
                    f"-{word.partition('=')[0].partition('.')[2][:9]}" for word in words[:1]
                )
                found.append(pytest.param(strategy, size, words, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("strategy", "size", "words"), cases())
def test_a_resumed_run_writes_the_same_lines(
    ranks: Ranks, new_run: NewRun, strategy: str, size: int, words: tuple[str, ...]
) -> None:
    straight, resumed = ledgers(ranks, new_run, strategy, size, *words)
    assert [row.step for row in ledger.read(straight)] == list(range(1, 10))
    assert [row.step for row in ledger.read(resumed)] == list(range(5, 10))
    assert ledger.compare(straight, resumed, first=5) is None


def test_what_had_stopped_early_does_not_train_on(new_run: NewRun) -> None:
    """As a run that is killed after its last save, while it evaluates its test split."""
    words = ("optim={kind: sgd, learning_rate: 3.0, momentum: 0.0}", "trainer.gradient_clip_val=null")
    words += ("trainer.val_check_interval=2", "trainer.early_stopping_patience=1", "trainer.limit_val_batches=4")
    run = new_run(*words)
    assert train(run) == ExitCode.DONE
    before = run.ledger.read_bytes()
    steps = ledger.last_step(run.ledger)
    assert steps is not None
    assert 4 <= steps < 50
    assert train(run, run.checkpoints / f"step-{steps}") == ExitCode.DONE
    assert run.ledger.read_bytes() == before


def test_lines_beyond_the_checkpoint_vanish(new_run: NewRun) -> None:
    """As after a kill between a ledger's writing and the next save, with a line half written."""
    run = new_run(*WORDS)
    assert train(run) == ExitCode.DONE
    whole = run.ledger.read_bytes()
    lines = whole.splitlines(keepends=True)
    run.ledger.write_bytes(b"".join(lines[:6]) + lines[6][:30])
    assert train(run, run.checkpoints / "step-4") == ExitCode.DONE
    assert run.ledger.read_bytes() == whole


def test_generators_of_a_rank_that_no_checkpoint_knows_are_keyed() -> None:
    """Another number of ranks, or a first start: what Python and NumPy draw is a function of seed, step and rank."""

    def drawn(*key: int) -> tuple[float, float]:
        seed_random(*key)
        return random.random(), float(np.random.random())

    assert drawn(1, 0, 2) == drawn(1, 0, 2)
    assert len({value for rank in range(4) for step in (0, 10) for value in drawn(1, step, rank)}) == 16
