"""Two real processes against one: the same losses and gradient norms, one stop, no hidden collectives."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from lm_train import runs
from lm_train.errors import ExitCode
from lm_train.runs import RunFolder, read_jsonl
from lm_train.train import train
from tests.pair import Pair

TOLERANCE = 1e-5
NewRun = Callable[..., RunFolder]


def curve(folder: RunFolder) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    return [(row["train/loss"], row["train/grad_norm"]) for row in read_jsonl(folder.metrics) if "train/loss" in row]


def largest_difference(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    assert len(a) == len(b) == 50
    return max(abs(x - y) / abs(x) for pair in zip(a, b, strict=True) for x, y in zip(*pair, strict=True))


@pytest.mark.parametrize("clip", ["null", "0.3"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("optim", ["{kind: adamw, learning_rate: 1e-3}", "{kind: sgd, learning_rate: 0.1}"])
def test_two_processes_compute_what_one_computes(
    ddp_pair: Pair, new_run: NewRun, optim: str, accumulate: int, clip: str
) -> None:
    words = (f"optim={optim}", f"trainer.accumulate_grad_batches={accumulate}", f"trainer.gradient_clip_val={clip}")
    alone, both = new_run(*words, name="alone"), new_run(*words, "trainer.devices=2", name="both")
    assert train(alone) == ExitCode.DONE
    assert [answer["code"] for answer in ddp_pair.run("run", folder=str(both.root))] == [0, 0]
    expected, found = curve(alone), curve(both)
    assert largest_difference(expected, found) <= TOLERANCE
    assert expected[-1][0] < expected[0][0] - 0.5, "nothing was learnt, so nothing was compared"
    if clip != "null":
        assert max(norm for _, norm in expected) > float(clip), "the clipping never bit"


@pytest.mark.parametrize("fault", ["data", "gradient"])
def test_a_fault_on_one_rank_is_seen(ddp_pair: Pair, new_run: NewRun, fault: str) -> None:
    alone, both = new_run(name="alone"), new_run("trainer.devices=2", name="both")
    train(alone)
    ddp_pair.run("run", folder=str(both.root), fault=fault)
    assert largest_difference(curve(alone), curve(both)) > 100 * TOLERANCE


def test_validation_of_an_uneven_split_is_the_same(ddp_pair: Pair, new_run: NewRun) -> None:
    words = ("trainer.max_steps=4", "trainer.val_check_interval=2", "data.micro_batch_size=8")
    alone, both = new_run(*words, name="alone"), new_run(*words, "trainer.devices=2", name="both")
    train(alone)
    ddp_pair.run("run", folder=str(both.root))
    losses = [[row for row in read_jsonl(folder.metrics) if "val/loss" in row] for folder in (alone, both)]
    assert [row["step"] for row in losses[0]] == [2, 4]
    for one, two in zip(*losses, strict=True):
        for key in ("val/loss", "val/perplexity", "val/bits_per_byte"):
            assert two[key] == pytest.approx(one[key], rel=TOLERANCE)
        assert one["val/perplexity"] == pytest.approx(math.exp(one["val/loss"]), rel=1e-6)
        # one byte is one token here
        assert one["val/bits_per_byte"] == pytest.approx(one["val/loss"] / math.log(2), rel=1e-6)


@pytest.mark.parametrize("ranks_after", [1, 2])
def test_a_signal_to_one_rank_stops_both_and_the_run_goes_on(ddp_pair: Pair, new_run: NewRun, ranks_after: int) -> None:
    words = ("trainer.devices=2", "trainer.accumulate_grad_batches=2", "model.dropout=0.0")
    undisturbed, stopped = new_run(*words, name="undisturbed"), new_run(*words, name="stopped")
    ddp_pair.run("run", folder=str(undisturbed.root))
    answers = ddp_pair.run("run", folder=str(stopped.root), stop_at=9)
    assert [answer["code"] for answer in answers] == [ExitCode.REQUEUE, ExitCode.REQUEUE]
    checkpoint = runs.latest_checkpoint(stopped)
    assert checkpoint is not None
    step = json.loads((checkpoint / "state.json").read_text())["step"]
    assert 9 < step < 50
    assert len(curve(stopped)) == step, "both ranks stop at the same step, and it is saved"

    if ranks_after == 2:
        ddp_pair.run("run", folder=str(stopped.root), resume_from=str(checkpoint))
        assert curve(stopped) == curve(undisturbed), "same ranks: every bit"
    else:
        moved = new_run("trainer.accumulate_grad_batches=4", name="stopped")
        train(moved, checkpoint)
        assert largest_difference(curve(undisturbed), curve(moved)) <= TOLERANCE


def test_early_stopping_ends_both_ranks_where_it_ends_one(ddp_pair: Pair, new_run: NewRun) -> None:
    # a learning rate that goes up and down: some validation is worse than the one before
    words = ("optim={kind: sgd, learning_rate: 3.0, momentum: 0.0}", "trainer.gradient_clip_val=null")
    words += ("trainer.val_check_interval=2", "trainer.early_stopping_patience=1")
    alone, both = new_run(*words, name="alone"), new_run(*words, "trainer.devices=2", name="both")
    train(alone)
    assert [answer["code"] for answer in ddp_pair.run("run", folder=str(both.root))] == [0, 0]
    steps = len(curve(alone))
    assert 4 <= steps < 50
    assert len(curve(both)) == steps
    assert json.loads((both.checkpoints / "latest").read_text())["step"] == steps


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_has_no_collective_and_no_host_read_beyond_the_bare_loop(
    ddp_pair: Pair, new_run: NewRun, accumulate: int
) -> None:
    # SGD: Adam on a CPU reads its step counter, a host tensor, once for each parameter
    words = ("trainer.devices=2", f"trainer.accumulate_grad_batches={accumulate}", "optim={kind: sgd}")
    run = new_run(*words, "trainer.max_steps=60", "trainer.log_every_n_steps=50")
    steps = 30
    ours = ddp_pair.run("count", folder=str(run.root), first=10, last=10 + steps)
    bare = ddp_pair.run("count_bare", steps=steps, accumulate=accumulate)
    for rank in range(2):
        agreements = 2 + 2 * ours[rank]["seconds"]  # about one a second
        assert bare[rank]["collectives"] >= steps, "the count sees DDP's own reductions"
        assert bare[rank]["collectives"] <= ours[rank]["collectives"] <= bare[rank]["collectives"] + agreements
        # the profiler's own switch and the agreement read values; a read a step would be 30 more
        assert ours[rank]["host_reads"] <= bare[rank]["host_reads"] + 2 * agreements


def test_the_count_would_see_lightnings_own_broadcast(ddp_pair: Pair, new_run: NewRun, tmp_path: Path) -> None:
    """The same count on a loop with a collective and a read in each step, so that the test above can fail."""
    run = new_run("trainer.devices=2", "optim={kind: sgd}", "trainer.max_steps=60", "trainer.log_every_n_steps=50")
    answers = ddp_pair.run("count_with_broadcast", folder=str(run.root), first=10, last=40)
    assert min(answer["collectives"] for answer in answers) >= 60
    assert min(answer["host_reads"] for answer in answers) >= 30
