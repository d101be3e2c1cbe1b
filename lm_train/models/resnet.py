"""A small residual network (He et al. 2016, arXiv:1512.03385) for small images, trained in minutes.

Its shape is that of D. Page 2018, "How to Train Your ResNet" (the DAWNBench entry for CIFAR-10): pooling stands before norm and
activation, which makes these four times cheaper; a block adds two convolutions, each with norm and activation, to its input;
global max pooling; a linear head whose logits are scaled down.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from lm_train.models.batch_norm import BatchNorm2d
from lm_train.models.dense import DenseNetwork
from lm_train.plan import pooled_shape
from lm_train.recipe import ResNet as ResNetSection


class ResNet(DenseNetwork):
    """Stem, stages that each halve height and width, global max pooling, linear head.

    Args:
        section: channels, blocks and norm; see `lm_train.recipe.ResNet`.
        input_shape: of an image, (channels, height, width).
        n_outputs: classes, or values to predict.
        initialise: draw the weights; else they stay on the meta device, for whoever calls `fill`.

    Raises:
        DataError: if so many stages leave nothing of the image.
    """

    activation = "relu"

    def __init__(
        self, section: ResNetSection, input_shape: tuple[int, ...], n_outputs: int, initialise: bool = True
    ) -> None:
        super().__init__()
        pooled_shape(section, input_shape)
        self.head_scale = section.head_scale
        with torch.device("meta"):  # torch's own initial weights would cost time and random numbers
            self.stem = ConvNormAct(input_shape[0], section.stem, section, pool=False)
            self.stages = nn.ModuleList(
                Stage(fan_in, fan_out, blocks, section)
                for (fan_in, fan_out), blocks in zip(
                    pairwise((section.stem, *section.channels)), section.blocks, strict=True
                )
            )
            self.head = nn.Linear(section.channels[-1], n_outputs, bias=False)
        self.start(initialise)

    def forward(self, inputs: Tensor) -> Tensor:  # (B, channels, height, width) -> (B, n_outputs)
        # the channels of a pixel side by side: 30% faster on a CPU, in fp32 and in bf16
        x = self.stem(inputs.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            x = stage(x)
        return self.head(x.amax(dim=(2, 3))) * self.head_scale

    def fill(self, name: str, tensor: Tensor) -> None:
        """As every `DenseNetwork`, but weights uniform with variance 1 / (3 inputs of a unit), torch's own choice (LeCun et al.
        1998, "Efficient BackProp"): a norm takes the scale of a convolution away, and smaller weights turn faster."""
        if tensor.dim() > 1:
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        else:
            super().fill(name, tensor)


class ConvNormAct(nn.Module):
    """3 x 3 convolution, 2 x 2 max pooling if asked for, norm, ReLU."""

    def __init__(self, fan_in: int, fan_out: int, section: ResNetSection, pool: bool) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.norm = BatchNorm2d(fan_out) if section.norm == "batch" else nn.GroupNorm(section.groups(fan_out), fan_out)

    def forward(self, x: Tensor) -> Tensor:  # (B, fan_in, H, W) -> (B, fan_out, H or H/2, W or W/2)
        return self.norm(self.pool(self.convolution(x))).relu_()


class ResidualBlock(nn.Module):
    """x plus two convolutions with norm and activation each; nothing after the sum."""

    def __init__(self, channels: int, section: ResNetSection) -> None:
        super().__init__()
        self.first = ConvNormAct(channels, channels, section, pool=False)
        self.second = ConvNormAct(channels, channels, section, pool=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        return x + self.second(self.first(x))


class Stage(nn.Module):
    """A convolution that halves height and width, and residual blocks."""

    def __init__(self, fan_in: int, fan_out: int, blocks: int, section: ResNetSection) -> None:
        super().__init__()
        self.down = ConvNormAct(fan_in, fan_out, section, pool=True)
        self.blocks = nn.Sequential(*(ResidualBlock(fan_out, section) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:  # (B, fan_in, H, W) -> (B, fan_out, H/2, W/2)
        return self.blocks(self.down(x))
