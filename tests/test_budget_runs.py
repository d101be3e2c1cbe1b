"""Real trainings that are held to a budget: stopped inside it, refused when it is spent, and going on exactly with more."""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning.pytorch as L
import pytest

from lm_train import runs
from lm_train.budget import Account, Spending, Tariff
from lm_train.callbacks import budget as guarding
from lm_train.errors import ExitCode
from lm_train.optim import learning_rate
from lm_train.plan import Plan
from lm_train.recipe import load
from lm_train.runs import RunFolder, read_jsonl
from lm_train.train import train
from tests.conftest import Ranks

NewRun = Callable[..., RunFolder]
LINEAR = "optim={kind: adamw, learning_rate: 1e-3, schedule: linear, min_learning_rate_ratio: 0.0}"
ENDLESS = "trainer.max_steps=10000000"
SECONDS = 60.0


@pytest.fixture(autouse=True)
def _short_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training inside of this process has none."""
    monkeypatch.setitem(guarding.WAY_OUT_S, "disabled", 0.1)


class Clock(L.Callback):
    """Time that only passes with the work, so that a busy machine changes nothing: 0.2 s a step, 50 ms a validated batch."""

    now = 0.0

    def on_train_batch_start(self, *args: object) -> None:
        self.now += 0.2

    def on_validation_batch_start(self, *args: object) -> None:
        self.now += 0.05


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By which trainings of this test are held to their budget."""
    clock = Clock()

    @contextlib.contextmanager
    def spending(folder: RunFolder, plan: Plan, rank: int) -> Iterator[Spending]:
        own = Spending.begin(folder, plan, clock.now, lambda: clock.now)
        yield own
        own.finish()

    monkeypatch.setattr("lm_train.train.rank_spending", spending)
    return clock


def planned(run: RunFolder, max_steps: int, seconds: float) -> Plan:
    """Another first estimate, and a budget that no planner would begin with."""
    plan = Plan.read(run.plan).model_copy(update={"max_steps": max_steps, "limits": {"hours": seconds / 3600}})
    run.plan.write_text(plan.model_dump_json())
    return plan


def hours(seconds: float) -> str:
    return f"budget.hours={seconds / 3600:.9f}"


def used(run: RunFolder) -> float:
    """Seconds, counted by the last start's rows."""
    return Account.read(run).used(Tariff.of(Plan.read(run.plan)))["hours"] * 3600


def losses(run: RunFolder) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_jsonl(run.metrics) if "train/loss" in row}


