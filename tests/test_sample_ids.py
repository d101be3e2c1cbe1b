"""What the ledger says of the samples of a step is what the ranks were given, for every kind of data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lm_train.data.batches import Batch, Integers, SampleBatches, StepBatches
from lm_train.data.text import TrainBatches
from lm_train.data.text_classes import BucketBatches, SizedSamples
from lm_train.plan import Plan
from tests.test_data import counting_text
from tests.text_data import plan_of, prepared

LAYOUTS = [(1, 12, 1), (2, 3, 2), (3, 4, 1)]
SKIPPED = ((24, 48), (72, 84))


class Told(SizedSamples):
    """Gives back what it is asked for."""

    lengths = np.random.default_rng(0).integers(1, 50, 60)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, samples: Integers, epochs: Integers | None) -> Batch:
        assert epochs is not None
        return {"ids": torch.from_numpy(np.stack((epochs, samples), axis=1))}


class ToldBlocks(TrainBatches):
    def _batch(self, rows: Integers, epochs: Integers, samples: Integers) -> Batch:
        return {"ids": torch.from_numpy(np.stack((epochs, samples), axis=1))}


def batches_of(kind: str, plan: Plan, rank: int, start: int, folder: Path) -> StepBatches:
    if kind == "samples":
        return SampleBatches(Told(), plan, rank, seed=1, start_step=start)
    if kind == "buckets":
        return BucketBatches(Told(), plan, rank, seed=1, start_step=start)
    file = folder / "text.txt"
    data = prepared(file if file.exists() else counting_text(file), plan, streaming=kind == "stream")
    return ToldBlocks(data.corpus.tokens("train"), plan, rank, 1, start, data.streaming)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: "x".join(map(str, x)))
@pytest.mark.parametrize("kind", ["samples", "buckets", "text", "stream"])
@pytest.mark.parametrize("skipped", [(), SKIPPED], ids=["all", "skipping"])
def test_the_ids_are_those_that_the_ranks_get(
    kind: str, layout: tuple[int, int, int], skipped: tuple[tuple[int, int], ...], tmp_path: Path, cache: Path
) -> None:
    world, micro, accumulate = layout
    plan, start = plan_of(world, micro, accumulate, steps=20), 3
    ranks = [batches_of(kind, plan, rank, start, tmp_path) for rank in range(world)]
    elsewhere = batches_of(kind, plan_of(1, 12, 1, steps=20), 0, 0, tmp_path)
    for batches in (*ranks, elsewhere):
        batches.skipped = skipped
    seen = []
    for step in range(start, 20):
        given = [ranks[r][(step - start) * accumulate + m]["ids"] for m in range(accumulate) for r in range(world)]
        ids = elsewhere.sample_ids(step)
        assert ids is not None
        assert ids.dtype == np.int64
        assert ids.shape == (12, 2)
        assert np.array_equal(torch.cat(given).numpy(), ids)
        seen += [tuple(pair) for pair in ids.tolist()]
    assert len(set(seen)) == len(seen), "a sample came twice in an epoch"
