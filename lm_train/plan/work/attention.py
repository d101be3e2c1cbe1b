"""Attention on the tape: by torch's fused kernels, or with the scores of all pairs written down."""

from __future__ import annotations

from collections.abc import Sequence

from lm_train.plan.work.operations import cast, contiguous, dropout, made, scale
from lm_train.plan.work.tape import Gradient, Tape, Tensor


def attention(
    tape: Tape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: tuple[int, int, int, int, int],
    name: str,
    dropped: float = 0.0,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Softmax(q k^T) v by the kernel that torch.nn.functional.scaled_dot_product_attention takes.

    Fused kernels keep their inputs, their result and a number for each row of the scores. A CPU's knows no dropout: there
    the scores are written down, in fp32. On a GPU flash attention (on Hopper and Blackwell cuDNN's) takes 16 bits and dropout,
    the memory-efficient kernel what else there is; masks are broadcast, never written out.

    Args:
        sizes: batch, heads, queries, keys, size of a head.
        dropped: probability of dropout.
        causal: flops are counted without regard to it.
        mask: bool of the keys that are seen, (batch, keys).
    """
    if takes_scores(tape, dropped):
        return _written_attention(tape, q, k, v, sizes, name, dropped, causal, mask)
    batch, heads, queries, keys, head_size = sizes
    number = q.number
    flops, moved = 4.0 * batch * heads * queries * keys * head_size, 2.0 * (q.bytes + k.bytes)
    name = f"{name}.{'causal' if causal else 'full'}"
    floats = None if mask is None else tape.new(mask.size, number)
    saved = tape.keep(q, k, v, floats)
    out = tape.new(q.size, number)
    sums = tape.new(batch * heads * queries, "fp32")
    saved += tape.keep(out, sums)
    tape.op(name, "attention", flops, moved, sizes, number)
    lengths = q.size, k.size, v.size

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        # the scores are computed again: five products where the forward pass has two
        tape.op(name, "attention", 2.5 * flops, 2 * moved, sizes, number)
        results = tuple(tape.new(length, number) for length in lengths)
        if tape.device == "gpu":
            rows = batch * heads * -(-queries // 128) * 128
            sums, total = tape.new(rows, "fp32"), None
            if number != "fp32":  # in which gradients of the queries are summed (flash_attn/flash_api.cpp)
                total = tape.new(rows * -(-head_size // 32) * 32, "fp32")
            del sums, total
        return results

    return tape.result(out, (q, k, v), saved, backward)


def takes_scores(tape: Tape, dropped: float) -> bool:
    """Whether attention writes the scores of all pairs down (torch's `math` kernel)."""
    return tape.device == "cpu" and tape.training and dropped > 0


def _written_attention(
    tape: Tape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: tuple[int, int, int, int, int],
    name: str,
    dropped: float,
    causal: bool,
    mask: Tensor | None,
) -> Tensor:
    """`_scaled_dot_product_attention_math`; names are held as there."""
    batch, heads, queries, keys, head_size = sizes
    number, pairs = q.number, batch * heads * queries * keys
    floats = None
    if causal:
        floats = tape.new(queries * keys, "fp32")
    elif mask is not None:
        floats = tape.new(mask.size, number)
    q32, k32, v32 = (cast(tape, each, "fp32") for each in (q, k, v))
    scaled = scale(tape, q32, None, name)
    scaled_keys = scale(tape, k32, None, name)
    scores = _product(
        tape, contiguous(tape, scaled, name), contiguous(tape, scaled_keys, name), sizes, pairs, head_size, name
    )
    del scaled_keys
    if floats is not None:
        tape.op(name, "elementwise", 0, 2 * scores.bytes, (pairs,), "fp32")
    scores = _softmax(tape, scores, name)
    scores = dropout(tape, scores, dropped, name)
    returned = None if number == "fp32" else tape.new(pairs, number)  # of which nobody makes use
    out = _product(tape, scores, contiguous(tape, v32, name), sizes, q.size, keys, name)
    size = out.size

    def laid_out(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        return (made(tape, name, "copy", size, "fp32", 2),)

    out = tape.result(Tensor(out.storage, size, "fp32"), (out,), [], laid_out)
    out = cast(tape, out, number)
    del returned, floats, scaled
    return out


def _product(tape: Tape, x: Tensor, y: Tensor, sizes: tuple[int, ...], size: int, inner: int, name: str) -> Tensor:
    """A product of matrices for each head of each sample, of `size` values, each the sum of `inner` products."""
    saved = tape.keep(x, y)
    flops, moved = 2.0 * size * inner, x.bytes + y.bytes + 4.0 * size
    shape = sizes[0] * sizes[1] * sizes[2], size // (sizes[0] * sizes[1] * sizes[2]), inner
    lengths = x.size, y.size
    out = tape.new(size, "fp32")
    tape.op(name, "matmul", flops, moved, shape, "fp32")

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        tape.op(name, "matmul", flops, moved, shape, "fp32")
        tape.op(name, "matmul", flops, moved, shape, "fp32")
        return tuple(tape.new(length, "fp32") for length in lengths)

    return tape.result(out, (x, y), saved, backward)


def _softmax(tape: Tape, scores: Tensor, name: str) -> Tensor:
    """`_safe_softmax`, which looks for rows that are masked as a whole."""
    size = scores.size
    out = made(tape, name, "activation", size, "fp32", 2)
    masked = tape.new(-(-size // 4), "fp32")
    tape.op(name, "elementwise", 0, 1.25 * out.bytes, (size,), "fp32")
    del masked
    saved = tape.keep(out)

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        return (made(tape, name, "activation", size, "fp32", 3),)

    return tape.result(out, (scores,), saved, backward)
