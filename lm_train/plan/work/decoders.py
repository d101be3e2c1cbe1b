"""GPT and Llama: one micro batch on the tape."""

from __future__ import annotations

from lm_train.plan.layout import Layout
from lm_train.plan.work.blocks import Block, Blocks, Norm, batch_bytes, chunked_cross_entropy, stack
from lm_train.plan.work.operations import add, dropout, embedding
from lm_train.plan.work.ops import Number, Work
from lm_train.plan.work.passes import work_of_passes
from lm_train.plan.work.tape import Parameter, Tape, Tensor
from lm_train.recipe import GPT, Llama


def decoder_work(model: GPT | Llama, rows: int, vocab_size: int, layout: Layout, apart: bool = False) -> Work:
    """
    Args:
        model: the recipe's model section.
        rows: of the token embedding.
        vocab_size: ids that are in use.
        layout: micro batch, precision, checkpointing, chunks.
        apart: attention stays within documents.
    """
    tokens = layout.micro_batch_size * model.block_size
    return work_of_passes(
        layout,
        lambda tape, weights: _loss(tape, weights, model, rows, vocab_size, layout, apart),
        batch_bytes(tokens, tokens, tokens) if apart else batch_bytes(tokens, tokens),
    )


def _loss(
    tape: Tape, number: Number, model: GPT | Llama, rows: int, vocab_size: int, layout: Layout, apart: bool
) -> Tensor:
    samples, length, d = layout.micro_batch_size, model.block_size, model.n_embd
    match model.kind:
        case "gpt":
            heads, width = model.n_head, 4 * d
            bias, rms = model.bias, False
        case "llama":
            heads, width = model.key_value_heads, model.mlp_width
            bias, rms = False, True
    config = Blocks(
        n_layer=model.n_layer,
        n_head=model.n_head,
        n_kv_head=heads,
        n_embd=d,
        mlp_width=width,
        dropout=model.dropout,
        bias=bias,
        norm="rms" if rms else "layer",
        rotary=rms,
        gated=rms,
        causal=not apart,
    )
    tape.enter("embedding")
    table = Parameter(number, rows, d)
    x = embedding(tape, table, samples * length, "embedding.tokens")
    if model.kind == "gpt":
        positions = Parameter(number, model.block_size, d)
        x = add(tape, x, embedding(tape, positions, length, "embedding.positions", indices=8 * length), "embedding.sum")
    x = dropout(tape, x, model.dropout, "embedding.dropout")

    seen = tape.mask(samples * length * length) if apart else None

    def block(x: Tensor, seen: Tensor | None, *others: Tensor | None) -> Tensor:
        return Block(config, number, samples, length)(tape, x, seen)

    x = stack(tape, x, model.n_layer, layout.recomputed_blocks, block, "block", seen)
    tape.enter("head")
    x = Norm(number, config)(tape, x, "norm")
    head = table if model.kind == "gpt" or model.tie_embeddings else Parameter(number, rows, d)
    return chunked_cross_entropy(tape, x, head, None, vocab_size, layout.cross_entropy_chunks)
