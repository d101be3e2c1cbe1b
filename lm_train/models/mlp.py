"""The multi-layer perceptron (Rumelhart, Hinton & Williams 1986)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lm_train.models.dense import DenseNetwork, HiddenLayers
from lm_train.recipe import MLP as MLPSection


class MLP(DenseNetwork):
    """Dense layers with an activation between them; images are flattened.

    Args:
        section: widths and activation; see `lm_train.recipe.MLP`.
        input_shape: of one sample: (columns,) of a table, (channels, height, width) of an image.
        n_outputs: classes, or values to predict.
        initialise: draw the weights; else they stay on the meta device, for whoever calls `fill`.
    """

    def __init__(
        self, section: MLPSection, input_shape: tuple[int, ...], n_outputs: int, initialise: bool = True
    ) -> None:
        super().__init__()
        self.activation = section.activation
        with torch.device("meta"):  # torch's own initial weights would cost time and random numbers
            widths = (math.prod(input_shape), *section.widths)
            self.hidden = HiddenLayers(widths, section.activation, section.dropout)
            self.head = nn.Linear(widths[-1], n_outputs)
        self.start(initialise)

    def forward(self, inputs: Tensor) -> Tensor:  # (B, ...) -> (B, n_outputs)
        return self.head(self.hidden(inputs.flatten(1)))
