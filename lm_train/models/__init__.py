"""The networks: plain nn.Module, free of Lightning. `build` makes the one that a section describes."""

from __future__ import annotations

from torch import nn

from lm_train.models.batch_norm import over_all_processes
from lm_train.models.bert import BERT
from lm_train.models.cnn import CNN
from lm_train.models.custom import build_custom
from lm_train.models.decoder import Decoder
from lm_train.models.gpt import GPT
from lm_train.models.hf import build_hf
from lm_train.models.llama import Llama
from lm_train.models.mlp import MLP
from lm_train.models.recurrent import RecurrentClassifier, RecurrentLanguageModel
from lm_train.models.resnet import ResNet
from lm_train.models.seq2seq import Seq2Seq
from lm_train.plan import DataFacts, Plan
from lm_train.recipe import AnyModel


def build(section: AnyModel, plan: Plan, facts: DataFacts, initialise: bool = True) -> nn.Module:
    """The network with weights drawn from torch's default generator (unless built on the meta device).

    Args:
        section: the recipe's model section.
        plan: decides the task, activation checkpointing and the pieces of the loss.
        facts: of the data; `section.vocab_size` wins over theirs.
        initialise: False leaves every parameter on the meta device; its initial value comes from the network's `fill`. A
            network of someone else's has no `fill`, and is always built whole.
    """
    checkpointing, chunks = plan.activation_checkpointing, plan.cross_entropy_chunks
    match section.kind:
        case "gpt":
            return GPT(section, _vocab_size(section.vocab_size, facts), checkpointing, chunks, initialise)
        case "llama":
            return Llama(section, _vocab_size(section.vocab_size, facts), checkpointing, chunks, initialise)
        case "mlp":
            return MLP(section, *_sizes(facts), initialise)
        case "cnn":
            return CNN(section, *_sizes(facts), initialise)
        case "resnet":
            return ResNet(section, *_sizes(facts), initialise)
        case "custom":
            return _theirs(build_custom(section, plan, facts), plan)
        case "hf":
            return _theirs(build_hf(section, plan, facts), plan)
        case "recurrent" if plan.task == "causal_lm":
            return RecurrentLanguageModel(section, _vocab_size(section.vocab_size, facts), chunks, initialise)
        case "recurrent":
            assert facts.n_outputs is not None, "the data have no classes"
            return RecurrentClassifier(section, _vocab_size(section.vocab_size, facts), facts.n_outputs, initialise)
        case "bert":
            n_classes = None if plan.task == "masked_lm" else facts.n_outputs
            size = _vocab_size(section.vocab_size, facts)
            return BERT(section, size, n_classes, checkpointing, chunks, initialise)
        case "seq2seq":
            return Seq2Seq(section, _vocab_size(section.vocab_size, facts), checkpointing, chunks, initialise)
    raise AssertionError(section.kind)


def _theirs(net: nn.Module, plan: Plan) -> nn.Module:
    """Someone else's network; its batch norms mean the same on several processes as on one."""
    return over_all_processes(net) if plan.world_size > 1 else net


def _sizes(facts: DataFacts) -> tuple[tuple[int, ...], int]:
    assert facts.input_shape is not None, "the data have no shape"
    assert facts.n_outputs is not None, "the data have no targets"
    return facts.input_shape, facts.n_outputs


def _vocab_size(asked: int | str, facts: DataFacts) -> int:
    size = facts.vocab_size if isinstance(asked, str) else asked
    assert size is not None, "the data have no vocabulary"
    return size


__all__ = [
    "BERT",
    "CNN",
    "GPT",
    "MLP",
    "Decoder",
    "Llama",
    "RecurrentClassifier",
    "RecurrentLanguageModel",
    "ResNet",
    "Seq2Seq",
    "build",
]
