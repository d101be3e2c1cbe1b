"""A LightningDataModule of the user's own: each rank takes its share of its batches, in an order that a resume keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from lm_train import data, runs
from lm_train.data.streams import Places, places_of, resume_in_words
from lm_train.errors import DataError, ExitCode, UsageError
from lm_train.hardware import Machine
from lm_train.plan import Plan, make_plan
from lm_train.recipe import load
from lm_train.runs import RunFolder, read_jsonl
from lm_train.train import train
from tests.conftest import Ranks
from tests.custom_parts import PointStream
from tests.test_strategies import LOSS_BOUND, NORM_BOUND, curve, difference

NETS = {
    "plain": ("point_classifier", "{}"),
    "pairs": ("pair_module", "{pairs: true}"),
}


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_TRAIN_PLUGINS", "tests")


@pytest.fixture
def points_run(tmp_path: Path) -> Callable[..., RunFolder]:
    def make(model: str, *words: str, name: str = "run", factory: str = "points", args: str = "{}") -> RunFolder:
        given = {
            "recipe": "gpt_debug",
            "model": model if "{" in model else f'{{kind: custom, factory: "tests.custom_parts:{model}"}}',
            "data": f'{{kind: custom, factory: "tests.custom_parts:{factory}", args: {args}, global_batch_size: 8, '
            "micro_batch_size: 4, task: classification}",
            "optim": "{kind: sgd, learning_rate: 0.1, schedule: constant}",
            "trainer.max_steps": "15", "trainer.log_every_n_steps": "1", "trainer.val_check_interval": "null",
            "trainer.limit_val_batches": "null", "tracking.wandb": "disabled", "name": name, "runs_dir": str(tmp_path),
        }  # fmt: skip
        given |= dict(word.split("=", 1) for word in words)
        recipe = load([f"{key}={value}" for key, value in given.items()])
        return runs.create(recipe, make_plan(recipe, Machine(cpu_cores=2, gpus=())))

    return make


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_compute_what_one_computes(
    ranks: Ranks, points_run: Callable[..., RunFolder], net: str, strategy: str
) -> None:
    model, args = NETS[net]
    one = points_run(model, args=args, name="alone")
    both = points_run(model, "trainer.devices=2", f"trainer.strategy={strategy}", args=args, name="both")
    assert train(one) == ExitCode.DONE
    ranks(strategy).run("run", folder=str(both.root))
    largest = difference(curve(one), curve(both))
    assert largest.loss <= LOSS_BOUND
    assert largest.norm <= NORM_BOUND
    (a,), (b,) = ([row for row in read_jsonl(f.metrics) if "val/loss" in row] for f in (one, both))
    assert b["val/loss"] == pytest.approx(a["val/loss"], rel=1e-5)
    assert a["val/loss"] < 0.5


def test_a_resumed_run_goes_on_at_its_place_in_the_order(points_run: Callable[..., RunFolder]) -> None:
    whole = points_run("point_classifier", name="whole")
    half = points_run("point_classifier", "trainer.max_steps=8", name="half")
    rest = points_run("point_classifier", name="rest")
    train(whole)
    train(half)
    train(rest, half.checkpoints / "step-8")
    assert curve(half) + curve(rest) == curve(whole)


def test_ranks_that_shuffle_an_evaluation_share_it_without_overlap(
    points_run: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = points_run("point_classifier", "trainer.devices=2", factory="shuffles_all")
    recipe, plan = load([f"recipe={run.recipe}"]), Plan.read(run.plan)
    orders = []
    for _ in range(2):
        seen: list[int] = []
        for rank in range(2):
            torch.manual_seed(rank)  # as dropout leaves each rank's generator
            module = data.build(recipe.data, plan, recipe.seed, run)
            module.prepare(recipe.model)
            monkeypatch.setattr(module, "_rank", partial(int, rank))
            for batch in module.val_dataloader():
                seen += [int(x) for x, counts in zip(batch["own"], batch["valid"], strict=True) if counts]
            assert int(torch.initial_seed()) == rank
        assert sorted(seen) == list(range(10))
        orders.append(seen)
    assert orders[0] == orders[1] != sorted(orders[0])


def test_nothing_of_preparing_stays_in_the_run_folder(points_run: Callable[..., RunFolder]) -> None:
    run = points_run("point_classifier")
    before = sorted(run.root.iterdir())
    module = data.build(load([f"recipe={run.recipe}"]).data, Plan.read(run.plan), 0, run)
    module.prepare(load([f"recipe={run.recipe}"]).model)
    assert sorted(run.root.iterdir()) == before


def test_a_network_of_ours_learns_from_it(points_run: Callable[..., RunFolder]) -> None:
    run = points_run("{kind: mlp, widths: [8]}")
    assert train(run) == ExitCode.DONE
    assert [row for row in read_jsonl(run.metrics) if "val/accuracy" in row][-1]["val/accuracy"] > 0.8


@pytest.mark.parametrize(
    ("words", "options", "kind", "said"),
    [
        (["data.micro_batch_size=8"], {}, UsageError, "data.micro_batch_size=4"),
        ([], {"factory": "broken_points"}, DataError, "setup failed with OSError: no such thing"),
        ([], {"factory": "point_classifier"}, UsageError, "data.args"),
        ([], {"factory": "nothing"}, UsageError, "expected a LightningDataModule"),
        ([], {"args": "{n: 3}"}, DataError, "no full batch of 4"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    points_run: Callable[..., RunFolder], words: list[str], options: dict[str, str], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind) as raised:
        train(points_run("point_classifier", *words, **options))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_stream_says_before_the_first_step_what_a_resumed_run_makes_of_it() -> None:
    rows = Dataset.from_dict({"x": list(range(9))}).to_iterable_dataset()
    assert "takes the same samples only if" in resume_in_words(rows, says_where=False)
    assert "tells it its place" in resume_in_words(rows.shuffle(seed=3, buffer_size=2), says_where=True)
    assert "whose order cannot be made again" in resume_in_words(rows.shuffle(buffer_size=2), says_where=True)
    assert places_of(DataLoader(rows, batch_size=2)) is not None
    assert places_of(DataLoader(rows, batch_size=2, num_workers=1)) is None
    assert places_of(DataLoader(rows.shuffle(seed=3, buffer_size=2), batch_size=2)) is None
    assert places_of(DataLoader(PointStream(), batch_size=2)) is None
    again = places_of(DataLoader(rows.map(dict), batch_size=2))
    assert again is not None
    assert again.identity != places_of(DataLoader(rows, batch_size=2)).identity  # type: ignore[union-attr]
    assert next(iter(DataLoader(rows, batch_size=9)))["x"].tolist() == list(range(9)), (
        "the stream itself was not touched"
    )


def _count_up() -> Iterator[dict[str, int]]:
    yield from ({"x": i} for i in range(100))


def test_a_validation_of_the_same_source_moves_no_place() -> None:
    def made() -> Places:
        places = places_of(DataLoader(source.skip(20), batch_size=4))
        assert places is not None
        return places

    source = IterableDataset.from_generator(_count_up)
    places = made()
    batches = iter(places.loader)
    for rounds in range(1, 7):
        next(batches)
        places.note(rounds, 0)
        if rounds == 3:
            assert len(list(DataLoader(source.take(20), batch_size=4))) == 5
    assert [place and place.rounds for place in map(places.last, (2, 3, 5, 6, 9))] == [None, 3, 5, 6, 6]
    saved, later = places.last(6), made()
    assert saved is not None
    assert later.identity == places.identity
    later.go_to(json.loads(json.dumps(saved.state)))
    assert next(iter(later.loader))["x"].tolist() == next(batches)["x"].tolist() == [44, 45, 46, 47]


@pytest.mark.parametrize(("buffer", "devices"), [(0, 1), (0, 2), (16, 1)])
def test_a_stream_that_knows_its_place_is_not_read_again(
    buffer: int, devices: int, points_run: Callable[..., RunFolder], ranks: Ranks, tmp_path: Path
) -> None:
    """In its second epoch, on one process and moved on to two; a buffer's content, which its state does not have, is.

    Validations in between read a stream that shares its source with the training's.
    """
    reads = tmp_path / "reads"
    args = f"{{reads: {reads}, buffer: {buffer}}}"
    words = (
        "trainer.max_steps=45",
        "checkpoint.every_n_steps=40",
        "trainer.val_check_interval=19",
        "trainer.limit_val_batches=3",
    )
    whole = points_run("point_classifier", *words, factory="row_stream", args=args, name="whole")
    train(whole)
    assert reads.stat().st_size > 45 * 8
    reads.unlink()
    state = json.loads((whole.checkpoints / "step-40/state.json").read_text())["stream"]
    assert (state == {}) if buffer else (state["epoch"] == 1 and state["passed"] == 40 * 8)
    more = (f"trainer.devices={devices}", "trainer.strategy=ddp") if devices > 1 else ()
    rest = points_run("point_classifier", *words, *more, factory="row_stream", args=args, name="rest")
    step_40 = whole.checkpoints / "step-40"
    if devices == 1:
        train(rest, step_40)
        assert curve(rest) == curve(whole)[40:]
    else:
        ranks("ddp").run("run", folder=str(rest.root), resume_from=str(step_40))
        assert difference(curve(rest), curve(whole)[40:]).loss <= LOSS_BOUND
    # five steps, what is fetched ahead, and the trial before the first step
    assert (reads.stat().st_size > 45 * 8) if buffer else (5 * 8 * devices <= reads.stat().st_size < 120 * devices)
