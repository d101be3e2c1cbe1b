"""Operations of torch on the tape: what each keeps, what it makes in the forward and in the backward pass, what it costs.

As torch 2.13 does them on a CPU and, where `device` is "gpu", with CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lm_train.plan.work.ops import WIDTH, Kind, Number
from lm_train.plan.work.tape import Gradient, Group, Node, Parameter, Tape, Tensor

SORTED_ABOVE = 3072
"""More ids than so many CUDA's backward pass of an embedding sorts, and sums runs of ten of a kind in fp32 before it writes them
(aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu); the memory is that for as many different ids as there may be."""
Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh", "sigmoid", "leaky_relu"]
KEEPS_RESULT = ("relu", "tanh", "sigmoid")
"""Activations whose backward pass reads their result; that of the others reads their input."""


def linear(tape: Tape, x: Tensor, weight: Parameter, bias: Parameter | None, name: str, logits: bool = False) -> Tensor:
    """x @ weight.T + bias; the weight is (out, in)."""
    width, inner = weight.shape
    b = tape.lowered(bias)
    w = tape.lowered(weight)
    assert w is not None
    x = cast(tape, x, w.number)
    rows, number = x.size // inner, w.number
    group: Group = "logits" if logits else ""
    flops, moved = 2.0 * rows * width * inner, x.bytes + w.bytes + rows * width * WIDTH[number]
    saved = tape.keep(x, w)
    out = tape.new(rows * width, number, group)
    tape.op(name, "matmul", flops, moved, (rows, width, inner), number)
    of_x, of_weight = x.node is not None, weight if w is weight else None
    of_bias = bias if b is bias else None

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        into_x = None
        if of_x:
            tape.op(name, "matmul", flops, moved, (rows, inner, width), number)
            into_x = tape.new(rows * inner, number, view=True)
        tape.op(name, "matmul", flops, moved, (width, inner, rows), number)
        into_weight = tape.new_gradient(weight.size, number, of_weight, view=True)
        if bias is None:
            return None, into_x, into_weight
        tape.op(name, "reduction", 0, rows * width * WIDTH[number], (rows * width,), number)
        return tape.new_gradient(width, number, of_bias, view=True), into_x, into_weight

    return tape.result(out, (b, x, w), saved, backward)  # as addmm has them: the first is added up first


def cast(tape: Tape, x: Tensor, number: Number) -> Tensor:
    """x in another type; itself where it has that type."""
    if x.number == number:
        return x
    size, before = x.size, x.number
    group = x.storage.group if x.storage is not None else ""
    moved = size * (WIDTH[before] + WIDTH[number])
    out = tape.new(size, number, group)
    tape.op("cast", "copy", 0, moved, (size,), number)

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        tape.op("cast", "copy", 0, moved, (size,), before)
        return (tape.new(size, before, group),)

    return tape.result(out, (x,), [], backward)


def embedding(tape: Tape, table: Parameter, count: int, name: str, indices: int = 0) -> Tensor:
    """Rows of a table.

    Args:
        count: rows looked up.
        indices: bytes of the ids where they are made for it; those of the batch itself are not counted.
    """
    width, number = table.shape[1], table.number
    ids = Tensor(tape.new(indices // 8, "fp32").storage, 0, "fp32") if indices else None
    saved = tape.keep(ids)
    out = tape.new(count * width, number)
    tape.op(name, "lookup", 0, 2 * out.bytes, (out.size,), number)

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        moved = 2 * count * width * WIDTH[number] + table.bytes
        tape.op(name, "lookup", 0, moved, (table.size,), number)
        result = tape.new_gradient(table.size, number, table)
        if tape.device == "gpu" and count > SORTED_ABOVE:
            tape.new((count // 10 + min(count, table.shape[0])) * width, "fp32")
        return (result,)

    return tape.result(out, (table,), saved, backward)


def add(tape: Tape, x: Tensor, y: Tensor, name: str, subtract: bool = False) -> Tensor:
    """x + y, or x - y, of which one may be broadcast along the first dimensions; in the wider type."""
    size, number = max(x.size, y.size), _wider(x, y)
    moved = x.bytes + y.bytes + size * WIDTH[number]
    out = tape.new(size, number)
    if tape.device == "cpu" and x.number != y.number:
        tape.new(
            min(x, y, key=lambda each: WIDTH[each.number]).size, number
        )  # a copy in the wider type, for the moment
    tape.op(name, "elementwise", 0, moved, (size,), number)
    inputs = [(each.size, each.number, each.node is not None) for each in (x, y)]

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        (gradient,) = gradients
        into_y = made(tape, name, "elementwise", size, number, 2) if subtract else gradient
        return _fitted(tape, gradient, *inputs[0]), _fitted(tape, into_y, *inputs[1])

    return tape.result(out, (x, y), [], backward)


def _fitted(tape: Tape, gradient: Gradient, size: int, number: Number, wanted: bool) -> Gradient:
    """A gradient in shape and type of what it belongs to."""
    if gradient is None or not wanted:
        return None
    if gradient.size != size:
        tape.op("gradient.sum", "reduction", 0, gradient.bytes, (gradient.size,), gradient.number)
        gradient = tape.new(size, gradient.number, view=True)
    if gradient.number != number:
        tape.op("cast", "copy", 0, gradient.bytes + size * WIDTH[number], (size,), number)
        gradient = tape.new(size, number)
    return gradient


def multiply(tape: Tape, x: Tensor, y: Tensor, name: str) -> Tensor:
    """x * y, both of one size and type."""
    saved = tape.keep(x if y.node is not None else None, y if x.node is not None else None)
    size, number = x.size, x.number
    out = tape.new(size, number)
    tape.op(name, "elementwise", 0, 3 * out.bytes, (size,), number)
    wanted = [each.node is not None for each in (x, y)]

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        return tuple(made(tape, name, "elementwise", size, number, 3) if each else None for each in wanted)

    return tape.result(out, (x, y), saved, backward)


def scale(tape: Tape, x: Tensor, factors: Tensor | None, name: str) -> Tensor:
    """x times constants, broadcast."""
    saved = tape.keep(factors)
    size, number = x.size, x.number
    out = made(tape, name, "elementwise", size, number, 2)

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        return (made(tape, name, "elementwise", size, number, 2),)

    return tape.result(out, (x,), saved, backward)


def concatenate(tape: Tape, parts: Sequence[Tensor], name: str) -> Tensor:
    """The parts in one new tensor; their gradients are views of its gradient."""
    sizes, number = [part.size for part in parts], parts[0].number
    out = made(tape, name, "copy", sum(sizes), number, 2)

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        (gradient,) = gradients
        assert gradient is not None
        return tuple(Tensor(gradient.storage, size, number, view=True) for size in sizes)

    return tape.result(out, parts, [], backward)


def repeat(tape: Tape, x: Tensor, times: int, name: str) -> Tensor:
    """x so many times, in a new tensor."""
    size, number = x.size, x.number
    out = made(tape, name, "copy", times * size, number, 2)

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        tape.op(name, "reduction", 0, (times + 1) * size * WIDTH[number], (times * size,), number)
        return (tape.new(size, number),)

    return tape.result(out, (x,), [], backward)


def made(tape: Tape, name: str, kind: Kind, size: int, number: Number, passes: int) -> Tensor:
    """A new tensor for which as many tensors of its size are read or written as `passes` says."""
    out = tape.new(size, number)
    tape.op(name, kind, 0, passes * out.bytes, (size,), number)
    return out


def activation(tape: Tape, x: Tensor, kind: Activation, name: str) -> Tensor:
    saved = [] if kind in KEEPS_RESULT else tape.keep(x)
    size, number, name = x.size, x.number, f"{name}.{kind}"
    out = made(tape, name, "activation", size, number, 2)
    if kind in KEEPS_RESULT:
        saved = tape.keep(out)

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        return (made(tape, name, "activation", size, number, 3),)

    return tape.result(out, (x,), saved, backward)


def dropout(tape: Tape, x: Tensor, p: float, name: str) -> Tensor:
    """On a CPU x times noise of its own type; a GPU's kernel keeps a mask of one byte for each value."""
    if p == 0 or not tape.training:
        return x
    size, number = x.size, x.number
    if tape.device == "cpu":
        noise = made(tape, name, "elementwise", size, number, 3)
        return multiply(tape, x, noise, name)
    out = made(tape, name, "elementwise", size, number, 3)
    mask = Tensor(tape.new(-(-size // 4), "fp32").storage, size, "fp32")
    saved = tape.keep(mask)

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        return (made(tape, name, "elementwise", size, number, 3),)

    return tape.result(out, (x,), saved, backward)


def split(tape: Tape, x: Tensor, sizes: Sequence[int], name: str) -> list[Tensor]:
    """Views of parts of x; their gradients are put together in a new tensor."""
    size, number = x.size, x.number
    parts = [Tensor(x.storage, part, number, index=i) for i, part in enumerate(sizes)]

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        return (made(tape, name, "copy", size, number, 2),)

    if tape.training and x.node is not None:
        node = Node(tape, (x,), [], backward, len(parts))
        for part in parts:
            part.node = node
    return parts


def contiguous(tape: Tape, x: Tensor, name: str) -> Tensor:
    """A copy of x that lies as the next operation wants it; its gradient is a view."""

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        (gradient,) = gradients
        assert gradient is not None
        return (Tensor(gradient.storage, gradient.size, gradient.number, view=True),)

    return tape.result(made(tape, name, "copy", x.size, x.number, 2), (x,), [], backward)


def select(tape: Tape, x: Tensor, size: int, name: str, view: bool = False) -> Tensor:
    """So many values of x: as a view, or gathered in a new tensor, for which torch keeps x whole.

    The gradient is put into zeros of the size of x.
    """
    whole, number = x.size, x.number
    saved = [] if view else tape.keep(x)
    out = Tensor(x.storage, size, number) if view else made(tape, name, "lookup", size, number, 2)

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        return (made(tape, name, "lookup", whole, number, 1),)

    return tape.result(out, (x,), saved, backward)


def masked_columns(tape: Tape, logits: Tensor) -> Tensor:
    """Values set in place in a slice of the logits: the gradient is copied before the slice of it is set to 0."""
    size, number = logits.size, logits.number

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        out = tape.new(size, number, "logits")
        tape.op("loss.padding", "copy", 0, 2 * out.bytes, (size,), number)
        return (out,)

    return tape.result(Tensor(logits.storage, size, number), (logits,), [], backward)


def cross_entropy(tape: Tape, logits: Tensor, copied: bool = False) -> Tensor:
    """Of fp32 logits, summed: log_softmax and nll_loss; `copied`: the logits are a slice, which log_softmax copies first."""
    size = logits.size
    copy = tape.new(size, "fp32", "logits") if copied else None
    probabilities = tape.new(size, "fp32", "logits")
    tape.op("loss.log_softmax", "loss", 0, 2 * probabilities.bytes, (size,), "fp32")
    del copy

    def of_softmax(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        out = tape.new(size, "fp32", "logits")
        tape.op("loss.log_softmax", "loss", 0, 3 * out.bytes, (size,), "fp32")
        return (out,)

    tape.result(probabilities, (logits,), tape.keep(probabilities), of_softmax)

    def of_nll(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        out = tape.new(size, "fp32", "logits")
        tape.op("loss.nll", "loss", 0, out.bytes, (size,), "fp32")
        return (out,)

    saved = tape.keep(probabilities, None)
    loss = tape.new(1, "fp32")
    return tape.result(loss, (probabilities,), saved, of_nll)


def _wider(x: Tensor, y: Tensor) -> Number:
    return x.number if WIDTH[x.number] >= WIDTH[y.number] else y.number
