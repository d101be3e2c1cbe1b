"""Updates that are not made: of what is not finite and of spikes, bit for bit as if the step had not been."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lm_train import ledger
from lm_train.runs import RunFolder
from lm_train.strategy import withholding
from lm_train.strategy.withholding import MADE, NONFINITE, SPIKE, SpikeRule, Withholding, takes_flag
from tests.anomaly_cases import spoilt_run
from tests.conftest import Ranks
from tests.small_runs import small_run

NewRun = Callable[..., RunFolder]
OPTIMIZERS = {
    "adamw": "{kind: adamw, learning_rate: 1e-3}",
    "adam": "{kind: adam, learning_rate: 1e-3}",
    "sgd": "{kind: sgd, learning_rate: 0.1}",
    "sgd_plain": "{kind: sgd, learning_rate: 0.1, momentum: 0.0}",
    "adagrad": "{kind: adagrad, learning_rate: 1e-2}",
    "rmsprop": "{kind: rmsprop, learning_rate: 1e-3, momentum: 0.9}",
    "muon": "{kind: muon, learning_rate: 1e-3}",
}
SHORT = ("trainer.max_steps=7", "trainer.limit_val_batches=0")


def check(folder: RunFolder, answers: list[dict], steps: list[int], reason: str = "nonfinite") -> None:
    """That nothing changed in the spoilt steps, and something in all others, and that the ledger says so."""
    for answer in answers:
        found = answer["digests"]
        assert answer["code"] == 0
        for step in range(1, len(found)):
            same = found[str(step)] == found[str(step - 1)]
            assert same == (step in steps), f"step {step}: {'unchanged' if same else 'changed'}"
    rows = list(ledger.read(folder.ledger))
    assert [row.step for row in rows] == list(range(1, 8))
    assert {row.step: row.withheld for row in rows if row.withheld} == dict.fromkeys(steps, reason)


@pytest.mark.parametrize("what", ["nan", "inf", "gradient"])
def test_what_is_not_finite_changes_nothing(new_run: NewRun, what: str) -> None:
    folder = new_run(*SHORT)
    check(folder, [spoilt_run(str(folder.root), [1, 4, 5], what)], [1, 4, 5])


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("optim", "fused"),
    [("adamw", True), ("sgd", False), ("sgd", True), ("adagrad", False), ("muon", False)]
    + [
        pytest.param(optim, fused, marks=SLOW)
        for optim, fused in (
            *(("adamw", False), ("adam", False), ("adam", True), ("sgd_plain", False), ("sgd_plain", True)),
            *(("rmsprop", False), ("muon", True)),
        )
    ],
)
def test_every_optimizer(new_run: NewRun, optim: str, fused: bool) -> None:
    folder = new_run(*SHORT, f"optim={OPTIMIZERS[optim]}", "trainer.gradient_clip_val=null")
    check(folder, [spoilt_run(str(folder.root), [1, 4], "nan", fused=fused)], [1, 4])


def strategies() -> list[Any]:
    """Strategy, clipping, accumulation and what is spoilt; of the full matrix a few in each test run."""
    kept = [("ddp", "1.0", 1, "nan"), ("ddp", "1.0", 2, "gradient"), ("fsdp", "1.0", 1, "gradient")]
    kept += [("fsdp", "null", 1, "gradient"), ("zero2", "1.0", 1, "nan")]
    every = itertools.product(
        ("ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload"), ("1.0", "null"), (1, 2), ("nan", "gradient")
    )
    return [pytest.param(*case, marks=() if case in kept else SLOW) for case in every]


@pytest.mark.parametrize(("strategy", "clip", "accumulate", "what"), strategies())
def test_one_rank_spoils_the_step_of_all(
    ranks: Ranks, new_run: NewRun, strategy: str, clip: str, accumulate: int, what: str
) -> None:
    folder = new_run(
        *SHORT, "trainer.devices=2", f"trainer.strategy={strategy}", f"trainer.gradient_clip_val={clip}",
        f"trainer.accumulate_grad_batches={accumulate}",
    )  # fmt: skip
    check(folder, ranks(strategy).run("spoilt_run", folder=str(folder.root), steps=[3, 4], what=what, rank=1), [3, 4])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_flag_on_the_device_serves_several_processes(ranks: Ranks, new_run: NewRun, strategy: str) -> None:
    folder = new_run(*SHORT, "trainer.devices=2", f"trainer.strategy={strategy}")
    answers = ranks(strategy).run("spoilt_run", folder=str(folder.root), steps=[3, 4], what="nan", rank=1, fused=True)
    check(folder, answers, [3, 4])


@pytest.mark.parametrize("spikes", ["null", "8"])
def test_with_a_fused_optimizer_the_host_never_asks(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, spikes: str
) -> None:
    def asked(value: torch.Tensor) -> float:
        raise AssertionError("the host reads what is on the device")

    monkeypatch.setattr(withholding, "host_value", asked)
    folder = new_run(*SHORT, f"trainer.spike_threshold={spikes}")
    check(folder, [spoilt_run(str(folder.root), [1, 4], "nan", fused=True)], [1, 4])
    plain = new_run(*SHORT, name="plain")
    with pytest.raises(AssertionError, match="the host reads"):
        spoilt_run(str(plain.root), [], "nan")


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_running_statistics_stay(tmp_path: Path, cache: Path, fused: bool) -> None:
    net = "model={kind: resnet, stem: 4, channels: [6, 8], blocks: [1, 1]}"
    folder = small_run(tmp_path, "cnn_digits", net, *SHORT, "trainer.limit_test_batches=0")
    check(folder, [spoilt_run(str(folder.root), [2, 5], "nan", fused=fused)], [2, 5])


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_buffers_of_every_kind_go_back(fused: bool) -> None:
    net = nn.Linear(2, 1)
    for i, dtype in enumerate((torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)):
        net.register_buffer(f"buffer{i}", torch.tensor([0, 1, 0]).to(dtype))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, fused=fused, momentum=0.9)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert takes_flag(optimizer) == fused
    guard = Withholding(net)
    for verdict in (MADE, NONFINITE):
        before = [buffer.clone() for buffer in net.buffers()]
        guard.begin()
        for buffer in net.buffers():
            buffer.copy_(
                torch.tensor([1, float("nan"), float("inf")]).to(buffer.dtype)
                if buffer.is_floating_point()
                else 1 - before[0][0]
            )
        after = [buffer.clone() for buffer in net.buffers()]
        guard.withhold(torch.tensor(verdict), optimizer)
        for found, expected in zip(net.buffers(), before if verdict else after, strict=True):
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_the_rule_for_spikes_is_the_plain_formula() -> None:
    draw = random.Random(1)
    rule, good = SpikeRule(6.0, 9, "cpu"), []
    for step in range(400):
        loss = torch.tensor(3.0 + draw.gauss(0, 0.1) + (draw.random() < 0.1) * draw.uniform(0.2, 20))
        last = good[-9:]
        median = statistics.median(last) if last else 0.0
        deviation = statistics.median([abs(x - median) for x in last]) if last else 0.0
        limit = median + 6 * max(1.4826 * deviation, 0.01 * median)
        expected = len(good) >= 9 and float(loss) > limit
        assert bool(rule.is_spike(loss)) == expected, step
        rule.take(loss, torch.tensor(not expected))
        good += [] if expected else [float(loss)]
    assert 10 < len(good) < 399


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_no_bad_value_enters_the_window(bad: float) -> None:
    rule = SpikeRule(6.0, 4, "cpu")
    guard = Withholding(nn.Linear(1, 1))
    guard.spikes = rule
    for i in range(6):
        assert guard.judge(torch.tensor(1.0), torch.tensor(2.0 + 0.1 * i)) == MADE
    before = rule.state()
    norm = torch.tensor(1.0 if bad == 1e30 else bad)
    assert guard.judge(norm, torch.tensor(bad)) == (SPIKE if bad == 1e30 else NONFINITE)
    assert rule.state() == before
    assert guard.judge(torch.tensor(1.0), torch.tensor(2.3)) == MADE


def test_the_window_goes_on_where_it_stood() -> None:
    draw = random.Random(2)
    losses = [torch.tensor(draw.uniform(2, 3)) for _ in range(60)]
    yes = torch.tensor(True)
    whole = SpikeRule(3.0, 8, "cpu")
    for loss in losses[:30]:
        whole.take(loss, yes)
    again = SpikeRule(3.0, 8, "cpu")
    again.restore(whole.state())
    smaller = SpikeRule(3.0, 5, "cpu")
    smaller.restore(whole.state())
    fresh = SpikeRule(3.0, 5, "cpu")
    for loss in losses[25:30]:
        fresh.take(loss, yes)
    for loss in losses[30:]:
        assert whole.is_spike(loss * 1.3) == again.is_spike(loss * 1.3)
        assert smaller.is_spike(loss * 1.3) == fresh.is_spike(loss * 1.3)
        for rule in (whole, again, smaller, fresh):
            rule.take(loss, yes)
    assert again.state() == whole.state()


def test_an_armed_rule_needs_a_full_window() -> None:
    rule = SpikeRule(3.0, 4, "cpu")
    for _ in range(3):
        rule.take(torch.tensor(1.0), torch.tensor(True))
    assert not rule.is_spike(torch.tensor(1e6))
    rule.take(torch.tensor(1.0), torch.tensor(True))
    assert rule.is_spike(torch.tensor(1e6))
