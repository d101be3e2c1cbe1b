"""What every decoder-only transformer shares: its initial weights."""

from __future__ import annotations

import math

from torch import Tensor, nn

from lm_train.models.language_model import LanguageModel
from lm_train.models.transformer import BlockStack

INIT_STD = 0.02
"""Standard deviation of GPT-2's initial weights (Radford et al. 2019; `initializer_range` of the released model)."""


class Decoder(LanguageModel):
    """A language model made of transformer blocks."""

    blocks: BlockStack

    def fill(self, name: str, tensor: Tensor) -> None:
        """Puts the initial value of parameter `name` into `tensor`, which has the parameter's shape.

        GPT-2's initialisation: normal(0, 0.02), biases 0, norms 1. The two projections into the residual stream of each
        block are scaled by 1/sqrt(2 n_layer), so that the stream's variance does not grow with depth (Radford et al. 2019,
        section 2.3). Called in the order of `named_parameters`, it draws the numbers that `init_weights` draws.
        """
        *_, module, kind = name.split(".")
        if kind == "bias":
            nn.init.zeros_(tensor)
        elif module.endswith("norm"):
            nn.init.ones_(tensor)
        else:
            into_stream = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = INIT_STD / math.sqrt(2 * len(self.blocks)) if into_stream else INIT_STD
            nn.init.normal_(tensor, mean=0.0, std=std)
