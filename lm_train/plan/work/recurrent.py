"""Recurrent networks: one micro batch on the tape, written as `lm_train.models.recurrent` writes them.

On a CPU torch 2.13 gives an LSTM to oneDNN, whose own memory is known from measurements (`LSTM_*`), and computes GRU and plain
cells step by step, where autograd keeps a few tensors of each step. On a GPU cuDNN's reserve is an estimate.
"""

from __future__ import annotations

from collections.abc import Sequence

from lm_train.plan.layout import Layout
from lm_train.plan.work.blocks import Linear, batch_bytes, chunked_cross_entropy
from lm_train.plan.work.operations import cast, concatenate, cross_entropy, dropout, embedding, linear
from lm_train.plan.work.ops import WIDTH, Number, Work
from lm_train.plan.work.passes import work_of_passes
from lm_train.plan.work.tape import Gradient, Parameter, Tape, Tensor
from lm_train.recipe import Recurrent

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
KEPT_OF_A_STEP = {"gru": 7, "rnn": 1}
"""Values that autograd keeps for each value of a step's state: gates, the candidate and what in-place products overwrite
(torch, aten/src/ATen/native/RNN.cpp)."""
LSTM_KEPT = {4: 20.3, 2: 10.2}
"""Bytes that oneDNN's workspace has in memory for each value of the states after the forward pass, by the bytes of a value:
gates and cell states (measured; it reserves three times as many addresses)."""
LSTM_FORWARD = {4: 16.0, 2: 0.0}
"""The same of its scratch memory in the forward pass, beside packed weights (measured)."""
LSTM_BACKWARD = {4: 34.5, 2: 22.5}
"""The same in the backward pass: gradients of gates in fp32 and of states (measured)."""
CUDNN_RESERVE = {"lstm": 6, "gru": 5, "rnn": 2}
"""Values of cuDNN's reserve for each value of the states: an estimate."""


def recurrent_work(
    model: Recurrent, rows: int, vocab_size: int, n_classes: int | None, length: int, layout: Layout
) -> Work:
    """
    Args:
        model: the recipe's model section.
        rows: of the token embedding.
        vocab_size: ids that are in use.
        n_classes: of a classifier; None for a language model.
        length: tokens of a sample; of a classifier's the longest of a batch.
        layout: micro batch, precision, chunks.
    """
    tokens = layout.micro_batch_size * length

    def loss(tape: Tape, number: Number) -> Tensor:
        found = _Pass(tape, number, model, layout.micro_batch_size, length)
        if n_classes is None:
            return found.language_model(rows, vocab_size, layout.cross_entropy_chunks)
        return found.classifier(rows, n_classes)

    return work_of_passes(layout, loss, batch_bytes(tokens, tokens if n_classes is None else layout.micro_batch_size))


