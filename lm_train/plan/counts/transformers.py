"""BERT and the encoder-decoder by formula."""

from __future__ import annotations

from collections.abc import Iterator

from lm_train.recipe import BERT, Seq2Seq

Named = Iterator[tuple[str, tuple[int, ...]]]


def bert_shapes(model: BERT, vocab_size: int, n_classes: int | None) -> Named:
    """Name and shape of each parameter, in the order of `named_parameters`.

    Args:
        model: the recipe's model section.
        vocab_size: rows of the embedding (the padded size), with the mask symbol.
        n_classes: None for a masked language model, whose head shares the embedding's weights.
    """
    d = model.n_embd
    yield "token_embedding.weight", (vocab_size, d)
    yield "position_embedding.weight", (model.block_size, d)
    yield "type_embedding.weight", (2, d)
    yield from _layer("embedding_norm", d)
    for i in range(model.n_layer):
        yield from _block(f"blocks.{i}", d)
    if n_classes is None:
        yield from _layer("transform", d, d)
        yield from _layer("transform_norm", d)
        yield "head.bias", (vocab_size,)
    else:
        yield from _layer("pooler", d, d)
        yield from _layer("classifier", n_classes, d)


def seq2seq_shapes(model: Seq2Seq, vocab_size: int) -> Named:
    """Name and shape of each parameter, in the order of `named_parameters`; both embeddings and the head are one."""
    d = model.n_embd
    yield "token_embedding.weight", (vocab_size, d)
    for stack in ("encoder", "decoder"):
        for i in range(model.n_layer):
            yield from _block(f"{stack}.{i}", d, cross_attention=stack == "decoder")


def bert_flops(model: BERT, n_parameters: int, vocab_size: int, length: float, guessed: float | None) -> int:
    """Forward and backward FLOPs of one sample of `length` tokens: (6 N + 12 L d T) a token, with N without the tables that
    are only looked up; the masked-LM head's product with the V x d embedding is counted at the guessed positions only.

    Args:
        model: the recipe's model section.
        n_parameters: of the network.
        vocab_size: rows of the embedding.
        length: tokens of a sample.
        guessed: share of them that the head predicts; None without one.
    """
    d = model.n_embd
    n = n_parameters - (vocab_size + model.block_size + 2) * d
    head = 0.0 if guessed is None else guessed * vocab_size * d
    return round(length * (6 * (n + head) + 12 * model.n_layer * d * length))


def seq2seq_flops(model: Seq2Seq, n_parameters: int, vocab_size: int, source: float, target: float) -> int:
    """Forward and backward FLOPs of one pair of S source and T target tokens.

    6 FLOPs a parameter and token: the encoder's, and the decoder's keys and values of the source, for S tokens; what else the
    decoder has, and the head (the V x d embedding), for T. Attention, 12 d a pair of positions that meet, in each layer: S^2
    in the encoder, T^2 (without regard to the causal mask) and T S in the decoder.
    """
    layers, d = model.n_layer, model.n_embd
    encoder = layers * sum(_size(shape) for _, shape in _block("", d))
    of_source = layers * 2 * d * (d + 1)
    decoder = n_parameters - vocab_size * d - encoder - of_source
    products = source * (encoder + of_source) + target * (decoder + vocab_size * d)
    return round(6 * products + 12 * layers * d * (source**2 + target**2 + source * target))


def _block(name: str, d: int, cross_attention: bool = False) -> Named:
    yield from _layer(f"{name}.attention_norm", d)
    yield from _layer(f"{name}.attention.qkv", 3 * d, d)
    yield from _layer(f"{name}.attention.out", d, d)
    if cross_attention:
        yield from _layer(f"{name}.cross_norm", d)
        yield from _layer(f"{name}.cross_attention.query", d, d)
        yield from _layer(f"{name}.cross_attention.key_value", 2 * d, d)
        yield from _layer(f"{name}.cross_attention.out", d, d)
    yield from _layer(f"{name}.mlp_norm", d)
    yield from _layer(f"{name}.mlp.up", 4 * d, d)
    yield from _layer(f"{name}.mlp.down", d, 4 * d)


def _layer(name: str, *shape: int) -> Named:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _size(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)
