"""The networks: plain nn.Module, free of Lightning. `build` makes the one that a section describes."""

from __future__ import annotations

from torch import nn

from lm_train.models.gpt import GPT
from lm_train.plan import Plan
from lm_train.recipe import ModelSection


def build(section: ModelSection, plan: Plan, vocab_size: int, initialise: bool = True) -> nn.Module:
    """The network with weights drawn from torch's default generator (unless built on the meta device).

    Args:
        section: the recipe's model section.
        plan: decides activation checkpointing and the pieces of the loss.
        vocab_size: token ids of the corpus' tokenizer, used where the section says `auto`.
        initialise: False leaves every parameter on the meta device; its initial value comes from the network's `fill`.
    """
    return GPT(
        section,
        vocab_size=vocab_size if section.vocab_size == "auto" else section.vocab_size,
        activation_checkpointing=plan.activation_checkpointing,
        cross_entropy_chunks=plan.cross_entropy_chunks,
        initialise=initialise,
    )


__all__ = ["GPT", "build"]