class _Pass:
    """One pass of a micro batch."""

    def __init__(self, tape: Tape, number: Number, model: Recurrent, samples: int, length: int) -> None:
        self.tape, self.number, self.model, self.samples, self.length = tape, number, model, samples, length
        self.directions = 2 if model.bidirectional else 1

    def language_model(self, rows: int, vocab_size: int, chunks: int) -> Tensor:
        tape = self.tape
        x = self.encoder(rows)
        tape.enter("head")
        hidden = dropout(tape, x, self.model.dropout, "head.dropout")  # held by the caller, too
        del x
        weight = Parameter(self.number, rows, self.model.hidden_size)
        # time comes first until here
        return chunked_cross_entropy(tape, _reordered(tape, hidden, "head.order"), weight, None, vocab_size, chunks)

    def classifier(self, rows: int, n_classes: int) -> Tensor:
        tape, width = self.tape, self.directions * self.model.hidden_size
        x = self.encoder(rows)
        tape.enter("head")
        x = _pooled(tape, x, self.samples * width, whole=self.model.pooling != "last")
        x = dropout(tape, x, self.model.dropout, "head.dropout")
        return cross_entropy(tape, Linear(self.number, width, n_classes, bias=True)(tape, x, "head"))

    def encoder(self, rows: int) -> Tensor:
        tape, model, tokens = self.tape, self.model, self.samples * self.length
        tape.enter("embedding")
        x = embedding(tape, Parameter(self.number, rows, model.n_embd), tokens, "embedding.tokens")
        x = dropout(tape, x, model.dropout, "embedding.dropout")
        turned = tape.new(2 * tokens, "fp32") if self.directions == 2 else None
        width = model.n_embd
        for layer in range(model.n_layer):
            if layer:
                x = dropout(tape, x, model.dropout, "cells.dropout")
            tape.enter(f"encoder.cells.{layer * self.directions}")
            y = self.cell(x, width, last=layer == model.n_layer - 1 and turned is None)
            if turned is not None:
                tape.enter(f"encoder.cells.{layer * self.directions + 1}")
                backwards = self.cell(_gathered(tape, x, turned, "cells.turn"), width)
                y = concatenate(tape, [y, _gathered(tape, backwards, turned, "cells.turn")], "cells.join")
            x = y
            width = self.directions * model.hidden_size
        return x

    def cell(self, x: Tensor, width: int, last: bool = False) -> Tensor:
        """One layer in one direction; `last`: what comes back from the head has samples before time."""
        model, number = self.model, self.number
        gates = GATES[model.cell] * model.hidden_size
        into, over = Parameter(number, gates, width), Parameter(number, gates, model.hidden_size)
        biases = Parameter(number, gates), Parameter(number, gates)
        if model.cell == "lstm" or self.tape.device == "gpu":
            return self.fused(x, width, [into, over, *biases], last)
        return self.stepwise(linear(self.tape, x, into, biases[0], "cells.inputs"), over, biases[1])

    def fused(self, x: Tensor, width: int, weights: Sequence[Parameter], last: bool) -> Tensor:
        """One operation for all steps, of oneDNN or cuDNN."""
        tape, model = self.tape, self.model
        states = self.samples * self.length * model.hidden_size
        lowered = [tape.lowered(weight) for weight in weights]
        assert lowered[0] is not None
        x = cast(tape, x, lowered[0].number)
        number, inputs = x.number, x.size
        packed = sum(w.size for w in weights[:2]) * WIDTH[number]
        cpu, of_x = tape.device == "cpu", x.node is not None
        flops = 2.0 * self.samples * self.length * sum(w.size for w in weights[:2])
        moved = self.length * packed + x.bytes + 6 * states * WIDTH[number]
        shape = (self.samples, self.length, width, model.hidden_size)
        tape.op(f"cells.{model.cell}", "recurrent", flops, moved, shape, number)
        saved = tape.keep(x, *lowered)
        out = tape.new(states, number)
        kept = LSTM_KEPT[WIDTH[number]] if cpu else CUDNN_RESERVE[model.cell] * WIDTH[number]
        workspace = tape.new(round(states * kept / 4), "fp32") if tape.training else None
        scratch = tape.new(round((states * LSTM_FORWARD[WIDTH[number]] + packed) / 4), "fp32") if cpu else None
        del scratch
        saved += tape.keep(out, workspace)

        def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
            tape.op(f"cells.{model.cell}", "recurrent", 2 * flops, 2 * moved, shape, number)
            copy = tape.new(states, number) if last else None
            made: Number = "fp32" if cpu else number  # oneDNN's gradients are fp32 whatever the values are
            into_x = tape.new(inputs, made)
            owners = [of if w is of else None for w, of in zip(lowered, weights, strict=True)]
            into = [tape.new_gradient(w.size, made, of) for w, of in zip(weights, owners, strict=True)]
            scratch = tape.new(round((states * LSTM_BACKWARD[WIDTH[number]] + packed) / 4), "fp32") if cpu else None
            del scratch, copy
            if made != number:
                into_x = tape.new(inputs, number)
                into = [tape.new_gradient(w.size, number, of) for w, of in zip(weights, owners, strict=True)]
            return (into_x if of_x else None, *into)

        return tape.result(out, (x, *lowered), saved, backward)

    def stepwise(self, inputs: Tensor, weight: Parameter, bias: Parameter) -> Tensor:
        """Step by step from the products of all inputs; the weight, cast anew in each step, is kept for each."""
        tape, model = self.tape, self.model
        b, w = tape.lowered(bias), tape.lowered(weight)
        assert w is not None
        number, gates = w.number, inputs.size
        states = self.samples * self.length * model.hidden_size
        flops = 2.0 * self.samples * self.length * weight.size
        moved = self.length * weight.size * WIDTH[number] + 8 * states * WIDTH[number]
        shape = (self.samples, self.length, model.hidden_size, model.hidden_size)
        tape.op(f"cells.steps.{model.cell}", "recurrent", flops, moved, shape, number)
        saved = tape.keep(w)
        casts = (self.length - 1) * (weight.size + bias.size) * WIDTH[number] // 4 if w is not weight else 0
        saved += tape.keep(tape.new(casts, "fp32")) if tape.training else []
        of_steps = tape.new(KEPT_OF_A_STEP[model.cell] * states, number)
        wide = model.cell == "gru" and w is not weight
        if wide:  # under autocast a GRU's states stay in fp32, as the first of them is, and are cast for each product
            of_steps = tape.new(8 * states, number)
        out = tape.new(states, "fp32" if wide else number)
        saved += tape.keep(of_steps)
        of_weight, of_bias = (weight if w is weight else None), (bias if b is bias else None)

        def of_states(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
            tape.op(f"cells.steps.{model.cell}", "recurrent", 2 * flops, 2 * moved, shape, number)
            one, other = tape.new(weight.size, number), tape.new(weight.size, number)  # summed step by step
            into = tape.new_gradient(weight.size, number, of_weight)
            del one, other
            return tape.new(1, number), into, tape.new_gradient(bias.size, number, of_bias)

        def of_inputs(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
            of_each_step = tape.new(gates, number)
            into = tape.new(gates, number)
            del of_each_step
            return (into,)

        given = tape.result(Tensor(inputs.storage, gates, number), (inputs,), [], of_inputs)
        return tape.result(out, (given, w, b), saved, of_states)


def _reordered(tape: Tape, x: Tensor, name: str) -> Tensor:
    """Time and samples exchanged, in a copy; the gradient is a view."""
    size, number = x.size, x.number
    out = tape.new(size, number)
    tape.op(name, "copy", 0, 2 * out.bytes, (size,), number)

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        return (gradients[0],)

    return tape.result(out, (x,), [], backward)


def _gathered(tape: Tape, x: Tensor, positions: Tensor, name: str) -> Tensor:
    """Values of other positions in time; their gradients are added into zeros."""
    size, number = x.size, x.number
    saved = tape.keep(positions)
    out = tape.new(size, number)
    tape.op(name, "lookup", 0, 2 * out.bytes, (size,), number)

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        tape.op(name, "lookup", 0, 3 * size * WIDTH[number], (size,), number)
        return (tape.new(size, number),)

    return tape.result(out, (x,), saved, backward)


def _pooled(tape: Tape, x: Tensor, size: int, whole: bool) -> Tensor:
    """What a classifier sees of a text; `whole`: of all its positions, in a copy without those behind its end."""
    given, number = x.size, x.number
    masked = tape.new(given, number) if whole else None
    out = tape.new(size, number)
    tape.op("pool", "reduction", 0, given * WIDTH[number], (given,), number)
    del masked

    def backward(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
        # zeros of the whole size for each part that was taken, and their sum
        parts = None if whole else (tape.new(given, number), tape.new(given // 2, number))
        spread = tape.new(given, number)
        del parts
        return (spread,)

    return tape.result(out, (x,), [], backward)
