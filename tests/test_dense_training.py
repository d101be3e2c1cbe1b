"""Perceptron, convolutional and residual nets in training: two processes against one, batch norm's statistics, resuming."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from lm_train import models
from lm_train.checkpoint import CheckpointReader, views_of
from lm_train.errors import ExitCode
from lm_train.models.batch_norm import BatchNorm2d
from lm_train.plan import DataFacts, Plan
from lm_train.recipe import load
from lm_train.runs import RunFolder
from lm_train.train import train
from tests.conftest import Ranks
from tests.rank_cases import channels_far_apart
from tests.small_runs import small_run
from tests.test_strategies import LOSS_BOUND, NORM_BOUND, curve, difference

MODELS = {
    "mlp": "model={kind: mlp, widths: [16, 12], dropout: 0.0}",
    "cnn": "model={kind: cnn, channels: [4, 6], widths: [10]}",
    "resnet": "model={kind: resnet, stem: 4, channels: [6, 8], blocks: [1, 1]}",
}
DIGITS = DataFacts(input_shape=(1, 8, 8), n_outputs=10)


def net_of(folder: RunFolder, checkpoint: Path | None = None) -> nn.Module:
    """The network of a run, on one process, with its newest checkpoint's values."""
    net = models.build(load([f"recipe={folder.recipe}"]).model, Plan.read(folder.plan), DIGITS)
    newest = folder.checkpoints / f"step-{json.loads((folder.checkpoints / 'latest').read_text())['step']}"
    CheckpointReader(checkpoint or newest).load(views_of(net, None))
    return net


def buffers_of(folder: RunFolder) -> dict[str, torch.Tensor]:
    return dict(net_of(folder).named_buffers())


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Any:
    """The run of one process, made once for each model."""
    known: dict[str, RunFolder] = {}

    def of(model: str) -> RunFolder:
        if model not in known:
            known[model] = small_run(tmp_path_factory.mktemp("alone"), "mlp_digits", MODELS[model])
            assert train(known[model]) == ExitCode.DONE
        return known[model]

    return of


def cases() -> list[Any]:
    fast = ("ddp", "fsdp", "zero3")
    return [
        pytest.param(model, strategy, id=f"{model}-{strategy}", marks=[] if strategy in fast else [pytest.mark.slow])
        for strategy in (*fast, "zero1", "zero2", "zero3_offload")
        for model in MODELS
    ]


@pytest.mark.parametrize(("model", "strategy"), cases())
def test_two_processes_compute_what_one_computes(
    ranks: Ranks, tmp_path: Path, alone: Any, model: str, strategy: str
) -> None:
    both = small_run(tmp_path, "mlp_digits", MODELS[model], "trainer.devices=2", f"trainer.strategy={strategy}")
    assert [answer["code"] for answer in ranks(strategy).run("run", folder=str(both.root))] == [0, 0]
    one, two = curve(alone(model)), curve(both)
    largest = difference(one, two)
    print(f"MEASURED {model} {strategy} {largest}")
    assert len(two) == 12
    assert one[-1][0] < one[0][0], "nothing was learnt, so nothing was compared"
    assert largest.loss <= LOSS_BOUND
    assert largest.norm <= NORM_BOUND
    expected, found = buffers_of(alone(model)), buffers_of(both)
    assert expected.keys() == found.keys()
    for name, buffer in expected.items():
        torch.testing.assert_close(found[name], buffer, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_norm_on_two_processes_is_torchs_own_on_the_whole_batch(ranks: Ranks, dtype: str) -> None:
    answers = ranks("ddp").run("batch_norm", dtype=dtype)
    kind = getattr(torch, dtype)
    x = channels_far_apart(kind).requires_grad_()
    norm = nn.BatchNorm2d(x.shape[1])
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    y = norm(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    bound = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-2}
    assert x.grad is not None
    for name, whole in (("y", y), ("x_grad", x.grad)):
        halves = torch.cat([torch.tensor(answer[name]) for answer in answers])
        torch.testing.assert_close(halves, whole.detach().float(), **bound)
    for name, parameter in norm.named_parameters():
        summed = sum(torch.tensor(answer[f"{name}_grad"]) for answer in answers)
        torch.testing.assert_close(summed, parameter.grad, rtol=1e-4, atol=1e-3)
    assert answers[0]["running"] == answers[1]["running"]
    expected = torch.stack((norm.running_mean, norm.running_var))  # type: ignore[arg-type]
    torch.testing.assert_close(torch.tensor(answers[0]["running"]), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        ("fsdp", "bf16-mixed"),
        ("zero3", "bf16-true"),
        *(pytest.param(s, p, marks=pytest.mark.slow) for s in ("ddp", "zero2") for p in ("bf16-mixed", "bf16-true")),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in (("fsdp", "bf16-true"), ("zero3", "bf16-mixed"))),
    ],
)
def test_half_precision_keeps_the_statistics_in_fp32(
    ranks: Ranks, tmp_path: Path, alone: Any, strategy: str, precision: str
) -> None:
    words = (MODELS["resnet"], "trainer.devices=2", f"trainer.strategy={strategy}", f"trainer.precision={precision}")
    both = small_run(tmp_path, "mlp_digits", *words)
    ranks(strategy).run("run", folder=str(both.root))
    largest = difference(curve(alone("resnet")), curve(both))
    print(f"MEASURED {strategy} {precision} {largest}")
    assert largest.loss <= 3e-2
    for name, buffer in buffers_of(both).items():
        if buffer.is_floating_point():
            assert not torch.equal(buffer, buffer.bfloat16().float()), f"{name} was rounded to 16 bits"


