"""Recurrent networks on two real processes against one: the same losses, norms and validations, under every strategy."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lm_train.errors import ExitCode
from lm_train.runs import RunFolder, read_jsonl
from lm_train.train import train
from tests.conftest import Ranks
from tests.test_strategies import LOSS_BOUND, NORM_BOUND, STRATEGIES, curve, difference

NewRun = Callable[..., RunFolder]
STEPS = "trainer.max_steps=12"
TINY_NET = "cell: lstm, n_layer: 2, n_embd: 16, hidden_size: 12, dropout: 0.0"


@pytest.fixture(scope="session")
def labelled_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of 3 to 40 words in three classes of unequal size, each with favourite words."""
    draw = random.Random(0)
    words = {"sport": "goal team win match", "tech": "chip code net data", "arts": "film book song play"}
    rows = []
    for _ in range(240):
        label = draw.choices(list(words), (6, 3, 1))[0]
        favourites = words[label].split()
        common = ["the", "of", "a", "and", "on"]
        some = [draw.choice(favourites if draw.random() < 0.3 else common) for _ in range(draw.randint(3, 40))]
        rows.append({"text": " ".join(some), "label": label})
    file = tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def words_of(task: str, labelled_file: Path) -> tuple[str, ...]:
    if task == "language_model":
        return (f"model={{kind: recurrent, {TINY_NET}, block_size: 16}}", STEPS)
    return (
        f"model={{kind: recurrent, {TINY_NET}, bidirectional: true, pooling: max}}",
        "data=text_classes",
        f"data.path={labelled_file}",
        "data.tokenizer=words:100",
        "data.class_weights=balanced",
        "data.token_dropout=0.1",
        STEPS,
    )


@pytest.fixture(scope="session")
def expected(cache: Path) -> dict[tuple[str, ...], tuple[list[tuple[float, float]], dict[str, float]]]:
    """What one process computes, by words."""
    return {}


def last_validation(folder: RunFolder) -> dict[str, float]:
    return [row for row in read_jsonl(folder.metrics) if "val/loss" in row][-1]


@pytest.mark.parametrize("task", ["classifier", "language_model"])
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    "strategy", [s if s in ("ddp", "fsdp", "zero3") else pytest.param(s, marks=pytest.mark.slow) for s in STRATEGIES]
)
def test_two_processes_compute_what_one_computes(
    ranks: Ranks, new_run: NewRun, labelled_file: Path, expected, task: str, accumulate: int, strategy: str
) -> None:
    words = (*words_of(task, labelled_file), f"trainer.accumulate_grad_batches={accumulate}")
    if words not in expected:
        alone = new_run(*words, name="alone")
        assert train(alone) == ExitCode.DONE
        expected[words] = curve(alone), last_validation(alone)
    both = new_run(*words, "trainer.devices=2", f"trainer.strategy={strategy}", name="both")
    assert [answer["code"] for answer in ranks(strategy).run("run", folder=str(both.root))] == [0, 0]
    losses, validation = expected[words]
    largest = difference(losses, curve(both))
    print(f"MEASURED {strategy} {task} accumulate {accumulate} {largest}")
    assert largest.loss <= LOSS_BOUND
    assert largest.norm <= NORM_BOUND
    assert len(losses) == 12
    found = last_validation(both)
    assert validation.keys() == found.keys()
    for name in (name for name in validation if name.startswith("val/")):
        assert found[name] == pytest.approx(validation[name], rel=NORM_BOUND), name


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_one_process_goes_on_from_two_that_share_the_cells(
    ranks: Ranks, new_run: NewRun, labelled_file: Path, strategy: str
) -> None:
    words = (*words_of("classifier", labelled_file), "checkpoint.every_n_steps=6", "checkpoint.keep_last=2")
    both = new_run(*words, "trainer.devices=2", f"trainer.strategy={strategy}", name="both")
    ranks(strategy).run("run", folder=str(both.root))
    alone = new_run(*words, name="alone")
    assert train(alone, both.checkpoints / "step-6") == ExitCode.DONE
    largest = difference(curve(both)[6:], curve(alone))
    assert largest.loss <= LOSS_BOUND
    assert largest.norm <= NORM_BOUND
