"""A sample of text from the trained model at the end of the run."""

from __future__ import annotations

import lightning.pytorch as L
from tokenizers import Tokenizer
from torch import nn

from lm_train.generate import sample_text
from lm_train.loop import StepTrainer
from lm_train.strategy import is_sharded


class Sample(L.Callback):
    """Draws text once the last step is done, while the network still stands as it was trained.

    Where parameters are sharded each forward pass needs every rank, and all of them draw the same text.

    Args:
        tokenizer: of the corpus.
        n_tokens: how many to draw; 0 draws none.
        seed: of the drawing.
    """

    def __init__(self, tokenizer: Tokenizer, n_tokens: int, seed: int) -> None:
        self.tokenizer, self.n_tokens, self.seed = tokenizer, n_tokens, seed
        self.text: str | None = None

    def on_train_end(self, trainer: StepTrainer, pl_module: L.LightningModule) -> None:
        if trainer.stop_code is None and (trainer.is_global_zero or is_sharded(trainer.strategy)):
            self.draw(pl_module.net)

    def draw(self, net: nn.Module) -> None:
        if self.n_tokens:
            self.text = sample_text(net, self.tokenizer, self.n_tokens, self.seed)
