"""BERT and the encoder-decoder: one micro batch on the tape."""

from __future__ import annotations

from collections.abc import Callable

from lm_train.plan.facts import DataFacts
from lm_train.plan.layout import Layout
from lm_train.plan.work.blocks import Block, Blocks, Linear, Norm, batch_bytes, chunked_cross_entropy, stack
from lm_train.plan.work.operations import (
    activation,
    add,
    cast,
    cross_entropy,
    dropout,
    embedding,
    linear,
    scale,
    select,
)
from lm_train.plan.work.ops import Number, Work
from lm_train.plan.work.passes import work_of_passes
from lm_train.plan.work.tape import Parameter, Tape, Tensor
from lm_train.recipe import BERT, Seq2Seq

GUESSED = 0.15
"""Share of the tokens that BERT guesses (Devlin et al. 2019, section 3.1), where the data do not say."""


def bert_work(model: BERT, rows: int, vocab_size: int, n_classes: int | None, facts: DataFacts, layout: Layout) -> Work:
    """
    Args:
        model: the recipe's model section.
        rows: of the token embedding.
        vocab_size: ids that are in use.
        n_classes: None for a masked language model.
        facts: lengths of texts, share of guessed tokens.
        layout: micro batch, precision, checkpointing, chunks.
    """
    if n_classes is None:
        guessed = GUESSED if facts.guessed_fraction is None else facts.guessed_fraction
        lengths = [model.block_size]
        count = min(model.block_size, max(1, round(guessed * model.block_size)))  # as data.masking counts
        size = batch_bytes(layout.micro_batch_size * (model.block_size + 2 * count))
    else:
        longest = min(facts.max_length or model.block_size, model.block_size)
        count = 0
        lengths = _lengths(facts.tokens_per_sample, longest)
        size = batch_bytes(layout.micro_batch_size * (longest + 3))

    def network(length: int) -> Callable[[Tape, Number], Tensor]:
        return lambda tape, number: _bert(tape, number, model, rows, vocab_size, n_classes, length, count, layout)

    return work_of_passes(layout, network(lengths[0]), size, usual=network(lengths[-1]) if len(lengths) > 1 else None)


def _lengths(mean: float | None, longest: int) -> list[int]:
    """The longest, whose memory is needed, and where it is another one the usual length, whose time is taken."""
    usual = longest if mean is None else min(longest, max(1, round(mean)))
    return [longest] if usual == longest else [longest, usual]


def _bert(
    tape: Tape,
    number: Number,
    model: BERT,
    rows: int,
    vocab_size: int,
    n_classes: int | None,
    length: int,
    guessed: int,
    layout: Layout,
) -> Tensor:
    samples, d = layout.micro_batch_size, model.n_embd
    config = Blocks(
        n_layer=model.n_layer,
        n_head=model.n_head,
        n_kv_head=model.n_head,
        n_embd=d,
        mlp_width=4 * d,
        dropout=model.dropout,
        bias=True,
        norm="layer",
        rotary=False,
        gated=False,
        causal=False,
        pre_norm=False,
        activation="gelu",
    )
    tape.enter("embedding")
    table = Parameter(number, rows, d)

    def hidden_states() -> Tensor:
        first = embedding(tape, Parameter(number, 2, d), samples * length, "embedding.types", 8 * samples * length)
        at = embedding(tape, Parameter(number, model.block_size, d), length, "embedding.positions", 8 * length)
        tokens = embedding(tape, table, samples * length, "embedding.tokens")
        both = add(tape, tokens, first, "embedding.sum")
        del tokens
        summed = add(tape, both, at, "embedding.sum")
        del both
        normed = Norm(number, config)(tape, summed, "embedding.norm")
        del summed
        x = dropout(tape, normed, model.dropout, "embedding.dropout")
        del normed
        masked = n_classes is not None or not tape.training  # training blocks of a masked language model are full
        seen = tape.mask(samples * length) if masked else None

        def block(x: Tensor, seen: Tensor | None, *others: Tensor | None) -> Tensor:
            return Block(config, number, samples, length)(tape, x, seen)

        return stack(tape, x, model.n_layer, layout.recomputed_blocks, block, "block", seen)

    hidden = hidden_states()
    tape.enter("head")
    if n_classes is not None:
        pooled = select(tape, hidden, samples * d, "pooler.first", view=True)
        tanh = activation(tape, Linear(number, d, d, True)(tape, pooled, "pooler"), "tanh", "pooler.activation")
        logits = Linear(number, d, n_classes, True)(tape, dropout(tape, tanh, model.dropout, "dropout"), "classifier")
        return cross_entropy(tape, cast(tape, logits, "fp32"))
    hidden = select(tape, hidden, samples * guessed * d, "guessed")
    wide = activation(tape, Linear(number, d, d, True)(tape, hidden, "transform"), "gelu", "transform.activation")
    hidden = Norm(number, config)(tape, wide, "transform.norm")
    del wide
    bias = Parameter(number, rows)
    if tape.training:
        return chunked_cross_entropy(tape, hidden, table, bias, vocab_size, layout.cross_entropy_chunks)
    logits = _wanted_logits(tape, hidden, table, bias, vocab_size)
    del hidden
    wide = cast(tape, logits, "fp32")
    copied = wide is logits and rows > vocab_size
    del logits
    return cross_entropy(tape, wide, copied)


