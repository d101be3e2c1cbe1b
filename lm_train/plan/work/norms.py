"""Normalisations on the tape, as torch does them on a CPU and with CUDA."""

from __future__ import annotations

from collections.abc import Sequence

from lm_train.plan.work.operations import cast, made
from lm_train.plan.work.ops import Number
from lm_train.plan.work.tape import Gradient, Parameter, Tape, Tensor


def layer_norm(tape: Tape, x: Tensor, weight: Parameter, bias: Parameter | None, name: str) -> Tensor:
    """Over the last dimension, as wide as the weight."""
    if tape.device == "gpu" and tape.autocast is not None:
        x = cast(tape, x, "fp32")
    size, number = x.size, x.number
    rows = size // weight.size
    saved = tape.keep(x, weight, bias)
    out = made(tape, name, "normalisation", size, number, 2)
    statistics: Number = "fp32" if tape.device == "gpu" else weight.number
    mean, deviation = tape.new(rows, statistics), tape.new(rows, statistics)
    saved += tape.keep(mean, deviation)

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        into_x = made(tape, name, "normalisation", size, number, 3)
        into_weight = tape.new_gradient(weight.size, weight.number, weight)
        into_bias = None if bias is None else tape.new_gradient(bias.size, bias.number, bias)
        return into_x, into_weight, into_bias

    return tape.result(out, (x, weight, bias), saved, backward)


def rms_norm(tape: Tape, x: Tensor, weight: Parameter, name: str) -> Tensor:
    """Over the last dimension. A CPU does it by six operations in fp32, each with a backward pass of its own; CUDA by one."""
    if tape.device == "gpu":
        return _fused_rms_norm(tape, x, weight, name)
    number, rows = x.number, x.size // weight.size
    wide = cast(tape, x, "fp32")
    size = wide.size

    def of_squares(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        power = made(tape, name, "elementwise", size, "fp32", 2)
        twice = made(tape, name, "elementwise", size, "fp32", 2)
        return (power and twice and made(tape, name, "elementwise", size, "fp32", 3),)

    def of_mean(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        return (made(tape, name, "elementwise", size, "fp32", 1),)

    def of_root(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        return (tape.new(rows, "fp32"),)

    saved = tape.keep(wide)
    squares = tape.result(made(tape, name, "elementwise", size, "fp32", 2), (wide,), saved, of_squares)
    tape.op(name, "reduction", 0, squares.bytes, (size,), "fp32")
    mean = tape.result(tape.new(rows, "fp32"), (squares,), [], of_mean)
    root = tape.new(rows, "fp32")
    root = tape.result(root, (mean,), tape.keep(root), of_root)
    del squares, mean

    def of_product(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        into_x = made(tape, name, "elementwise", size, "fp32", 2)
        product = made(tape, name, "elementwise", size, "fp32", 3)
        tape.op(name, "reduction", 0, product.bytes, (size,), "fp32")
        return into_x, tape.new(rows, "fp32")

    saved = tape.keep(wide, root)
    normed = tape.result(made(tape, name, "elementwise", size, "fp32", 2), (wide, root), saved, of_product)

    def of_scaled(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        into_normed = made(tape, name, "elementwise", size, "fp32", 2)
        product = made(tape, name, "elementwise", size, "fp32", 3)
        tape.op(name, "reduction", 0, product.bytes, (size,), "fp32")
        return into_normed, tape.new_gradient(weight.size, weight.number, weight)

    saved = tape.keep(normed, weight)
    out = tape.result(made(tape, name, "elementwise", size, "fp32", 2), (normed, weight), saved, of_scaled)
    return cast(tape, out, number)


def _fused_rms_norm(tape: Tape, x: Tensor, weight: Parameter, name: str) -> Tensor:
    if tape.autocast is not None:
        x = cast(tape, x, "fp32")
    size, number = x.size, x.number
    saved = tape.keep(x, weight)
    out = made(tape, name, "normalisation", size, number, 2)
    saved += tape.keep(tape.new(size // weight.size, "fp32"))

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        into_x = made(tape, name, "normalisation", size, number, 3)
        return into_x, tape.new_gradient(weight.size, weight.number, weight)

    return tape.result(out, (x, weight), saved, backward)
