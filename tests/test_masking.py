"""Which tokens a masked language model has to guess: how many, behind what, and the same whoever asks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lm_train import data
from lm_train.data import IGNORED, MaskedTextDataModule
from lm_train.data.masking import Masking
from lm_train.plan import Plan
from lm_train.recipe import Recipe, load
from lm_train.runs import RunFolder, read_jsonl
from lm_train.train import train

NewRun = Callable[..., RunFolder]
BERT = "model={kind: bert, n_layer: 1, n_head: 2, n_embd: 32, block_size: 32, dropout: 0.0}"


def opened(run: RunFolder, recipe: Recipe | None = None) -> MaskedTextDataModule:
    recipe, plan = recipe or load([f"recipe={run.recipe}"]), Plan.read(run.plan)
    module = data.build(recipe.data, plan, recipe.seed, run)
    module.prepare(recipe.model)
    assert isinstance(module, MaskedTextDataModule)
    return module


@pytest.mark.parametrize(("length", "fraction", "k"), [(128, 0.15, 19), (10, 0.15, 2), (3, 0.15, 1), (1, 0.9, 1)])
def test_every_block_hides_exactly_as_many(length: int, fraction: float, k: int) -> None:
    masking = Masking(fraction, vocab_size=50, mask_id=50)
    tokens = np.random.default_rng(0).integers(0, 50, length)
    for key in range(20):
        seen, chosen, kept = masking.hide(tokens, key)
        assert len(chosen) == len(set(chosen.tolist())) == k == masking.count(length)
        assert (kept == tokens[chosen]).all()
        untouched = np.setdiff1d(np.arange(length), chosen)
        assert (seen[untouched] == tokens[untouched]).all()


def test_shares_are_berts_and_places_are_even() -> None:
    masking = Masking(0.15, vocab_size=1000, mask_id=1000)
    tokens, places, what = np.arange(200), Counter[int](), Counter[str]()
    for key in range(2000):
        seen, chosen, kept = masking.hide(tokens, key)
        places.update(chosen.tolist())
        for new, old in zip(seen[chosen].tolist(), kept.tolist(), strict=True):
            what["mask" if new == 1000 else "same" if new == old else "random"] += 1
    n = sum(what.values())
    assert n == 2000 * 30
    for name, share in (("mask", 0.8), ("random", 0.1), ("same", 0.1)):
        assert what[name] / n == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / n)), name
    assert min(places.values()) > 300 - 5 * math.sqrt(300)
    assert max(places.values()) < 300 + 5 * math.sqrt(300)


def test_two_ranks_get_what_one_gets(new_run: NewRun) -> None:
    one = opened(new_run(BERT, name="one")).train_batches(0)
    halves = opened(new_run(BERT, "trainer.devices=2", "trainer.strategy=ddp", name="two"))
    ranks = [halves.train_batches(rank) for rank in range(2)]
    for step in (0, 7, 49):
        whole, parts = one[step], [rank[step] for rank in ranks]
        for name in ("tokens", "positions", "targets"):
            assert torch.equal(whole[name], torch.cat([part[name] for part in parts])), name
        assert {part["total"] for part in parts} == {whole["total"]} == {whole["targets"].numel()}


def test_masks_change_with_the_epoch_and_the_seed(new_run: NewRun) -> None:
    words = (BERT, "trainer.max_steps=200")
    folder = new_run(*words)
    module = opened(folder)
    batches = module.train_batches(0)
    again = opened(folder, load([f"recipe={folder.recipe}", "seed=99"])).train_batches(0)
    assert not torch.equal(batches[0]["positions"], again[0]["positions"])
    epochs, samples = np.array([0, 1]), np.array([5, 5])
    rows = np.tile(np.arange(33), (2, 1))
    first, second = batches._batch(rows, epochs, samples)["positions"]
    assert not torch.equal(first, second)


def test_evaluation_covers_the_split_with_the_same_masks_in_every_run(new_run: NewRun) -> None:
    one = opened(new_run(BERT, "data.micro_batch_size=4", name="one"))
    two = opened(new_run(BERT, "trainer.devices=2", "trainer.strategy=ddp", "seed=5", name="two"))
    n = one.corpus.tokens("val").available()
    assert n % 32, "the last block is short"

    def guesses(module: MaskedTextDataModule, ranks: int) -> list[tuple]:
        found = []
        for rank in range(ranks):
            batches = module.evaluation_batches("val", rank)
            for i in range(len(batches)):
                batch = batches[i]
                for row in range(len(batch["tokens"])):
                    wanted = batch["targets"][row] != IGNORED
                    if wanted.any():
                        kept = (batch["positions"][row][wanted].tolist(), batch["targets"][row][wanted].tolist())
                        found.append((batch["tokens"][row].tolist(), int(batch["lengths"][row]), *kept))
        return sorted(found)

    found = guesses(one, 1)
    assert found == guesses(two, 2)
    assert sum(length for _, length, _, _ in found) == n
    masking = Masking(0.15, 257, 257)
    assert sum(len(at) for _, _, at, _ in found) == (n // 32) * masking.count(32) + masking.count(n % 32)


def test_the_mask_symbol_is_one_more_id(new_run: NewRun) -> None:
    folder = new_run(BERT)
    module = opened(folder)
    assert module.facts.vocab_size == 258 == Plan.read(folder.plan).vocab_size
    assert module.tokenizer.token_to_id("[MASK]") == 257 == module.masking.mask_id
    module.leave(folder)
    assert '"[MASK]"' in folder.tokenizer.read_text(encoding="utf-8")
    assert module.facts.guessed_fraction == 5 / 32


def test_a_vocabulary_without_room_for_it_is_refused() -> None:
    words = ["recipe=gpt_debug", BERT, "data.tokenizer=bytes"]
    with pytest.raises(Exception, match=r"257 ids and the task 1 more, model.vocab_size=257 is smaller"):
        load([*words, "model.vocab_size=257"])
    assert load([*words, "model.vocab_size=258"]).model.vocab_size == 258


def test_metrics_equal_a_plain_count(new_run: NewRun, text_file: Path) -> None:
    folder = new_run(BERT, "trainer.max_steps=3", "data.micro_batch_size=4", "trainer.accumulate_grad_batches=4")
    assert train(folder) == 0
    (row,) = [row for row in read_jsonl(folder.metrics) if "val/loss" in row]
    module = opened(folder)
    batches = module.evaluation_batches("val", 0)
    wanted = torch.cat([batches[i]["targets"].flatten() for i in range(len(batches))])
    wanted = wanted[wanted != IGNORED]
    tokens = module.corpus.tokens("train")
    counted = Counter(tokens.rows(np.zeros(1, dtype=np.int64), tokens.available())[0].tolist())
    assert counted.most_common(1)[0][0] == module.most_frequent_token
    assert row["val/unigram_accuracy"] == pytest.approx(
        (wanted == module.most_frequent_token).double().mean().item(), rel=1e-6
    )
    assert row["val/perplexity"] == pytest.approx(math.exp(row["val/loss"]), rel=1e-5)
    assert 0 < row["val/accuracy"] < 1
