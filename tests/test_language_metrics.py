"""Perplexity and bits per byte of a real run against torchmetrics, over uneven batches and two processes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torchmetrics.text import Perplexity

from lm_train import data, models, runs
from lm_train.checkpoint import CheckpointReader, views_of
from lm_train.data import IGNORED
from lm_train.plan import Plan
from lm_train.recipe import load
from lm_train.runs import RunFolder, read_jsonl
from tests.pair import Pair

WORDS = ("trainer.max_steps=4", "data.val_fraction=0.07", "optim={kind: sgd, learning_rate: 0.1}")


@pytest.mark.parametrize(("strategy", "micro"), [("single", 4), ("ddp", 4), ("ddp", 8)])
def test_perplexity_is_that_of_torchmetrics(
    strategy: str, micro: int, new_run: Callable[..., RunFolder], ranks: Callable[..., Pair]
) -> None:
    size = 1 if strategy == "single" else 2
    run = new_run(*WORDS, f"trainer.strategy={strategy}", f"trainer.devices={size}", f"data.micro_batch_size={micro}")
    ranks(strategy, size).run("run", folder=str(run.root))
    recipe, plan = load([f"recipe={run.recipe}"]), Plan.read(run.plan)
    text = data.build(recipe.data, plan, recipe.seed, run)
    text.prepare(recipe.model)
    net = models.build(recipe.model, plan, text.facts)
    checkpoint = runs.latest_checkpoint(run)
    assert checkpoint is not None
    CheckpointReader(checkpoint).load(views_of(net, None, 0, 1))
    perplexity, uneven, targets = Perplexity(ignore_index=IGNORED), 0, 0
    for rank in range(size):
        batches = text.evaluation_batches("val", rank)
        for batch in (batches[i] for i in range(len(batches))):
            counted = int((batch["targets"] != IGNORED).sum())
            targets, uneven = targets + counted, uneven + (counted < micro * 16)
            if counted:
                with torch.no_grad():
                    perplexity.update(net.eval()(batch["tokens"]), batch["targets"])
    assert uneven  # some batch is filled up
    row = [row for row in read_jsonl(run.metrics) if "val/loss" in row][-1]
    expected = float(perplexity.compute())
    assert row["val/perplexity"] == pytest.approx(expected, rel=1e-6)
    assert row["val/loss"] == pytest.approx(math.log(expected), rel=1e-6)
    # one byte a token, with this tokenizer
    assert row["val/bits_per_byte"] == pytest.approx(math.log2(expected), rel=1e-3)
