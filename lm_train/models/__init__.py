"""The networks: plain nn.Module, free of Lightning. `build` makes the one that a section describes."""

from __future__ import annotations

from lm_train.models.decoder import Decoder
from lm_train.models.gpt import GPT
from lm_train.models.llama import Llama
from lm_train.plan import Plan
from lm_train.recipe import AnyModel


def build(section: AnyModel, plan: Plan, vocab_size: int, initialise: bool = True) -> Decoder:
    """The network with weights drawn from torch's default generator (unless built on the meta device).

    Args:
        section: the recipe's model section.
        plan: decides activation checkpointing and the pieces of the loss.
        vocab_size: token ids of the corpus' tokenizer, used where the section says `auto`.
        initialise: False leaves every parameter on the meta device; its initial value comes from the network's `fill`.
    """
    vocab_size = vocab_size if section.vocab_size == "auto" else section.vocab_size
    checkpointing, chunks = plan.activation_checkpointing, plan.cross_entropy_chunks
    match section.kind:
        case "gpt":
            return GPT(section, vocab_size, checkpointing, chunks, initialise)
        case "llama":
            return Llama(section, vocab_size, checkpointing, chunks, initialise)


__all__ = ["GPT", "Decoder", "Llama", "build"]