def _wanted_logits(tape: Tape, hidden: Tensor, weight: Parameter, bias: Parameter | None, vocab_size: int) -> Tensor:
    """Of an evaluation, which wants the logits themselves, without those of ids that fill the vocabulary up: a view."""
    logits = linear(tape, hidden, weight, bias, "head", logits=True)
    return Tensor(logits.storage, hidden.size // weight.shape[1] * vocab_size, logits.number)


def seq2seq_work(model: Seq2Seq, rows: int, vocab_size: int, facts: DataFacts, layout: Layout) -> Work:
    """
    Args:
        model: the recipe's model section.
        rows: of the token embedding.
        vocab_size: ids that are in use.
        facts: mean lengths of the pairs.
        layout: micro batch, precision, checkpointing, chunks.
    """
    longest = model.block_size
    source, target = (_lengths(mean, longest)[-1] for mean in facts.pair_lengths or (longest, longest))
    size = batch_bytes(layout.micro_batch_size * (3 * longest + 1))

    def network(source: int, target: int) -> Callable[[Tape, Number], Tensor]:
        return lambda tape, number: _seq2seq(tape, number, model, rows, vocab_size, source, target, layout)

    usual = None if (source, target) == (longest, longest) else network(source, target)
    return work_of_passes(layout, network(longest, longest), size, usual=usual)


def _seq2seq(
    tape: Tape, number: Number, model: Seq2Seq, rows: int, vocab_size: int, source: int, target: int, layout: Layout
) -> Tensor:
    samples, d = layout.micro_batch_size, model.n_embd
    table = Parameter(number, rows, d)

    def config(decodes: bool) -> Blocks:
        return Blocks(
            n_layer=model.n_layer,
            n_head=model.n_head,
            n_kv_head=model.n_head,
            n_embd=d,
            mlp_width=4 * d,
            dropout=model.dropout,
            bias=True,
            norm="layer",
            rotary=False,
            gated=False,
            activation="relu",
            causal=decodes,
            pre_norm=False,
            cross_attention=decodes,
        )

    def embedded(length: int) -> Tensor:
        found = embedding(tape, table, samples * length, "embedding.tokens")
        positions = tape.new(length * d, "fp32")
        scaled = scale(tape, found, None, "embedding.scale")
        positions = cast(tape, positions, found.number)
        return dropout(tape, add(tape, scaled, positions, "embedding.sum"), model.dropout, "embedding.dropout")

    def encode(x: Tensor, seen: Tensor | None, *others: Tensor | None) -> Tensor:
        return Block(config(False), number, samples, source)(tape, x, seen)

    def decode(x: Tensor, seen: Tensor | None, memory: Tensor | None, memory_seen: Tensor | None) -> Tensor:
        return Block(config(True), number, samples, target, source)(tape, x, seen, memory, memory_seen)

    every = layout.recomputed_blocks
    tape.enter("embedding")
    seen = tape.mask(samples * source)
    memory = stack(tape, embedded(source), model.n_layer, every, encode, "encoder", seen)
    tape.enter("target embedding")
    hidden = stack(tape, embedded(target), model.n_layer, every, decode, "decoder", None, memory, seen)
    tape.enter("head")
    if tape.training:
        return chunked_cross_entropy(tape, hidden, table, None, vocab_size, layout.cross_entropy_chunks)
    logits = _wanted_logits(tape, hidden, table, None, vocab_size)
    del hidden, memory, seen
    wide = cast(tape, logits, "fp32")
    copied = wide is logits and rows > vocab_size
    del logits
    return cross_entropy(tape, wide, copied)