@pytest.mark.parametrize("strategy", ["single", "fsdp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_resumed_run_goes_on_with_the_same_statistics(ranks: Ranks, tmp_path: Path, strategy: str) -> None:
    words = [MODELS["resnet"], "checkpoint.every_n_steps=6", "checkpoint.keep_last=3", f"trainer.strategy={strategy}"]
    size = 1 if strategy == "single" else 2
    words += [] if size == 1 else ["trainer.devices=2"]
    whole = small_run(tmp_path, "mlp_digits", *words, name="whole")
    ranks(strategy, size).run("run", folder=str(whole.root))
    half = small_run(tmp_path, "mlp_digits", *words, name="half")
    ranks(strategy, size).run("run", folder=str(half.root), resume_from=str(whole.checkpoints / "step-6"))
    assert curve(half) == curve(whole)[6:]
    expected, found = buffers_of(whole), buffers_of(half)
    for name, buffer in expected.items():
        assert torch.equal(found[name], buffer), name
    at_six = dict(net_of(whole, whole.checkpoints / "step-6").named_buffers())
    assert not torch.equal(at_six["stem.norm.running_mean"], expected["stem.norm.running_mean"])


def someone_elses(monkeypatch: pytest.MonkeyPatch, args: str = "{}") -> str:
    monkeypatch.setenv("LM_TRAIN_PLUGINS", "tests")
    return f'model={{kind: custom, factory: "tests.custom_parts:normalised_classifier", args: {args}}}'


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(s, marks=pytest.mark.slow) for s in ("fsdp", "zero2", "zero3"))]
)
def test_someone_elses_batch_norm_means_the_same_on_two_processes(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    words = (someone_elses(monkeypatch), "optim={kind: sgd, learning_rate: 0.1, schedule: constant}")
    one = small_run(tmp_path, "mlp_digits", *words, name="one")
    both = small_run(tmp_path, "mlp_digits", *words, "trainer.devices=2", f"trainer.strategy={strategy}", name="both")
    assert train(one) == ExitCode.DONE
    ranks(strategy).run("run", folder=str(both.root))
    largest = difference(curve(one), curve(both))
    assert largest.loss <= LOSS_BOUND
    assert largest.norm <= NORM_BOUND
    torch.testing.assert_close(buffers_of(both), buffers_of(one), rtol=1e-5, atol=1e-6)


def test_a_run_resumes_exactly_where_buffers_of_the_ranks_differ(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [someone_elses(monkeypatch, "{trace: true}"), "trainer.devices=2", "trainer.strategy=ddp"]
    words += ["checkpoint.every_n_steps=6", "checkpoint.keep_last=3"]
    whole = small_run(tmp_path, "mlp_digits", *words, name="whole")
    rest = small_run(tmp_path, "mlp_digits", *words, name="rest")
    ranks("ddp").run("run", folder=str(whole.root))
    ranks("ddp").run("run", folder=str(rest.root), resume_from=str(whole.checkpoints / "step-6"))
    assert curve(rest) == curve(whole)[6:]
    torch.testing.assert_close(buffers_of(rest), buffers_of(whole), rtol=0, atol=0)


def test_evaluation_uses_the_running_statistics() -> None:
    norm = BatchNorm2d(2)
    norm.running_mean += 3  # type: ignore[operator]
    x = torch.randn(1, 2, 2, 2)
    torch.testing.assert_close(norm.eval()(x), (x - 3) / (1 + norm.eps) ** 0.5)


def test_every_step_draws_its_own_numbers_and_seeds_no_device_that_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[int] = []
    traces: list[int] = []
    monkeypatch.setattr(traceback, "format_stack", lambda *args: traces.append(len(keys)) or [])

    class Seen(L.Callback):
        def on_before_zero_grad(self, trainer: L.Trainer, *args: object) -> None:  # no dropout: nothing was drawn since
            keys.append(torch.initial_seed())
            fresh = torch.Generator().manual_seed(keys[-1])
            assert torch.equal(torch.get_rng_state(), fresh.get_state())

    train(small_run(tmp_path, "mlp_digits", "model.dropout=0.0"), callbacks=[Seen()])
    assert len(set(keys)) == len(keys) == 12
    assert not [trace for trace in traces if 0 < trace < 12], "torch.manual_seed formats one for each kind of device"
    seen = len(traces)
    torch.manual_seed(0)
    assert torch.cuda.is_initialized() or len(traces) > seen, "the count sees what it is to see"
