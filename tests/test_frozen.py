"""Parameters that are not trained, or that the loss does not reach: kept in checkpoints, moved between strategies, named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lm_train import models
from lm_train.checkpoint import CheckpointReader
from lm_train.errors import ExitCode
from lm_train.plan import DataFacts, Plan
from lm_train.recipe import load
from lm_train.runs import RunFolder
from lm_train.train import train
from tests.conftest import Ranks
from tests.test_strategies import LOSS_BOUND, NORM_BOUND, curve, difference

NewRun = Callable[..., RunFolder]
FROZEN = ("model.embedding.weight", "model.blocks.0.weight", "model.blocks.0.bias")


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_TRAIN_PLUGINS", "tests")


def model_word(function: str, args: str = "{}") -> str:
    return f'model={{kind: custom, factory: "tests.custom_parts:{function}", args: {args}, block_size: 16}}'


def run(ranks: Ranks, folder: RunFolder, strategy: str, resume_from: Path | None = None) -> None:
    if strategy == "single":
        assert train(folder, resume_from) == ExitCode.DONE
    else:
        ranks(strategy).run("run", folder=str(folder.root), resume_from=resume_from and str(resume_from))


def words_of(strategy: str) -> tuple[str, ...]:
    return (f"trainer.strategy={strategy}", *(() if strategy == "single" else ("trainer.devices=2",)))


def saved(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(checkpoint)
    shapes = {name: stored.shape for name, stored in reader.manifest.tensors.items()}
    return {
        name: reader.read(name, "param", 0, torch.Size(shape).numel()).view(shape) for name, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("first", "second"),
    [("zero2", "zero3"), ("zero3", "fsdp"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (
        ("single", "single"), ("ddp", "zero1"), ("fsdp", "zero2"), ("zero1", "ddp"), ("zero3_offload", "zero3_offload")))],
)  # fmt: skip
def test_frozen_parameters_are_saved_and_restored(ranks: Ranks, new_run: NewRun, first: str, second: str) -> None:
    """The run that goes on has built others, so that whatever is not restored shows in the loss, and in its checkpoint."""
    whole = new_run(model_word("half_frozen"), "trainer.max_steps=8", name="whole")
    before = new_run(model_word("half_frozen"), "trainer.max_steps=4", *words_of(first), name="before")
    after = new_run(model_word("half_frozen", "{shift: 0.5}"), "trainer.max_steps=8", *words_of(second), name="after")
    run(ranks, whole, "single")
    run(ranks, before, first)
    run(ranks, after, second, before.checkpoints / "step-4")
    largest = difference(curve(whole), curve(before) + curve(after))
    assert largest.loss <= LOSS_BOUND
    assert largest.norm <= NORM_BOUND
    recipe, plan = load([f"recipe={whole.recipe}"]), Plan.read(whole.plan)
    torch.manual_seed(recipe.seed)
    initial = models.build(recipe.model, plan, DataFacts(vocab_size=257)).state_dict()
    for folder, step in ((whole, 8), (before, 4), (after, 8)):
        found = saved(folder.checkpoints / f"step-{step}")
        assert set(found) == set(initial)
        for name in initial:
            assert torch.equal(found[name], initial[name]) == (name in FROZEN), name


@pytest.mark.parametrize("strategy", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_frozen_parameters_of_sixteen_bits(ranks: Ranks, new_run: NewRun, strategy: str) -> None:
    words = (*words_of(strategy), "trainer.precision=bf16-mixed")
    whole = new_run(model_word("half_frozen"), "trainer.max_steps=8", *words, name="whole")
    before = new_run(model_word("half_frozen"), "trainer.max_steps=4", *words, name="before")
    after = new_run(model_word("half_frozen", "{shift: 0.5}"), "trainer.max_steps=8", *words, name="after")
    run(ranks, whole, strategy)
    run(ranks, before, strategy)
    run(ranks, after, strategy, before.checkpoints / "step-4")
    assert curve(before) + curve(after) == curve(whole)
    ends = [saved(folder.checkpoints / "step-8") for folder in (whole, after)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_ddp_names_the_parameters_that_get_no_gradient(ranks: Ranks, new_run: NewRun) -> None:
    folder = new_run(model_word("unused_parameter"), "trainer.max_steps=3", *words_of("ddp"))
    for said in ranks("ddp").run("refusal", folder=str(folder.root)):
        assert "no gradient to model.spare.weight, model.spare.bias, which ddp cannot train" in said
        assert "\n" not in said
    assert not curve(folder)


def test_fsdp_trains_without_them(ranks: Ranks, new_run: NewRun) -> None:
    one, both = (
        new_run(model_word("unused_parameter"), "trainer.max_steps=4", *words_of(strategy), name=strategy)
        for strategy in ("single", "fsdp")
    )
    run(ranks, one, "single")
    run(ranks, both, "fsdp")
    assert difference(curve(one), curve(both)).loss <= LOSS_BOUND
