"""Positions that a run leaves out: which step takes what, for every kind of batches, at any number of processes."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from lm_train import data
from lm_train.data import TextDataModule
from lm_train.data.batches import Batch, Integers, Samples
from lm_train.data.order import Skipped, first_position, joined
from lm_train.data.text_classes import WINDOW, BucketBatches
from lm_train.recipe import load
from lm_train.runs import RunFolder
from tests.text_data import plan_of, prepared


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_every_position_outside_of_the_ranges_is_taken_once() -> None:
    draw = random.Random(4)
    for _ in range(200):
        size = draw.randint(1, 7)
        skipped: Skipped = ()
        for _ in range(draw.randint(0, 4)):  # as they come about: whole steps of the run as it is by then
            start = first_position(draw.randint(0, 30), size, skipped)
            skipped = joined((*skipped, (start, start + size * draw.randint(1, 5))))
        steps = 60
        firsts = [first_position(step, size, skipped) for step in range(steps)]
        taken = [first + i for first in firsts for i in range(size)]
        left_out = [p for start, stop in skipped for p in range(start, stop)]
        assert sorted(taken + left_out)[: steps * size] == list(range(steps * size))
        assert len(set(taken)) == len(taken)
        assert not set(taken) & set(left_out)


def test_steps_before_a_range_stay_where_they_were() -> None:
    assert [first_position(step, 8, ((24, 40),)) for step in range(5)] == [0, 8, 16, 40, 48]


def test_a_batch_of_another_size_does_not_reach_into_a_range() -> None:
    ranges = ((8, 12), (21, 23))
    firsts = [first_position(step, 5, ranges) for step in range(6)]
    assert all(first + 5 <= start or first >= stop for first in firsts for start, stop in ranges)
    assert all(b - a >= 5 for a, b in itertools.pairwise(firsts))


def test_ranges_are_sorted_and_joined() -> None:
    assert joined([[24, 32], [0, 8], [8, 16], [28, 30]]) == ((0, 16), (24, 32))


@pytest.mark.parametrize(("world", "micro", "accumulate"), [(1, 6, 1), (2, 3, 1), (3, 1, 2)])
def test_text_without_the_skipped_steps(tmp_path: Path, world: int, micro: int, accumulate: int) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{i:04d}" for i in range(600)))
    plain = _global_batches(prepared(file, plan_of(1, 6, steps=40)), 0, ())
    found = _global_batches(prepared(file, plan_of(world, micro, accumulate, steps=20)), 5, ((42, 54), (66, 72)))
    expected = [plain[step] for step in range(5, 40) if step not in (7, 8, 11)][: len(found)]
    assert found == expected


def _global_batches(module: TextDataModule, start_step: int, skipped: Skipped) -> list[list[list[int]]]:
    plan = module.plan
    module.start_step, module.skipped = start_step, skipped
    steps = []
    loaders = []
    for rank in range(plan.world_size):
        module._rank = lambda rank=rank: rank  # type: ignore[method-assign]
        loaders.append(module.train_dataloader().loader.dataset)
    for step in range(plan.max_steps - start_step):
        rows = []
        for part in range(plan.accumulate_grad_batches):
            for loader in loaders:
                rows += loader[step * plan.accumulate_grad_batches + part]["tokens"].tolist()
        steps.append(rows)
    return steps


class _Sized(Samples):
    lengths = np.arange(300) % 37

    def __len__(self) -> int:
        return 300

    def batch(self, samples: Integers, epochs: Integers | None) -> Batch:
        assert epochs is not None
        return {"pairs": list(zip(epochs.tolist(), samples.tolist(), strict=True))}


def test_batches_sorted_by_length_without_the_skipped_steps() -> None:
    plan = plan_of(1, 6, steps=3 * WINDOW)
    plain = BucketBatches(_Sized(), plan, 0, 1, 0)  # type: ignore[arg-type]
    skipping = BucketBatches(_Sized(), plan, 0, 1, 0)  # type: ignore[arg-type]
    skipping.skipped = ((6 * 14, 6 * 18),)
    expected = [plain[step]["pairs"] for step in (*range(14), *range(18, 30))]
    assert [skipping[step]["pairs"] for step in range(26)] == expected


@pytest.mark.parametrize("factory", ["points", "point_stream"])
def test_loaders_of_the_users_own_without_the_skipped_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    monkeypatch.setenv("LM_TRAIN_PLUGINS", "tests")
    words = f'{{kind: custom, factory: "tests.custom_parts:{factory}", global_batch_size: 8, task: classification}}'
    recipe = load(
        ["recipe=gpt_debug", 'model={kind: custom, factory: "tests.custom_parts:point_classifier"}', f"data={words}"]
    )

    def batches(start_step: int, skipped: Skipped, steps: int) -> list[list[list[float]]]:
        plan = plan_of(1, 4, 2, steps=steps)
        module = data.build(recipe.data, plan, 1, RunFolder(tmp_path / "run"))
        module.prepare(recipe.model)
        module.start_step, module.skipped = start_step, skipped
        return [batch["inputs"].tolist() for batch in module.train_dataloader()]

    plain = batches(0, (), 20)
    found = batches(2, ((24, 40), (56, 64)), 12)
    assert found == [plain[2 * step + part] for step in (2, *range(5, 7), *range(8, 15)) for part in (0, 1)]
