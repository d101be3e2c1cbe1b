"""Networks over images and rows of numbers by formula."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from lm_train.errors import DataError
from lm_train.recipe import CNN, MLP, ResNet

DenseModel = MLP | CNN | ResNet


def pooled_shape(model: CNN | ResNet, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, height and width of what is left of an image after the last pooling.

    Raises:
        DataError: if nothing is left.
    """
    _, height, width = input_shape
    depth = len(model.channels)
    if min(height, width) >> depth == 0:
        most = min(height, width).bit_length() - 1
        raise DataError(
            f"model.channels={list(model.channels)} halves height and width {depth} times, which leaves nothing of images of "
            f"{height} x {width} pixels; give at most {most} of them"
        )
    return model.channels[-1], height >> depth, width >> depth


def dense_shapes(
    model: DenseModel, input_shape: tuple[int, ...], n_outputs: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each parameter of the network, in the order of its `named_parameters`.

    Args:
        model: the recipe's model section.
        input_shape: of one sample.
        n_outputs: classes, or values to predict.
    """
    for name, weight, _ in _layers(model, input_shape, n_outputs):
        yield f"{name}.weight", weight
        if isinstance(model, ResNet):
            if name != "head":
                norm = name.removesuffix("convolution") + "norm"
                yield from ((f"{norm}.{key}", weight[:1]) for key in ("weight", "bias"))
        else:
            yield f"{name}.bias", weight[:1]


def dense_flops(model: DenseModel, input_shape: tuple[int, ...], n_outputs: int) -> int:
    """Forward and backward FLOPs of one sample.

    Three times the forward pass: the backward pass makes as many products for the gradients of the weights as for those of
    the inputs (the first layer's, which nobody needs, included). A multiply-add is two; a dense layer has inputs x outputs of
    them, a convolution kernel x channels in x channels out at every position. Norms, activations, pooling and biases are
    left out.
    """
    products = sum(math.prod(weight) * positions for _, weight, positions in _layers(model, input_shape, n_outputs))
    return 3 * 2 * products


def _layers(
    model: DenseModel, input_shape: tuple[int, ...], n_outputs: int
) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Name, shape of the weight, and positions at which it is used, of each dense layer and convolution."""
    features = math.prod(input_shape)
    if isinstance(model, ResNet):
        yield from _resnet_layers(model, input_shape)
        features = pooled_shape(model, input_shape)[0]
    elif isinstance(model, CNN):
        features = math.prod(pooled_shape(model, input_shape))
        _, height, width = input_shape
        for i, (fan_in, fan_out) in enumerate(pairwise((input_shape[0], *model.channels))):
            kernel = (model.kernel_size, model.kernel_size)
            yield f"convolutions.{i}", (fan_out, fan_in, *kernel), (height >> i) * (width >> i)
    if not isinstance(model, ResNet):
        for i, (fan_in, fan_out) in enumerate(pairwise((features, *model.widths))):
            yield f"hidden.{i}", (fan_out, fan_in), 1
        features = model.widths[-1] if model.widths else features
    yield "head", (n_outputs, features), 1


def _resnet_layers(model: ResNet, input_shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...], int]]:
    channels, height, width = input_shape
    yield "stem.convolution", (model.stem, channels, 3, 3), height * width
    for i, (fan_in, fan_out) in enumerate(pairwise((model.stem, *model.channels))):
        positions = (height >> i) * (width >> i)  # the convolution stands before the pooling
        yield f"stages.{i}.down.convolution", (fan_out, fan_in, 3, 3), positions
        inside = (height >> (i + 1)) * (width >> (i + 1))
        for block in range(model.blocks[i]):
            for part in ("first", "second"):
                yield f"stages.{i}.blocks.{block}.{part}.convolution", (fan_out, fan_out, 3, 3), inside
