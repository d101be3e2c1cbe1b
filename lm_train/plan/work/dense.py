"""Networks over images and rows of numbers: one micro batch on the tape, written as `lm_train.models` writes them."""

from __future__ import annotations

import math
from itertools import pairwise

from lm_train.plan.counts.dense import DenseModel
from lm_train.plan.layout import Layout
from lm_train.plan.work.blocks import Linear
from lm_train.plan.work.convolutions import convolution, copied, largest, max_pool, norm_and_relu
from lm_train.plan.work.operations import activation, add, cross_entropy, dropout
from lm_train.plan.work.ops import Number, Work
from lm_train.plan.work.passes import work_of_passes
from lm_train.plan.work.tape import Parameter, Tape, Tensor
from lm_train.recipe import CNN, MLP, ResNet

Pixels = tuple[int, int, int]
"""Samples, height, width."""


def dense_work(model: DenseModel, input_shape: tuple[int, ...], n_outputs: int, layout: Layout) -> Work:
    """
    Args:
        model: the recipe's model section.
        input_shape: of one sample.
        n_outputs: classes, or values to predict.
        layout: micro batch, precision, ranks.
    """
    values = layout.micro_batch_size * math.prod(input_shape)

    def loss(tape: Tape, number: Number) -> Tensor:
        return _Pass(tape, number, layout).loss(model, input_shape, n_outputs)

    return work_of_passes(layout, loss, 4 * values + 8 * layout.micro_batch_size)


class _Pass:
    """One pass of a micro batch."""

    def __init__(self, tape: Tape, number: Number, layout: Layout) -> None:
        self.tape, self.number, self.samples = tape, number, layout.micro_batch_size
        self.ranks = layout.ranks if tape.training else 1
        """Over which batch norms take their statistics; running ones serve a validation."""

    def loss(self, model: DenseModel, input_shape: tuple[int, ...], n_outputs: int) -> Tensor:
        tape = self.tape
        size = self.samples * math.prod(input_shape)
        tape.enter("input")
        given = None if self.number == "fp32" else tape.new(size, self.number)  # held by the caller, too
        x = given if given is not None else Tensor(None, size, "fp32")  # the batch's own is counted elsewhere
        match model:
            case MLP():
                x = self.hidden(model, x, math.prod(input_shape))
            case CNN():
                x = self.convolutions(model, x, input_shape)
            case ResNet():
                x = self.residual(model, x, input_shape)
        features = x.size // self.samples
        tape.enter("head")
        logits = Linear(self.number, features, n_outputs, bias=not isinstance(model, ResNet))(tape, x, "head")
        return cross_entropy(tape, logits)

    def hidden(self, model: MLP | CNN, x: Tensor, features: int) -> Tensor:
        for i, (fan_in, fan_out) in enumerate(pairwise((features, *model.widths))):
            self.tape.enter(f"hidden.{i}")
            layer = Linear(self.number, fan_in, fan_out, bias=True)
            x = activation(self.tape, layer(self.tape, x, f"hidden.{i}"), model.activation, f"hidden.{i}.activation")
            x = dropout(self.tape, x, model.dropout, f"hidden.{i}.dropout")
        return x

    def channels_last(self, x: Tensor, channels: int) -> Tensor:
        """A copy with the channels of a pixel side by side, where there are several."""
        return copied(self.tape, x, "input.order") if channels > 1 else x

    def convolutions(self, model: CNN, x: Tensor, input_shape: tuple[int, ...]) -> Tensor:
        tape, kernel = self.tape, model.kernel_size
        channels, height, width = input_shape
        channels_last = channels > 1  # of a single channel the two orders are one, and torch goes on with the other
        x = self.channels_last(x, channels)
        for i, fan_out in enumerate(model.channels):
            tape.enter(f"convolutions.{i}")
            pixels = (self.samples, height, width)
            weight, bias = Parameter(self.number, fan_out, channels, kernel, kernel), Parameter(self.number, fan_out)
            x = max_pool(
                tape,
                activation(
                    tape,
                    convolution(tape, x, weight, bias, pixels, f"convolutions.{i}"),
                    model.activation,
                    f"convolutions.{i}.activation",
                ),
                fan_out,
                pixels,
                f"convolutions.{i}.pool",
                reordered=channels_last and i == len(model.channels) - 1,
            )
            channels, height, width = fan_out, height // 2, width // 2
        if channels_last and height * width > 1:
            x = copied(tape, x, "flatten")
        return self.hidden(model, x, channels * height * width)

    def residual(self, model: ResNet, x: Tensor, input_shape: tuple[int, ...]) -> Tensor:
        tape = self.tape
        channels, height, width = input_shape
        tape.enter("stem")
        x = self.channels_last(x, channels)
        x = self.part(model, x, channels, model.stem, (self.samples, height, width), "stem", pool=False)
        channels = model.stem
        for i, (fan_out, blocks) in enumerate(zip(model.channels, model.blocks, strict=True)):
            tape.enter(f"stages.{i}")
            x = self.stage(model, x, channels, fan_out, blocks, (self.samples, height, width))
            channels, height, width = fan_out, height // 2, width // 2
        return largest(tape, x, channels, self.samples, "pool")

    def stage(self, model: ResNet, x: Tensor, fan_in: int, fan_out: int, blocks: int, pixels: Pixels) -> Tensor:
        x = self.part(model, x, fan_in, fan_out, pixels, "stage.down", pool=True)
        samples, height, width = pixels
        inside = (samples, height // 2, width // 2)
        for _ in range(blocks):
            x = self.block(model, x, fan_out, inside)
        return x

    def block(self, model: ResNet, x: Tensor, channels: int, pixels: Pixels) -> Tensor:
        first = self.part(model, x, channels, channels, pixels, "stage.first", pool=False)
        return add(
            self.tape,
            x,
            self.part(model, first, channels, channels, pixels, "stage.second", pool=False),
            "stage.residual",
        )

    def part(
        self, model: ResNet, x: Tensor, fan_in: int, fan_out: int, pixels: Pixels, name: str, pool: bool
    ) -> Tensor:
        """Convolution, pooling if asked for, norm, ReLU."""
        tape = self.tape
        weight = Parameter(self.number, fan_out, fan_in, 3, 3)
        # norms of ours compute in fp32
        gain, shift = Parameter(self.number, fan_out), Parameter(self.number, fan_out)
        groups = 2 if model.norm == "batch" else model.groups(fan_out)
        statistics = fan_out if model.norm == "batch" else self.samples * groups
        ranks = self.ranks if model.norm == "batch" else 1
        x = convolution(tape, x, weight, None, pixels, f"{name}.convolution")
        if pool:
            x = max_pool(tape, x, fan_out, pixels, f"{name}.pool")
        return norm_and_relu(tape, x, gain, shift, statistics, ranks, f"{name}.norm")
