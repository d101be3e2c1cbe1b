"""Encoder-decoders: one text in, another out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_train.data import IGNORED, Batch
from lm_train.data.batches import Split
from lm_train.data.pairs import DECODED_SAMPLES
from lm_train.modules.base import TrainingModule
from lm_train.plan import Plan
from lm_train.recipe import AnyOptim


class SequenceToSequence(TrainingModule):
    """Predicts each next token of a target from the source and the target's true tokens before it (teacher forcing).

    Args:
        start: id that the decoder begins with.
        end: id that ends a target.
    """

    def __init__(self, net: nn.Module, optim: AnyOptim, plan: Plan, seed: int, start: int, end: int) -> None:
        super().__init__(net, optim, plan, seed)
        self.start, self.end = start, end

    def loss(self, batch: Batch) -> Tensor:
        return self.net(**self.inputs(batch), target_tokens=batch["target_tokens"], targets=batch["targets"])

    def start_evaluation(self) -> None:
        self._totals = torch.zeros(5, dtype=torch.float64, device=self.device)

    def evaluate(self, batch: Batch) -> None:
        valid = batch["valid"]
        targets = batch["targets"].masked_fill(~valid[:, None], IGNORED)  # (B, T)
        logits = self.net(**self.inputs(batch), target_tokens=batch["target_tokens"]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        right, count = (logits.argmax(dim=-1) == targets).sum(), (targets != IGNORED).sum()
        exact = decoded = torch.zeros((), device=self.device)
        if batch["decode_tokens"]:
            counted = valid & (batch["samples"] < DECODED_SAMPLES)
            exact, decoded = (self._exact(batch) & counted).sum(), counted.sum()
        self._totals += torch.stack([value.double() for value in (loss, count, right, exact, decoded)])

    def _exact(self, batch: Batch) -> Tensor:
        """Which sources greedy decoding turns into their targets, token by token, (B,)."""
        found = self.net.generate(  # type: ignore[operator]
            batch["tokens"], batch["lengths"], batch["decode_tokens"], self.start, self.end
        )
        wanted = batch["targets"].masked_fill(batch["targets"] == IGNORED, self.end)
        wanted = F.pad(wanted, (0, found.shape[1] - wanted.shape[1]), value=self.end)
        return (found == wanted).all(dim=1)

    def evaluation(self, split: Split) -> dict[str, Tensor]:
        """Over all target tokens of all ranks, each target's end included.

        `accuracy` is the share of tokens that are likeliest where they stand; `exact_match` the share of the split's first
        samples that greedy decoding gets right from start to end.
        """
        total, count, right, exact, decoded = self.summed(self._totals)
        loss = total / count
        return {"loss": loss, "perplexity": loss.exp(), "accuracy": right / count, "exact_match": exact / decoded}
