"""Perceptron, convolutional and residual networks: shapes, counts, initial weights, and batch norm over processes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lm_train import models
from lm_train.errors import DataError, UsageError
from lm_train.hardware import Machine
from lm_train.models.batch_norm import BatchNorm2d, over_all_processes
from lm_train.plan import DataFacts, flops_per_sample, make_plan, parameter_shapes
from lm_train.recipe import load

GRAY, COLOUR, ROW = (1, 28, 28), (3, 32, 32), (7,)
NETS: dict[str, tuple[str, tuple[int, ...]]] = {
    "mlp": ("model={kind: mlp, widths: [16, 8], activation: tanh}", GRAY),
    "mlp-table": ("model={kind: mlp, widths: [5]}", ROW),
    "mlp-linear": ("model={kind: mlp, widths: []}", ROW),
    "cnn": ("model={kind: cnn, channels: [4, 6], kernel_size: 5, widths: [9]}", COLOUR),
    "cnn-deep": ("model={kind: cnn, channels: [2, 3, 4, 5], widths: [], activation: gelu}", GRAY),
    "cnn-even-kernel": ("model={kind: cnn, channels: [2], kernel_size: 4}", (2, 9, 7)),
    "resnet": ("model={kind: resnet, stem: 4, channels: [4, 8, 8], blocks: [1, 0, 2]}", COLOUR),
    "resnet-group": ("model={kind: resnet, stem: 6, channels: [12], blocks: [1], norm: group}", GRAY),
}


def section(words: str) -> Any:
    return load(["recipe=mlp_digits", words]).model


def built(words: str, shape: tuple[int, ...], initialise: bool = True) -> nn.Module:
    plan = make_plan(load(["recipe=mlp_digits"]), Machine(2, ()))
    return models.build(section(words), plan, DataFacts(input_shape=shape, n_outputs=10), initialise)


@pytest.mark.parametrize("name", NETS)
def test_counts_are_those_of_the_module(name: str) -> None:
    words, shape = NETS[name]
    net, facts = built(words, shape), DataFacts(input_shape=shape, n_outputs=10)
    found = parameter_shapes(section(words), "classification", facts)
    assert found == [(n, tuple(p.shape)) for n, p in net.named_parameters()]
    with FlopCounterMode(display=False) as counter:
        assert net(torch.randn(2, *shape)).shape == (2, 10)
    assert flops_per_sample(section(words), "classification", facts, 0) == 3 * counter.get_total_flops() // 2


@pytest.mark.parametrize("name", NETS)
def test_weights_filled_in_later_are_those_drawn_in_place(name: str) -> None:
    words, shape = NETS[name]
    torch.manual_seed(3)
    whole = built(words, shape)
    later = built(words, shape, initialise=False)
    assert all(p.is_meta for p in later.parameters())
    later.to_empty(device="cpu")
    torch.manual_seed(3)
    later.init_weights()  # type: ignore[operator]
    for (a, x), (b, y) in zip(whole.state_dict().items(), later.state_dict().items(), strict=True):
        assert a == b
        assert torch.equal(x, y), a


def test_the_perceptron_is_the_one_of_the_textbook() -> None:
    """784-128-10: 101,770 parameters; the same function as torch's own layers one after another."""
    net = built("model={kind: mlp, widths: [128]}", GRAY)
    assert sum(p.numel() for p in net.parameters()) == 784 * 128 + 128 + 128 * 10 + 10
    plain = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    for mine, theirs in zip(plain.parameters(), net.parameters(), strict=True):
        mine.data.copy_(theirs)
    images = torch.randn(5, *GRAY)
    torch.testing.assert_close(net(images), plain(images))


def test_the_convolutional_net_is_torchs_own_layers_one_after_another() -> None:
    net = built("model={kind: cnn, channels: [3, 4], kernel_size: 5, widths: [9], activation: silu}", COLOUR)
    plain = nn.Sequential(
        *(nn.Conv2d(3, 3, 5, padding=2), nn.SiLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(3, 4, 5, padding=2), nn.SiLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(4 * 8 * 8, 9), nn.SiLU(), nn.Linear(9, 10)),
    )
    for mine, theirs in zip(plain.parameters(), net.parameters(), strict=True):
        mine.data.copy_(theirs)
    images = torch.randn(5, *COLOUR)
    torch.testing.assert_close(net(images), plain(images))


