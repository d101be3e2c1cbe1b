"""Training from prepared folders: every sample once, whatever the layout and however often it is killed; what a resume costs."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lm_train.data import MaskedTextDataModule, TextDataModule
from lm_train.data.mixing import train_blocks
from lm_train.data.shard_files import LocalShard
from lm_train.data.text import TrainBatches
from lm_train.errors import DataError
from lm_train.horizon import Horizon
from lm_train.plan import Plan
from lm_train.recipe import BERT, GPT, ShardData
from lm_train.runs import RunFolder
from tests.shard_folders import byte_tokenizer, documents_of, make_folder, write_folder
from tests.text_data import plan_of

T = 4


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def counting_folder(folder: Path, sizes: list[int], first: int = 0) -> Path:
    """Shards of so many tokens, each token one more than the one before: a token tells where it stands."""
    ids = iter(range(first, first + sum(sizes)))
    shards = [[np.array(list(itertools.islice(ids, size)), dtype="<u2")] for size in sizes]
    write_folder(folder, {"train": shards})
    return folder


def module_of(path: Path | str | list[dict[str, Any]], plan: Plan, **options: Any) -> TextDataModule:
    named = {"sources": path} if isinstance(path, list) else {"path": str(path)}
    section = ShardData.model_validate({**named, "global_batch_size": plan.global_batch_size, **options})
    masked = plan.task == "masked_lm"
    module = (MaskedTextDataModule if masked else TextDataModule)(section, plan, 1, RunFolder(Path("unused")))
    module.prepare(BERT() if masked else GPT())
    return module


def batches_of(module: TextDataModule, rank: int, start_step: int = 0) -> TrainBatches:
    module.start_step = start_step
    batches = module.train_batches(rank)
    assert isinstance(batches, TrainBatches)
    return batches


def firsts(batches: Any) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch["tokens"]]


def test_rows_are_the_tokens_as_they_lie_across_shards(tmp_path: Path) -> None:
    folder = counting_folder(tmp_path / "a", [5, 1, 0, 30, 2, 2, 50])
    tokens = module_of(folder, plan_of(micro=2)).corpus.tokens("train")
    for length in (1, 5, 40, 90):
        starts = np.arange(0, 90 - length + 1)
        assert tokens.rows(starts, length).tolist() == [list(range(s, s + length)) for s in starts]


def test_batches_are_the_folders_tokens_and_the_ones_after_them(tmp_path: Path) -> None:
    make_folder(tmp_path / "a")
    module = module_of(tmp_path / "a", plan_of(micro=3, steps=50))
    whole = np.concatenate([np.fromfile(f, "<u2") for f in sorted((tmp_path / "a").glob("train-*.bin"))])
    text = " ".join(map(str, whole))
    for batch in list(batches_of(module, 0)):
        assert batch["total"] == 3 * T
        for row, target in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
            assert row[1:] == target[:-1]
            assert " ".join(map(str, [*row, target[-1]])) in text
    assert module.facts.vocab_size == byte_tokenizer().get_vocab_size()
    assert module.epoch(10) == pytest.approx(10 * 3 * T / len(whole))


@pytest.mark.parametrize("seed", range(4))
def test_each_sample_once_in_an_epoch_over_kills_and_changes_of_layout(seed: int, tmp_path: Path) -> None:
    """Set arithmetic on what the ranks are really given; a kill throws away what came after the last checkpoint."""
    draw = random.Random(seed)
    sizes = [draw.randint(1, 200) for _ in range(draw.randint(1, 5))] + [200]
    folder, size = counting_folder(tmp_path / "a", sizes), 12
    blocks = train_blocks(sum(sizes), T)
    steps = -(-2 * blocks // size)
    seen: list[int] = []
    step = 0
    while step < steps:
        world, accumulate = draw.choice([(1, 1), (2, 1), (3, 2), (4, 1), (4, 3), (1, 4), (2, 3)])
        workers = 2 if draw.random() < 0.2 else 0
        plan = plan_of(world, size // world // accumulate, accumulate, steps, workers)
        saved, killed = sorted((draw.randint(1, 8), draw.randint(1, 8)))
        saved = min(saved, steps - step)
        module = module_of(folder, plan)
        module.horizon = Horizon(min(steps, step + killed))
        ranks = []
        for rank in range(world):
            batches_of(module, rank, step)
            module._rank = lambda rank=rank: rank  # type: ignore[method-assign]
            ranks.append(list(module.train_dataloader()) if workers else list(batches_of(module, rank, step)))
        order = [ranks[r][s * accumulate + m] for s in range(saved) for m in range(accumulate) for r in range(world)]
        seen += firsts(order)
        step += saved
    first, second = seen[:blocks], seen[blocks : 2 * blocks]
    assert sorted(first) == [T * i for i in range(blocks)]
    assert len(set(second)) == len(second) == blocks
    assert len({s % T for s in second}) == 1

    straight = module_of(folder, plan_of(1, size, 1, steps))
    assert firsts(list(batches_of(straight, 0)))[: len(seen)] == seen


def test_sources_keep_their_weights_and_their_own_epochs(tmp_path: Path) -> None:
    counting_folder(tmp_path / "a", [300])
    counting_folder(tmp_path / "b", [100, 60], first=1000)
    sources = [{"path": str(tmp_path / "a"), "weight": 3}, {"path": str(tmp_path / "b"), "weight": 1}]
    found = firsts(list(batches_of(module_of(sources, plan_of(micro=8, steps=100)), 0)))
    of_b = [s for s in found if s >= 1000]
    assert len(of_b) == len(found) / 4
    blocks = train_blocks(160, T)
    assert sorted(of_b[:blocks]) == [1000 + T * i for i in range(blocks)]
    by_tokens = module_of([{"path": each["path"]} for each in sources], plan_of(micro=8, steps=100))
    share = np.mean([s >= 1000 for s in firsts(list(batches_of(by_tokens, 0)))])
    assert share == pytest.approx(160 / 460, abs=0.01)


def test_what_cannot_be_mixed_or_is_too_small(tmp_path: Path) -> None:
    counting_folder(tmp_path / "a", [300])
    counting_folder(tmp_path / "b", [7])
    with pytest.raises(DataError, match=r"b: 7 training tokens make no sample of model.block_size=4"):
        module_of([{"path": str(tmp_path / "a")}, {"path": str(tmp_path / "b")}], plan_of())
    other = byte_tokenizer()
    other.add_tokens(["another"])
    write_folder(tmp_path / "c", {"train": [documents_of(9)]}, other)
    with pytest.raises(DataError, match=r"c: its tokenizer is not that of .*a; prepare both with the same"):
        module_of([{"path": str(tmp_path / "a")}, {"path": str(tmp_path / "c")}], plan_of())


def test_the_fingerprint_tells_other_data_and_another_mixture(tmp_path: Path) -> None:
    counting_folder(tmp_path / "a", [300])
    counting_folder(tmp_path / "b", [300], first=5)
    one, other = ({"path": str(tmp_path / name), "weight": 1} for name in "ab")
    found = [
        module_of(sources, plan_of(), **options).fingerprint
        for sources, options in (
            ([one], {}),
            ([other], {}),
            ([one, other], {}),
            ([other, one], {}),
            ([one, other | {"weight": 2}], {}),
            ([one], {"shuffle_mb": 1}),
        )
    ]
    assert len(set(found)) == len(found)
    assert found[0] == module_of([one], plan_of(), verify="always").fingerprint


def test_a_resume_late_in_an_epoch_costs_what_an_early_one_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is read from the shards and looked up in the order, not by time."""
    folder = counting_folder(tmp_path / "a", [6000] * 10)
    steps = train_blocks(60_000, T) // 4
    touched: list[int] = []
    looked_up: list[int] = []
    read, order = LocalShard.read, "lm_train.data.mixing.BlockOrder._looked_up"
    inner = __import__("lm_train.data.mixing", fromlist=["x"]).BlockOrder._looked_up
    monkeypatch.setattr(LocalShard, "read", lambda self, a, b: touched.append(b - a) or read(self, a, b))
    monkeypatch.setattr(order, lambda self, positions: looked_up.append(len(positions)) or inner(self, positions))
    costs = []
    for start in (steps // 100, 99 * steps // 100):
        touched.clear()
        looked_up.clear()
        batch = batches_of(module_of(folder, plan_of(micro=4, steps=steps)), 0, start)[0]
        assert batch["tokens"].shape == (4, T)
        costs.append((sum(touched), sum(looked_up)))
    assert costs[0] == costs[1]
    assert costs[0][0] == 4 * (T + 1) * 2


def test_a_masked_model_reads_shards_too(tmp_path: Path) -> None:
    make_folder(tmp_path / "a")
    plan = plan_of(micro=4, steps=3).model_copy(update={"task": "masked_lm"})
    module = module_of(tmp_path / "a", plan)
    batch = batches_of(module, 0)[0]
    seen, mask = batch["tokens"], module.masking.mask_id  # type: ignore[attr-defined]
    filled = seen.scatter(1, batch["positions"], batch["targets"])
    assert not (filled == mask).any()
    evaluation = module.evaluation_batches("val", 0)
    assert torch.is_tensor(evaluation[0]["targets"])
