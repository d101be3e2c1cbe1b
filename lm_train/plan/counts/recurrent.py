"""Recurrent networks by formula."""

from __future__ import annotations

from collections.abc import Iterator

from lm_train.recipe import Recurrent

_GATES = {"lstm": 4, "gru": 3, "rnn": 1}


def recurrent_shapes(model: Recurrent, vocab_size: int, n_classes: int | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each parameter of the network, in the order of its `named_parameters`.

    Args:
        model: the recipe's model section.
        vocab_size: rows of the embedding (the padded size).
        n_classes: of a classifier; None for a language model.
    """
    rows, state = _GATES[model.cell] * model.hidden_size, model.hidden_size
    yield "encoder.token_embedding.weight", (vocab_size, model.n_embd)
    for number, width in enumerate(_widths(model)):
        cell = f"encoder.cells.{number}"
        yield f"{cell}.weight_ih_l0", (rows, width)
        yield f"{cell}.weight_hh_l0", (rows, state)
        yield f"{cell}.bias_ih_l0", (rows,)
        yield f"{cell}.bias_hh_l0", (rows,)
    directions = 2 if model.bidirectional else 1
    yield "head.weight", (vocab_size if n_classes is None else n_classes, directions * state)
    if n_classes is not None:
        yield "head.bias", (n_classes,)


def recurrent_flops(model: Recurrent, vocab_size: int, n_classes: int | None, tokens: float) -> int:
    """Forward and backward FLOPs of a sample of so many tokens: 3 times those of the forward pass, in which a cell takes
    2 g H (E + H) a token with g gates, inputs of width E and a state of width H, a language model's head 2 H V a token, and a
    classifier's 2 D H C a text. Additions of biases, activations and dropout are left out.
    """
    rows, state = _GATES[model.cell] * model.hidden_size, model.hidden_size
    each = sum(2 * rows * (width + state) for width in _widths(model))
    if n_classes is None:
        return round(3 * tokens * (each + 2 * state * vocab_size))
    directions = 2 if model.bidirectional else 1
    return round(3 * (tokens * each + 2 * directions * state * n_classes))


def _widths(model: Recurrent) -> list[int]:
    """Of the inputs of each cell: layer by layer, and in it by direction."""
    directions = 2 if model.bidirectional else 1
    first, later = [model.n_embd] * directions, [directions * model.hidden_size] * directions
    return first + later * (model.n_layer - 1)
