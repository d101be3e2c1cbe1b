"""A run saved under one strategy goes on under another, on one process or two, as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lm_train.runs import RunFolder
from lm_train.train import train
from tests.conftest import Ranks
from tests.test_strategies import LOSS_BOUND, NORM_BOUND, curve, difference

NewRun = Callable[..., RunFolder]
STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")
WORDS = ("trainer.max_steps=20", "checkpoint.every_n_steps=10", "checkpoint.keep_last=2")
WORDS += ("trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.5")


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The checkpoint of step 10 of a run on two processes under a strategy, made once."""
    known: dict[str, Path] = {}

    def of(make: NewRun, strategy: str) -> Path:
        if strategy not in known:
            folder = make(*WORDS, "trainer.devices=2", f"trainer.strategy={strategy}", name=f"from-{strategy}")
            ranks(strategy).run("run", folder=str(folder.root))
            kept = tmp_path_factory.mktemp(strategy) / "step-10"
            (folder.checkpoints / "step-10").rename(kept)
            known[strategy] = kept
        return known[strategy]

    return of


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[tuple[float, float]]]:
    return {}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("after", STRATEGIES)
@pytest.mark.parametrize("before", STRATEGIES)
def test_ten_steps_under_one_and_ten_under_another(
    ranks: Ranks, new_run: NewRun, saved, undisturbed, before: str, after: str, size: int
) -> None:
    if not undisturbed:
        alone = new_run(*WORDS, name="undisturbed")
        train(alone)
        undisturbed["curve"] = curve(alone)
    checkpoint = saved(new_run, before)
    words = (*WORDS, f"trainer.devices={size}", f"trainer.strategy={after}")
    moved = new_run(*words, f"trainer.accumulate_grad_batches={4 // size}", name="moved")
    answers = ranks(after, size=size).run("run", folder=str(moved.root), resume_from=str(checkpoint))
    assert [answer["code"] for answer in answers] == [0] * size
    largest = difference(undisturbed["curve"][10:], curve(moved))
    print(f"MEASURED {before} on 2 -> {after} on {size}: {largest}")
    assert largest.loss <= LOSS_BOUND
    assert largest.norm <= NORM_BOUND
