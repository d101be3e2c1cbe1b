"""A run is held to its budget: the account over its starts, the guard at its steps, and both together on a simulated clock."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.simulated_budget import simulate
from lm_train.budget import Account, Guard, Rounds, Spending, Tariff, check_currency
from lm_train.budget.account import PERIOD_S
from lm_train.errors import UsageError
from lm_train.hardware import Machine
from lm_train.plan import Plan, make_plan
from lm_train.recipe import load
from lm_train.runs import RunFolder


def plan_of(*words: str, **changes: object) -> Plan:
    plan = make_plan(load(["recipe=gpt_debug", *words]), Machine(cpu_cores=2, gpus=()))
    return plan.model_copy(update={"devices": 2, "price_per_gpu_hour": 3.0, "power_watts": 500.0} | changes)


@pytest.fixture
def clock() -> list[float]:
    """Its only number is the time."""
    return [100.0]


def begin(folder: Path, plan: Plan, clock: list[float]) -> Spending:
    return Spending.begin(RunFolder(folder), plan, clock[0], lambda: clock[0])


def test_amounts_of_all_starts_add_up_each_at_its_own_price(tmp_path: Path, clock: list[float]) -> None:
    plan = plan_of("budget.hours=10")
    first = begin(tmp_path, plan, clock)
    clock[0] += 3600
    first.finish(75)
    dearer = plan.model_copy(update={"devices": 4, "price_per_gpu_hour": 5.0})
    clock[0] += 10_000  # nobody held anything
    second = begin(tmp_path, dearer, clock)
    clock[0] += 1800
    assert second.used() == pytest.approx({"gpu_hours": 4.0, "hours": 1.5, "kwh": 2.0, "money": 6.0 + 10.0})
    assert second.used_fraction() == pytest.approx(0.15)
    assert second.told() == "1.5 of 10 h"
    second.finish(0)
    account = Account.read(RunFolder(tmp_path))
    assert account.used(Tariff.of(dearer)) == pytest.approx(second.used())
    assert account.seconds_left(dearer)[0] == pytest.approx(8.5 * 3600)


def test_the_limit_that_comes_first_ends_the_run(tmp_path: Path) -> None:
    limits = {"gpu_hours": 4.0, "hours": 3.0, "money": 9.0, "kwh": 7.0}  # 2, 3, 1.5 and 7 hours of two devices
    left, name = Account.read(RunFolder(tmp_path)).seconds_left(plan_of(limits=limits))
    assert (left, name) == (pytest.approx(1.5 * 3600), "money")
    assert Account([]).seconds_left(plan_of(limits={}))[0] == math.inf
    assert Account([]).seconds_left(plan_of(limits={"money": 1.0}, price_per_gpu_hour=0.0))[0] == math.inf


def test_a_killed_start_counts_until_its_last_row_and_one_period_more(tmp_path: Path, clock: list[float]) -> None:
    plan = plan_of("budget.hours=1")
    spending = begin(tmp_path, plan, clock)
    for _ in range(40):
        clock[0] += 1
        spending.tick()
    clock[0] += PERIOD_S - 0.1  # the kill
    account = Account.read(RunFolder(tmp_path))
    assert account.starts[0].held_seconds == pytest.approx(40 + PERIOD_S)
    assert account.starts[0].held_seconds >= clock[0] - 100
    rows = (tmp_path / "budget.jsonl").read_text().splitlines()
    assert len(rows) == 1 + 40 / PERIOD_S


def test_a_torn_row_spoils_neither_the_reading_nor_the_next_row(tmp_path: Path, clock: list[float]) -> None:
    plan = plan_of("budget.hours=1")
    begin(tmp_path, plan, clock)
    with (tmp_path / "budget.jsonl").open("a") as file:
        file.write('{"start": 1, "event": "held", "sec')
    second = begin(tmp_path, plan, clock)
    clock[0] += 50
    second.finish(0)
    account = Account.read(RunFolder(tmp_path))
    assert [(s.number, s.ended) for s in account.starts] == [(1, False), (2, True)]
    assert account.starts[1].seconds == pytest.approx(50)


def test_money_of_a_start_without_a_price_is_counted_at_the_present_one(tmp_path: Path, clock: list[float]) -> None:
    plan = plan_of(price_per_gpu_hour=None)
    first = begin(tmp_path, plan, clock)
    clock[0] += 3600
    assert "money" not in first.used()
    first.finish(0)
    assert Account.read(RunFolder(tmp_path)).used(Tariff(1, 2.0, "USD", 0.0))["money"] == pytest.approx(4.0)


def test_money_of_two_currencies_is_not_added_up(tmp_path: Path, clock: list[float]) -> None:
    begin(tmp_path, plan_of(currency="USD"), clock).finish(0)
    account = Account.read(RunFolder(tmp_path))
    with pytest.raises(UsageError, match="earlier starts of this run were paid in USD, this one is in EUR"):
        check_currency(plan_of(limits={"money": 5.0}, currency="EUR"), account)
    check_currency(plan_of(limits={"hours": 5.0}, currency="EUR"), account)
    check_currency(plan_of(limits={"money": 5.0}, currency="USD"), account)


def test_a_spent_budget_is_known_by_what_a_start_needs(tmp_path: Path, clock: list[float]) -> None:
    plan = plan_of("budget.hours=0.1")
    spending = begin(tmp_path, plan, clock)
    clock[0] += 20
    spending.note("training")
    clock[0] += 310
    spending.note("stopped", step=10)
    spending.note("left", step_seconds=1.0)
    spending.finish(0)
    account = Account.read(RunFolder(tmp_path))
    assert account.stopped_by_budget
    assert not account.is_spent(plan)  # 30 s left pay for 24 s of starting and 5 steps
    assert account.is_spent(plan.model_copy(update={"limits": {"hours": 0.0995}}))
    assert account.told(plan) == "0.0917 of 0.1 h"


def test_the_guard_leaves_room_for_the_save_and_the_way_out() -> None:
    guard = Guard(100.0, shutdown=1.0, predicted_save=10.0)
    guard.start("train", 0.0)
    for i in range(1, 80):
        guard.passed("train", float(i))
    assert guard.boundaries_left(79.0) == 10  # 100 - 79 - 10 - 1
    assert not guard.wish(88.0, "train", alone=True).stop
    assert guard.wish(88.5, "train", alone=True).stop
    assert guard.boundaries_left(79.0, saves=0) == 20
    assert guard.wish(88.0, "train", alone=False).stop  # an answer, and at least two steps until the next one
    assert guard.wish(79.0, "train", alone=False).soon == 8


def test_the_guard_provides_for_the_worst_it_has_seen() -> None:
    guard = Guard(1000.0, shutdown=0.0, predicted_save=0.0)
    guard.start("train", 0.0)
    now = 0.0
    for seconds in (*[1.0] * 30, 9.0, *[1.0] * 30):
        guard.passed("train", now := now + seconds)
    assert guard.wish(1000 - 8.9, "train", alone=True).stop
    assert not guard.wish(1000 - 9.5, "train", alone=True).stop


def test_a_save_is_not_part_of_a_step_and_its_measured_time_counts() -> None:
    guard = Guard(100.0, shutdown=0.0)
    guard.start("train", 0.0)
    guard.passed("train", 1.0)
    guard.began_save(6.0, blocked=5.0)
    guard.saved(5.0)
    guard.passed("train", 7.0)
    assert guard.step_seconds() == pytest.approx(1.0)
    assert 5.0 < guard.save_seconds < 7.0


def test_near_the_end_a_save_by_number_waits_for_the_final_one() -> None:
    guard = Guard(100.0, shutdown=0.0, predicted_save=10.0)
    guard.start("train", 0.0)
    guard.passed("train", 1.0)
    wish = guard.wish(85.0, "train", alone=True, next_save=0)
    assert wish.hold
    assert not wish.stop
    assert not guard.wish(60.0, "train", alone=True, next_save=0).hold
    assert guard.wish(85.0, "train", alone=True, next_validation=0).stop, "a new best is saved behind it"


def test_a_start_that_has_not_saved_does_so_half_way() -> None:
    guard = Guard(100.0, shutdown=0.0)
    guard.start("train", 0.0)
    guard.passed("train", 1.0)
    assert not guard.wants_save(49.0)
    assert guard.wants_save(51.0)
    guard.began_save(51.0, blocked=0.1)
    assert not guard.wants_save(52.0)


def test_a_save_under_way_must_end_before_the_final_one() -> None:
    guard = Guard(100.0, shutdown=0.0, saves=[10.0] * 4)
    guard.start("train", 0.0)
    guard.passed("train", 1.0)
    assert not guard.wish(86.0, "train", alone=True).stop
    guard.began_save(86.0, blocked=0.5)
    assert guard.wish(86.0, "train", alone=True).stop, "ten seconds for it and ten for the last one"
    assert guard.still_writing(96.0) < 2
    guard.saved(10.0)
    assert guard.still_writing(87.0) == 0
    assert not guard.wish(87.0, "train", alone=True).stop
    assert guard.mean_blocked_seconds == 0.5, "what a save on the way takes of the training"


def test_ranks_ask_and_act_at_the_same_boundaries() -> None:
    rounds = Rounds(1.0)
    done = []
    for _ in range(12):
        done.append(rounds.boundary())
        if done[-1] == "act":
            rounds.answered(0.25, soon=2 if len(done) > 6 else 0)
    assert done == ["ask", "act", "pass", "pass", "pass", "ask", "act", "pass", "ask", "act", "pass", "ask"]


def test_300_simulated_runs_never_overrun_and_use_what_they_have(tmp_path: Path) -> None:
    plan = plan_of()
    outcomes = []
    for seed in range(10_000, 10_300):
        (tmp_path / str(seed)).mkdir()
        outcomes.append(simulate(seed, plan, tmp_path / str(seed)))
    assert max(o.used for o in outcomes) <= 1.0
    large = [o for o in outcomes if o.large]
    assert len(large) > 200
    assert sum(o.kills for o in large) > 100
    assert len({o.ranks for o in large}) == 3
    low = [(o.seed, round(o.counted, 3)) for o in large if not o.refused and o.counted < 0.95]
    assert not low
    # the supervisor's last resort is for what nobody can foresee
    assert sum(o.forced > 0 for o in large) <= 3
    unsaved = [o.seed for o in large if o.kills == 0 and not o.forced and o.steps != o.saved_steps]
    assert not unsaved


def test_rows_are_json_that_names_its_start(tmp_path: Path, clock: list[float]) -> None:
    spending = begin(tmp_path, plan_of("budget.hours=1"), clock)
    clock[0] += 7
    spending.note("saved", step=5, took=0.25)
    spending.finish(0)
    rows = [json.loads(line) for line in (tmp_path / "budget.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["began", "saved", "ended"]
    assert rows[1] == {"start": 1, "event": "saved", "seconds": 7.0, "step": 5, "took": 0.25}
    assert rows[2]["used"]["hours"] == pytest.approx(7 / 3600)
