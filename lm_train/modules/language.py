"""Language models: what follows, or what was masked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lm_train.data import IGNORED, Batch
from lm_train.data.batches import Split
from lm_train.modules.base import TrainingModule


class CausalLanguageModel(TrainingModule):
    """Predicts each next token; `net` maps (tokens, targets) to the summed loss."""

    _totals: Tensor

    def loss(self, batch: Batch) -> Tensor:
        if "documents" in batch:
            return self.net(batch["tokens"], batch["targets"], documents=batch["documents"])
        return self.net(batch["tokens"], batch["targets"])

    def start_evaluation(self) -> None:
        self._totals = torch.zeros(2, dtype=torch.float64, device=self.device)

    def evaluate(self, batch: Batch) -> None:
        targets = (batch["targets"] != IGNORED).sum()
        self._totals += torch.stack((self.loss(batch).double(), targets.double()))

    def evaluation(self, split: Split) -> dict[str, Tensor]:
        """Loss over all targets of all ranks: the global sum over the global count, whatever the batches were."""
        total, targets = self.summed(self._totals)
        loss = total / targets
        bytes_per_token = self.trainer.datamodule.bytes_per_token(split)
        return {"loss": loss, "perplexity": loss.exp(), "bits_per_byte": loss / math.log(2) / bytes_per_token}