def test_a_run_stops_inside_its_budget_is_refused_and_goes_on_exactly_with_more(
    new_run: NewRun, clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    words = (ENDLESS, hours(SECONDS), "model.dropout=0.1", "trainer.log_every_n_steps=20")
    run = new_run(*words)
    assert train(run, None, [clock]) == ExitCode.DONE
    run.write_outcome(ExitCode.DONE)
    step = json.loads((run.checkpoints / "latest").read_text())["step"]
    account = Account.read(run)
    assert account.stopped_by_budget
    assert account.last is not None
    assert account.last.stopped is not None
    assert account.last.stopped["step"] == step > 150
    assert 0.95 * SECONDS < used(run) <= SECONDS
    assert "of the budget is used" in capfd.readouterr().err
    rows = [row for row in read_jsonl(run.metrics) if "train/loss" in row]
    assert rows[-1]["budget/used_fraction"] == pytest.approx(rows[-1]["budget/hours"] * 3600 / SECONDS)
    assert not any("val/loss" in row for row in read_jsonl(run.metrics)), "no validation of what was cut off"

    # a supervisor that finds too little left starts nothing
    command = [sys.executable, "-m", "lm_train", "train", f"recipe={run.recipe}", hours(used(run) + 0.05)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path.cwd())
    assert refused.returncode == 0, refused.stderr
    (line,) = refused.stderr.splitlines()
    assert "the budget is spent" in line
    assert f"saved at step {step} of 10000000; to go on, the same command with name=run budget.hours=" in line
    assert len(Account.read(run).starts) == 1

    last = step + 25
    fixed = ("model.dropout=0.1", f"trainer.max_steps={last}")
    new_run(*fixed, "budget.hours=1")
    assert train(run, run.checkpoints / f"step-{step}") == ExitCode.DONE
    assert not Account.read(run).stopped_by_budget
    assert len(Account.read(run).starts) == 2
    whole = new_run(*fixed, name="whole")
    assert train(whole) == ExitCode.DONE
    after = {s: loss for s, loss in losses(run).items() if s > step}
    assert sorted(after) == list(range(step + 1, last + 1))
    assert after == {s: losses(whole)[s] for s in after}


def test_with_auto_the_schedule_ends_where_the_budget_ends(new_run: NewRun, clock: Clock) -> None:
    run = new_run("trainer.max_steps=auto", LINEAR, "budget.hours=1")
    planned(run, 30, SECONDS)  # an estimate that is far too low
    assert train(run, None, [clock]) == ExitCode.DONE
    account = Account.read(run)
    assert not account.stopped_by_budget
    assert account.last is not None
    ends = account.last.horizons
    last = ends[-1][1]
    assert last > 200
    rows = [row for row in read_jsonl(run.metrics) if "train/loss" in row]
    assert rows[-1]["step"] == last
    assert rows[-1]["train/learning_rate"] == 0.0
    assert [row["step"] for row in read_jsonl(run.metrics) if "val/loss" in row] == [last], "the end lies inside, too"
    assert 0.95 * SECONDS < used(run) <= SECONDS
    assert all(row["train/learning_rate"] == scheduled(run, row["step"], 30, ends) for row in rows)


def scheduled(run: RunFolder, step: int, first: int, corrections: list[tuple[int, int]]) -> float:
    """The learning rate of a step by the last correction before it."""
    end = next((max_steps for at, max_steps in reversed(corrections) if at < step), first)
    return learning_rate(load([f"recipe={run.recipe}"]).optim, step, end)


def test_a_start_that_repeats_steps_repeats_their_corrections(new_run: NewRun, clock: Clock) -> None:
    run = new_run("trainer.max_steps=auto", LINEAR, "budget.hours=1")
    plan = planned(run, 60, 6.0 + SECONDS / 2)  # of which the earlier start has held 6
    began = {"start": 1, "event": "began", "seconds": 0.0, "devices": 1, "price_per_gpu_hour": None, "currency": "USD"}
    rows = [began | {"power_watts": 0.0, "limits": plan.limits}]
    rows += [
        {"start": 1, "event": "horizon", "seconds": 1.0, "step": at, "max_steps": end}
        for at, end in ((20, 90), (50, 70))
    ]
    run.budget.write_text("".join(json.dumps(row) + "\n" for row in rows))  # a start that was killed before it saved
    assert train(run, None, [clock]) == ExitCode.DONE
    rates = {row["step"]: row["train/learning_rate"] for row in read_jsonl(run.metrics) if "train/loss" in row}
    ends = [(20, 90), (50, 70), *Account.read(run).starts[-1].horizons]
    assert ends[2:], "then its own speed counts"
    assert rates == {step: scheduled(run, step, 60, ends) for step in rates}
    assert runs.latest_checkpoint(run) is not None


def test_epochs_are_counted_when_the_data_are_known(new_run: NewRun) -> None:
    run = new_run("trainer.max_epochs=0.05", ENDLESS)
    assert train(run) == ExitCode.DONE
    rows = [row for row in read_jsonl(run.metrics) if "train/loss" in row]
    step = rows[-1]["step"]
    assert rows[-1]["epoch"] >= 0.05 > rows[-2]["epoch"]
    assert json.loads((run.checkpoints / "latest").read_text())["step"] == step
    # the run's end, taken up again, is its end
    assert train(run, run.checkpoints / f"step-{step}") == ExitCode.DONE
    assert max(losses(run)) == step


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
@pytest.mark.parametrize("auto", [False, True])
def test_two_ranks_stop_and_move_the_end_at_the_same_step(
    ranks: Ranks, new_run: NewRun, strategy: str, auto: bool
) -> None:
    words = ("trainer.max_steps=auto", LINEAR, "budget.hours=1") if auto else (ENDLESS, "budget.hours=1")
    run = new_run(*words, "trainer.devices=2", f"trainer.strategy={strategy}", "trainer.log_every_n_steps=5")
    planned(run, 40 if auto else 10_000_000, 12.0)
    ranks(strategy).run("run", folder=str(run.root))
    account = Account.read(run)
    assert account.stopped_by_budget != auto
    assert account.last is not None
    assert used(run) <= 12.0
    step = json.loads((run.checkpoints / "latest").read_text())["step"]
    stopped = account.last.stopped
    assert step == (account.last.horizons[-1][1] if stopped is None else stopped["step"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["hours", "gpu_hours", "money", "kwh", "several", "ddp", "fsdp", "killed", "auto", "preempted"]
)
def test_ten_real_commands_stay_inside_their_budgets(
    name: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    benchmark = importlib.import_module("budget")
    (case,) = (case for case in benchmark.CASES if case[0] == name)
    row = benchmark.real_run(*case, tmp_path)
    assert row["used"] <= 1.0
    assert row["used_outside"] <= 1.0
    assert not row["forced"]
    assert set(row["exit_codes"][1:]) == {0}
    assert row["saved_step"] == row["last_step"]
    assert "the budget is spent" in row["said"] or "finished already" in row["said"]