def test_initial_activations_keep_their_size_with_depth() -> None:
    """He et al. 2015: twenty ReLU layers neither explode nor vanish."""
    torch.manual_seed(0)
    net = built(f"model={{kind: mlp, widths: {[256] * 20}}}", (256,))
    hidden = net.hidden(torch.randn(512, 256))  # type: ignore[operator]
    assert 0.3 < hidden.square().mean().sqrt().item() < 3
    for layer in net.hidden:  # type: ignore[attr-defined]
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.03)
        assert layer.bias.abs().max() == 0
    assert net.head.weight.std().item() == pytest.approx(math.sqrt(1 / 256), rel=0.06)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "words",
    ["model={kind: cnn, channels: [2, 2, 2, 2]}", "model={kind: resnet, channels: [2, 2, 2, 2], blocks: [0, 0, 0, 0]}"],
)
def test_a_depth_that_leaves_nothing_is_refused(words: str) -> None:
    with pytest.raises(UsageError, match=r"channels=\[2, 2, 2, 2\] .* images of 8 x 8 pixels; give at most 3"):
        make_plan(load(["recipe=mlp_digits", words]), Machine(2, ()))
    with pytest.raises(DataError, match="images of 15 x 99 pixels; give at most 3"):
        built(words, (1, 15, 99))


def test_blocks_without_a_stage_are_refused() -> None:
    with pytest.raises(UsageError, match=r"2 entries for 3 stages .* try model.blocks=\[1, 0, 0\]"):
        load(["recipe=mlp_digits", "model={kind: resnet, blocks: [1, 0]}"])


class TestBatchNorm:
    def test_on_one_process_it_is_torchs_own(self) -> None:
        mine, theirs = BatchNorm2d(5), nn.BatchNorm2d(5)
        for _ in range(3):
            x = torch.randn(4, 5, 3, 3) * 3 + 1
            torch.testing.assert_close(mine(x), theirs(x), rtol=0, atol=0)
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(mine.eval()(x), theirs.eval()(x), rtol=0, atol=0)

    @pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}])
    @pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (6, 5)), (nn.BatchNorm1d, (6, 5, 3)),
                                                 (nn.BatchNorm3d, (2, 5, 3, 2, 2))])  # fmt: skip
    def test_torchs_own_are_taken_over_as_they_are(
        self, monkeypatch: pytest.MonkeyPatch, kind: Any, shape: tuple[int, ...], options: dict[str, Any]
    ) -> None:
        """Also by the way of several processes, where the other one's sums are nothing."""
        theirs = kind(5, **options)
        mine = over_all_processes(nn.Sequential(copy.deepcopy(theirs)))[0]  # type: ignore[index]
        for several in (False, True):
            if several:
                monkeypatch.setattr(dist, "is_initialized", lambda: True)
                monkeypatch.setattr(dist, "get_world_size", lambda: 2)
                monkeypatch.setattr(dist, "all_reduce", lambda totals: None)
            bounds = {"rtol": 1e-5, "atol": 1e-5} if several else {"rtol": 0, "atol": 0}
            x = (torch.randn(shape) * 3 + 1).requires_grad_()
            y = x.detach().clone().requires_grad_()
            weights = torch.randn(shape)
            for norm, given in ((mine, x), (theirs, y)):
                (norm.train()(given) * weights).sum().backward()
            torch.testing.assert_close(x.grad, y.grad, **bounds)
            torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), **bounds)
            torch.testing.assert_close(
                [p.grad for p in mine.parameters()], [p.grad for p in theirs.parameters()], **bounds
            )
            torch.testing.assert_close(mine.eval()(x), theirs.eval()(x), **bounds)

    def test_running_statistics_outlast_every_cast(self) -> None:
        norm = BatchNorm2d(3)
        norm(torch.randn(8, 3, 4, 4))
        before = copy.deepcopy(dict(norm.named_buffers()))
        norm.to(torch.bfloat16)
        norm.half()
        norm.to_empty(device="cpu")
        assert norm.weight.dtype == torch.float16
        assert norm.running_var.dtype == torch.float32
        torch.testing.assert_close(dict(norm.named_buffers()), before, rtol=0, atol=0)

    def test_built_on_the_meta_device_it_starts_afresh(self) -> None:
        with torch.device("meta"):
            norm = BatchNorm2d(3).to("meta")
        norm.to_empty(device="cpu")
        torch.testing.assert_close(dict(norm.named_buffers()), dict(nn.BatchNorm2d(3).named_buffers()), rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_statistics_are_fp32_under_half_precision(self, dtype: torch.dtype) -> None:
        norm, x = BatchNorm2d(4), (torch.randn(64, 4, 8, 8) + 30).to(dtype)
        y = norm(x)
        assert y.dtype == dtype
        expected = x.float().mean(dim=(0, 2, 3)) * 0.1
        torch.testing.assert_close(norm.running_mean, expected, rtol=1e-6, atol=0)
