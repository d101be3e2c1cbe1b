"""Checkpoints of several processes: written beside the training or not, by any number of them, and never unpickled."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lm_train.checkpoint import CheckpointReader
from lm_train.runs import RunFolder
from lm_train.saved import checkpoints_in, newest_good
from lm_train.train import train
from tests.conftest import Ranks
from tests.test_strategies import LOSS_BOUND, NORM_BOUND, curve, difference

NewRun = Callable[..., RunFolder]
SHARDED = ("fsdp", "zero1", "zero2", "zero3")
SAVES = ("trainer.max_steps=8", "checkpoint.every_n_steps=2", "checkpoint.keep_last=9", "trainer.devices=2")


def files_of(run: RunFolder) -> dict[str, bytes]:
    """What stands in all checkpoints of a run but for times: shards, and what their manifests say."""
    found = {}
    for path in checkpoints_in(run.checkpoints):
        for file in path.iterdir():
            if file.suffix == ".safetensors":
                found[f"{path.name}/{file.name}"] = file.read_bytes()
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["files"]["state.json"], manifest["blake2b"]  # holds hours
        found[f"{path.name}/manifest"] = json.dumps(manifest).encode()
    return found


@pytest.mark.parametrize(
    "strategy", ["zero2", *(pytest.param(s, marks=pytest.mark.slow) for s in ("ddp", "fsdp", "zero1", "zero3"))]
)
def test_a_copy_that_is_written_later_is_the_one_of_its_step(ranks: Ranks, new_run: NewRun, strategy: str) -> None:
    """Saves at every second step, which follow one another at once, with the training's collectives under way."""
    both = {}
    for asynchronous in ("true", "false"):
        words = (*SAVES, f"trainer.strategy={strategy}", f"checkpoint.asynchronous={asynchronous}")
        run = new_run(*words, name=f"asynchronous-{asynchronous}")
        answers = ranks(strategy).run("run", folder=str(run.root))
        assert [answer["code"] for answer in answers] == [0, 0]
        both[asynchronous] = files_of(run)
        assert newest_good(run.checkpoints).skipped == []
    assert len(both["true"]) == 4 * 3
    assert both["true"] == both["false"]


@pytest.mark.parametrize(
    "strategy", ["zero3", *(pytest.param(s, marks=pytest.mark.slow) for s in ("ddp", "fsdp", "zero1", "zero2"))]
)
def test_nothing_is_unpickled_on_the_way_back(ranks: Ranks, new_run: NewRun, strategy: str) -> None:
    words = ("trainer.devices=2", f"trainer.strategy={strategy}")
    first = new_run(*words, "trainer.max_steps=2", name="first")
    ranks(strategy).run("run", folder=str(first.root))
    second = new_run(*words, "trainer.max_steps=4", name="second")
    answers = ranks(strategy).run("watched", folder=str(second.root), resume_from=str(first.checkpoints / "step-2"))
    for answer in answers:
        assert answer["code"] == 0
        assert answer["loads"] == []
        assert answer["classes"] == []


SIZES = (1, 2, 3, 4)
LAYOUTS = [("single", 1), *((strategy, size) for strategy in ("ddp", *SHARDED) for size in SIZES[1:])]
WORDS = ("trainer.max_steps=8", "checkpoint.every_n_steps=4", "data.global_batch_size=24", "checkpoint.keep_last=2")


def moves() -> list[tuple[tuple[str, int], tuple[str, int]]]:
    """Every layout as the source of four moves and as the target of four, in a seeded order."""
    draw = random.Random(0)
    found = []
    for _ in range(4):
        targets = LAYOUTS[:]
        draw.shuffle(targets)
        found += list(zip(LAYOUTS, targets, strict=True))
    return sorted(set(found))


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The checkpoint of step 4 of a run under a layout, made once."""
    known: dict[tuple[str, int], Path] = {}

    def of(make: NewRun, layout: tuple[str, int]) -> Path:
        if layout not in known:
            strategy, size = layout
            run = make(
                *WORDS, f"trainer.devices={size}", f"trainer.strategy={strategy}", name=f"from-{strategy}-{size}"
            )
            ranks(strategy, size=size).run("run", folder=str(run.root))
            kept = tmp_path_factory.mktemp(f"{strategy}-{size}") / "step-4"
            (run.checkpoints / "step-4").rename(kept)
            assert CheckpointReader(kept).manifest.world_size == size
            known[layout] = kept
        return known[layout]

    return of


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[tuple[float, float]]]:
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), moves(), ids=lambda layout: f"{layout[0]}x{layout[1]}")
def test_any_layout_goes_on_as_any_other(
    ranks: Ranks, new_run: NewRun, saved, undisturbed, before: tuple[str, int], after: tuple[str, int]
) -> None:
    if not undisturbed:
        alone = new_run(*WORDS, name="undisturbed")
        train(alone)
        undisturbed["curve"] = curve(alone)
    strategy, size = after
    moved = new_run(*WORDS, f"trainer.devices={size}", f"trainer.strategy={strategy}", name="moved")
    answers = ranks(strategy, size=size).run("run", folder=str(moved.root), resume_from=str(saved(new_run, before)))
    assert [answer["code"] for answer in answers] == [0] * size
    largest = difference(undisturbed["curve"][4:], curve(moved))
    print(f"MEASURED {before} -> {after}: {largest}")
    assert largest.loss <= LOSS_BOUND
    assert largest.norm <= NORM_BOUND
