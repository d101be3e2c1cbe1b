"""What networks over images and rows of numbers share: activations, hidden dense layers, initial values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_train.recipe.model_sections import Activation

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
}
_GAIN_OF: dict[Activation, str] = {"gelu": "relu", "silu": "relu"}
"""Whose gain serves an activation for which torch names none: its shape is close."""


class DenseNetwork(nn.Module):
    """A network that ends in dense layers; it maps `inputs`, (B, ...), to (B, n_outputs).

    Its parameters are made on the meta device; `start` gives them a place and their initial values.
    """

    activation: Activation

    def start(self, initialise: bool) -> None:
        """Draws the initial weights; or leaves them on the meta device, for whoever calls `fill`."""
        if initialise:
            self.to_empty(device=torch.get_default_device())
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws the initial weights; after `to_empty` of a model built on the meta device, the same as built in place."""
        for name, parameter in self.named_parameters():
            self.fill(name, parameter)

    def fill(self, name: str, tensor: Tensor) -> None:
        """Puts the initial value of parameter `name` into `tensor`, which has the parameter's shape.

        Normal with variance gain^2 / inputs of a unit (He et al. 2015, arXiv:1502.01852), gain^2 being 2 for ReLU; the last
        layer, which no activation follows, has gain 1. Biases 0, norms 1. Called in the order of `named_parameters`, it
        draws the numbers that `init_weights` draws.
        """
        if name.endswith("bias"):
            nn.init.zeros_(tensor)
        elif tensor.dim() == 1:
            nn.init.ones_(tensor)
        else:
            follows = "linear" if name.startswith("head.") else _GAIN_OF.get(self.activation, self.activation)
            nn.init.kaiming_normal_(tensor, nonlinearity=follows)  # type: ignore[arg-type]


class HiddenLayers(nn.ModuleList):
    """Dense layers, each followed by the activation and dropout.

    Args:
        widths: of the inputs, then of each layer.
        activation: by name.
        dropout: probability.
    """

    def __init__(self, widths: Iterable[int], activation: Activation, dropout: float) -> None:
        super().__init__(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths))
        self.activation, self.dropout = ACTIVATIONS[activation], dropout

    def forward(self, x: Tensor) -> Tensor:  # (B, inputs) -> (B, last width)
        for layer in self:
            x = F.dropout(self.activation(layer(x)), self.dropout, self.training)
        return x
