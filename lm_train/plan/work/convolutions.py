"""Operations of image networks on the tape, as torch 2.13 does them with the channels of a pixel side by side.

On a GPU cuDNN takes a workspace besides, which it chooses by itself; `GPU_WORKSPACE` stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from lm_train.plan.work.operations import cast
from lm_train.plan.work.ops import WIDTH
from lm_train.plan.work.tape import Gradient, Parameter, Tape, Tensor

GPU_WORKSPACE = 64 << 20
"""Bytes: an estimate of what cuDNN's convolutions work on."""


def convolution(
    tape: Tape, x: Tensor, weight: Parameter, bias: Parameter | None, pixels: tuple[int, int, int], name: str
) -> Tensor:
    """With padding that keeps height and width.

    Args:
        weight: (out, in, kernel, kernel).
        pixels: samples, height, width.
    """
    fan_out, fan_in, kernel, _ = weight.shape
    samples, height, width = pixels
    b, w = tape.lowered(bias), tape.lowered(weight)
    assert w is not None
    x = cast(tape, x, w.number)
    number, size = w.number, samples * height * width * fan_out
    flops = 2.0 * size * fan_in * kernel * kernel
    moved = x.bytes + w.bytes + size * WIDTH[number]
    shape = (samples, fan_in, fan_out, height, width, kernel)
    saved = tape.keep(x, w)
    tape.op(name, "convolution", flops, moved, shape, number)
    workspace = tape.new(GPU_WORKSPACE // 4, "fp32") if tape.device == "gpu" else None
    out = tape.new(size, number)
    del workspace
    inputs, of_x = x.size, x.node is not None
    of_weight, of_bias = (weight if w is weight else None), (bias if b is bias else None)

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        workspace = tape.new(GPU_WORKSPACE // 4, "fp32") if tape.device == "gpu" else None
        into_x = None
        if of_x:
            tape.op(name, "convolution", flops, moved, shape, number)
            into_x = tape.new(inputs, number)
        tape.op(name, "convolution", flops, moved, shape, number)
        into_weight = tape.new_gradient(weight.size, number, of_weight)
        del workspace
        if bias is None:
            return into_x, into_weight, None
        return into_x, into_weight, tape.new_gradient(fan_out, number, of_bias)

    return tape.result(out, (x, w, b), saved, backward)


def max_pool(
    tape: Tape, x: Tensor, channels: int, pixels: tuple[int, int, int], name: str, reordered: bool = False
) -> Tensor:
    """2 x 2, of (samples, height, width) pixels; it keeps its input and, in 8 bytes each, where the largest values were.

    Args:
        reordered: the gradient comes in another order than the input's: positions and result are put into that, and back.
    """
    samples, height, width = pixels
    size, number = samples * (height // 2) * (width // 2) * channels, x.number
    whole = x.size
    saved = tape.keep(x)
    out = tape.new(size, number)
    saved += tape.keep(tape.new(2 * size, "fp32"))
    tape.op(name, "reduction", 0, x.bytes + out.bytes + 8 * size, (whole,), number)

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        into = tape.new(whole, number)
        tape.op(name, "elementwise", 0, into.bytes + 10 * size, (whole,), number)
        if reordered and tape.device == "cpu":
            positions = tape.new(2 * size, "fp32")
            result = tape.new(whole, number)
            del positions, result
        return (into,)

    return tape.result(out, (x,), saved, backward)


def copied(tape: Tape, x: Tensor, name: str) -> Tensor:
    """The same values in another order in memory; their gradient is taken as it comes."""
    size, number = x.size, x.number
    out = tape.new(size, number)
    tape.op(name, "copy", 0, 2 * out.bytes, (size,), number)

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        return (gradients[0],)

    return tape.result(out, (x,), [], backward)


def norm_and_relu(
    tape: Tape, x: Tensor, weight: Parameter, bias: Parameter, statistics: int, ranks: int, name: str
) -> Tensor:
    """Batch or group normalisation, and a ReLU that writes over its result.

    Args:
        statistics: means and deviations that are kept, each.
        ranks: of a batch normalisation over several processes, which torch computes in Python's steps; 1 for the fused kernel.
    """
    size, number = x.size, x.number
    saved = tape.keep(x, weight, bias)
    wide = tape.new(size, "fp32") if ranks > 1 and number != "fp32" else None
    del wide
    out = tape.new(size, number)
    saved += tape.keep(tape.new(statistics, "fp32"), tape.new(statistics, "fp32"))
    tape.op(f"{name}.batch", "normalisation", 0, 3 * out.bytes, (size,), number)

    def of_norm(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        tape.op(f"{name}.batch", "normalisation", 0, 3 * size * WIDTH[number], (size,), number)
        into_weight = tape.new_gradient(weight.size, weight.number, weight)
        into_bias = tape.new_gradient(bias.size, bias.number, bias)
        if ranks > 1:
            into = _synchronised(tape, size, number == "fp32")
        else:
            into, scratch = tape.new(size, number), tape.new(size, number)
            del scratch
        return cast(tape, into, number), into_weight, into_bias

    normed = tape.result(out, (x, weight, bias), saved, of_norm)
    tape.op(f"{name}.relu", "activation", 0, 2 * out.bytes, (size,), number)

    def of_relu(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        into = tape.new(size, number)
        tape.op(f"{name}.relu", "activation", 0, 3 * into.bytes, (size,), number)
        return (into,)

    return tape.result(Tensor(out.storage, size, number), (normed,), tape.keep(out), of_relu)


def _synchronised(tape: Tape, size: int, whole: bool) -> Tensor:
    """The steps of `lm_train.models.batch_norm`'s backward pass, in fp32; `whole`: as the values are."""
    wide = None if whole else tape.new(size, "fp32")
    centred = tape.new(size, "fp32")
    normalised = tape.new(size, "fp32")
    del wide, centred
    gradient = None if whole else tape.new(size, "fp32")
    first, second = tape.new(size, "fp32"), tape.new(size, "fp32")
    inner = tape.new(size, "fp32")
    del first, second
    into = tape.new(size, "fp32")
    del inner, normalised, gradient
    return into


def largest(tape: Tape, x: Tensor, channels: int, samples: int, name: str) -> Tensor:
    """The largest value of each channel; its gradient goes to wherever that stood, found by comparing all values with it."""
    size, number = x.size, x.number
    saved = tape.keep(x)
    out = tape.new(samples * channels, number)
    saved += tape.keep(out)
    tape.op(name, "reduction", 0, x.bytes, (size,), number)

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        there = tape.new(-(-size // 4), "fp32")  # one byte for each value
        counted = tape.new(2 * size, "fp32")  # as int64, whose sum tells how many are the largest
        del counted
        masked = tape.new(size, number)
        into = tape.new(size, number)
        del there
        tape.op(name, "elementwise", 0, 5 * masked.bytes, (size,), number)
        return (into,)

    return tape.result(out, (x,), saved, backward)
