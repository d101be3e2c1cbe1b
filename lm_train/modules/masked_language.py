"""Masked language models: what stood where a token was hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_train.data import IGNORED, Batch
from lm_train.data.batches import Split
from lm_train.modules.base import TrainingModule


class MaskedLanguageModel(TrainingModule):
    """`net` maps (tokens [, lengths], positions) to logits (B, k, V), and with targets, (B, k), to the summed loss."""

    def loss(self, batch: Batch) -> Tensor:
        return self.net(**self.inputs(batch), positions=batch["positions"], targets=batch["targets"])

    def start_evaluation(self) -> None:
        self._totals = torch.zeros(4, dtype=torch.float64, device=self.device)

    def evaluate(self, batch: Batch) -> None:
        targets = batch["targets"]
        logits = self.net(**self.inputs(batch), positions=batch["positions"]).float()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        frequent = self.trainer.datamodule.most_frequent_token
        counts = (targets != IGNORED).sum(), (logits.argmax(dim=-1) == targets).sum(), (targets == frequent).sum()
        self._totals += torch.stack((losses.double(), *(count.double() for count in counts)))

    def evaluation(self, split: Split) -> dict[str, Tensor]:
        """Over all hidden tokens of all ranks.

        `accuracy` is the share that is guessed right, `unigram_accuracy` that of always guessing the training text's most
        frequent token.
        """
        total, targets, right, frequent = self.summed(self._totals)
        loss = total / targets
        return {
            "loss": loss,
            "perplexity": loss.exp(),
            "accuracy": right / targets,
            "unigram_accuracy": frequent / targets,
        }
