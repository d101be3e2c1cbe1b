"""Parameters and floating-point operations of a model by formula; the tests compare them with the real modules."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lm_train.plan.counts.decoders import decoder_shapes
from lm_train.plan.counts.dense import dense_flops, dense_shapes
from lm_train.plan.counts.recurrent import recurrent_flops, recurrent_shapes
from lm_train.plan.counts.transformers import bert_flops, bert_shapes, seq2seq_flops, seq2seq_shapes
from lm_train.plan.facts import DataFacts
from lm_train.plan.plan import padded_vocab_size
from lm_train.recipe import AnyModel, Task

Shapes = list[tuple[str, tuple[int, ...]]]


def parameter_shapes(model: AnyModel, task: Task, facts: DataFacts) -> Shapes | None:
    """Name and shape of each parameter of the network, in the order of its `named_parameters`; shared ones once.

    Args:
        model: the recipe's model section.
        task: decides the head.
        facts: of the data.

    Returns:
        None where the data must be read first, or a model of someone else's be built.
    """
    asked: int | str = getattr(model, "vocab_size", "auto")
    vocab_size = facts.vocab_size if isinstance(asked, str) else asked
    match model.kind:
        case "gpt" | "llama" if vocab_size is not None:
            return list(decoder_shapes(model, padded_vocab_size(vocab_size)))
        case "mlp" | "cnn" | "resnet" if facts.input_shape is not None and facts.n_outputs is not None:
            return list(dense_shapes(model, facts.input_shape, facts.n_outputs))
        case "recurrent" if vocab_size is not None and (task == "causal_lm" or facts.n_outputs is not None):
            n_classes = facts.n_outputs if task == "classification" else None
            return list(recurrent_shapes(model, padded_vocab_size(vocab_size), n_classes))
        case "bert" if vocab_size is not None and (task == "masked_lm" or facts.n_outputs is not None):
            n_classes = None if task == "masked_lm" else facts.n_outputs
            return list(bert_shapes(model, padded_vocab_size(vocab_size), n_classes))
        case "seq2seq" if vocab_size is not None:
            return list(seq2seq_shapes(model, padded_vocab_size(vocab_size)))
    return None


def parameter_count(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    return sum(math.prod(shape) for _, shape in shapes)


def flops_per_sample(model: AnyModel, task: Task, facts: DataFacts, n_parameters: int) -> int | None:
    """Forward and backward FLOPs of one sample.

    A transformer's token takes 6N + 12 L d T: N counts every parameter, tied embeddings once; attention is counted without
    regard to the causal mask (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

    Returns:
        None where no formula is known.
    """
    match model.kind:
        case "gpt" | "llama":
            tokens = model.block_size
            return tokens * (6 * n_parameters + 12 * model.n_layer * model.n_embd * tokens)
        case "mlp" | "cnn" | "resnet" if facts.input_shape is not None and facts.n_outputs is not None:
            return dense_flops(model, facts.input_shape, facts.n_outputs)
        case "recurrent" if task == "causal_lm" and facts.vocab_size is not None:
            return recurrent_flops(model, padded_vocab_size(facts.vocab_size), None, model.block_size)
        case "recurrent" if facts.n_outputs is not None and facts.tokens_per_sample is not None:
            return recurrent_flops(model, 0, facts.n_outputs, facts.tokens_per_sample)
        case "bert" if (rows := _rows(model, facts)) is not None:
            length = facts.tokens_per_sample or model.block_size
            return bert_flops(model, n_parameters, rows, length, facts.guessed_fraction)
        case "seq2seq" if (rows := _rows(model, facts)) is not None:
            source, target = facts.pair_lengths or (model.block_size, model.block_size)
            return seq2seq_flops(model, n_parameters, rows, source, target)
    return None


def _rows(model: AnyModel, facts: DataFacts) -> int | None:
    """Rows of the token embedding."""
    asked: int | str = getattr(model, "vocab_size", "auto")
    vocab_size = facts.vocab_size if isinstance(asked, str) else asked
    return None if vocab_size is None else padded_vocab_size(vocab_size)


__all__ = ["Shapes", "flops_per_sample", "parameter_count", "parameter_shapes"]
