"""The operations that are timed, as the tape of `lm_train.plan.work` counts them, and how torch does them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_train.calibrate.timing import Call, Case
from lm_train.plan.rates.tables import Point
from lm_train.plan.work import WIDTH, Kind, Number

DTYPES: dict[Number, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VALUE = 0.01
"""Of all inputs: as fast as random ones to compute with, and faster to make."""
TOKENS = (64, 512, 4096)
WEIGHTS = (
    (64, 64),
    (256, 64),
    (64, 256),
    (128, 128),
    (512, 128),
    (128, 512),
    (256, 256),
    (1024, 256),
    (256, 1024),
    (2048, 128),
    (768, 768),
    (3072, 768),
    (768, 3072),
    (8192, 256),
    (512, 512),
    (2048, 512),
    (512, 2048),
    (8192, 512),
    (3072, 6144),
)
"""(columns, inner) of the matrix products: about those of networks from 64 to 768 wide, their heads included."""
LARGE_WEIGHTS = ((2048, 2048), (8192, 2048), (2048, 8192), (4096, 4096), (50304, 768))
"""For GPUs besides."""
LARGEST_FLOPS = {"cpu": 2.5e9, "cuda": 2e12}
ELEMENTS = (2**8, 2**15, 2**18, 2**20, 2**22, 2**24)
"""The last is more than what glibc's malloc keeps to itself: tensors of that size are new pages every time, in training too."""
ATTENTIONS = tuple(
    (batch, heads, length, length, size)
    for batch, heads in ((2, 4), (16, 8))
    for length in (32, 128, 512, 1024)
    for size in (32, 64)
)
CONVOLUTIONS = (
    (16, 3, 16, 32, 32, 3),
    (16, 16, 16, 32, 32, 3),
    (64, 16, 32, 16, 16, 3),
    (64, 32, 32, 16, 16, 3),
    (64, 32, 64, 8, 8, 3),
    (128, 64, 64, 8, 8, 3),
    (64, 1, 32, 28, 28, 3),
    (64, 32, 64, 14, 14, 3),
    (128, 16, 32, 8, 8, 1),
    (8, 3, 32, 64, 64, 3),
    (8, 32, 64, 32, 32, 3),
    (8, 64, 128, 16, 16, 3),
    (8, 128, 256, 16, 16, 3),
)
RECURRENTS = (
    (16, 32, 64, 64),
    (16, 64, 128, 128),
    (64, 32, 128, 128),
    (16, 64, 256, 256),
    (64, 64, 128, 256),
    (32, 32, 512, 512),
    (64, 8, 512, 512),
    (32, 8, 768, 768),
)
COPIED = 24 << 20
"""Bytes of inputs that are taken in turns. What the backward pass reads was made long ago; the forward pass reads what the
operation before has just made."""
NARROW = 8
WIDE = 256
"""Values of a row, for what works along rows."""
VOCABULARY = 2048


@dataclass
class Timed:
    """A case, and the point that comes of it."""

    case: Case
    variant: str
    kind: Kind
    backward: bool
    number: Number
    shape: tuple[int, ...]
    bytes: float

    def point(self, seconds: float) -> Point:
        return Point(
            variant=self.variant,
            kind=self.kind,
            backward=self.backward,
            number=self.number,
            shape=self.shape,
            bytes=self.bytes,
            seconds=seconds,
        )


def operations(device: torch.device, largest: float) -> list[Timed]:
    """All of them.

    Args:
        largest: share of the work of a full calibration that a single one may have.
    """
    numbers: tuple[Number, ...] = ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    most = LARGEST_FLOPS[device.type] * largest
    elements = [n for n in ELEMENTS if n <= ELEMENTS[-1] * max(largest, 2**-6)]
    found: list[Timed] = []
    for number in numbers:
        made = _Makers(device, number)
        found.extend(made.products(most))
        found.extend(made.attentions(most))
        found.extend(made.convolutions(most))
        found.extend(made.passes(elements))
        if number == "fp32" or device.type == "cuda":
            found.extend(made.recurrents(most))
    return found


class _Makers:
    def __init__(self, device: torch.device, number: Number) -> None:
        self.device, self.number, self.dtype, self.width = device, number, DTYPES[number], WIDTH[number]

    def tensor(self, *shape: int, grad: bool = False) -> Tensor:
        return torch.full(shape, VALUE, dtype=self.dtype, device=self.device, requires_grad=grad)

    def timed(
        self, kind: Kind, variant: str, backward: bool, shape: tuple[int, ...], size: float, make: Callable[[], Call]
    ) -> Timed:
        name = f"{kind} {variant} {'backward' if backward else 'forward'} {self.number} {shape}"
        copies = min(4 if backward else 2, max(1, COPIED // max(1, int(size))))
        return Timed(Case(name, make, copies), variant, kind, backward, self.number, shape, size)

    def products(self, most: float) -> Iterator[Timed]:
        weights = WEIGHTS + (LARGE_WEIGHTS if self.device.type == "cuda" else ())
        for rows in TOKENS:
            for columns, inner in weights:
                if 2.0 * rows * columns * inner > most:
                    continue
                size = self.width * (rows * inner + inner * columns + rows * columns)

                def forward(rows: int = rows, columns: int = columns, inner: int = inner) -> Call:
                    x, weight = self.tensor(rows, inner), self.tensor(columns, inner)
                    return lambda: F.linear(x, weight)

                def of_input(rows: int = rows, columns: int = columns, inner: int = inner) -> Call:
                    gradient, weight = self.tensor(rows, columns), self.tensor(columns, inner)
                    return lambda: gradient @ weight

                def of_weight(rows: int = rows, columns: int = columns, inner: int = inner) -> Call:
                    gradient, x = self.tensor(rows, columns), self.tensor(rows, inner)
                    return lambda: gradient.t() @ x

                yield self.timed("matmul", "", False, (rows, columns, inner), size, forward)
                yield self.timed("matmul", "", True, (rows, inner, columns), size, of_input)
                yield self.timed("matmul", "", True, (columns, inner, rows), size, of_weight)

    def attentions(self, most: float) -> Iterator[Timed]:
        for shape in ATTENTIONS:
            batch, heads, length, _, head = shape
            if 8.0 * math.prod(shape) > most:
                continue
            size = 4.0 * self.width * batch * heads * length * head
            for variant, causal in (("full", False), ("causal", True)):

                def forward(shape: tuple[int, ...] = shape, causal: bool = causal, grad: bool = False) -> Call:
                    batch, heads, length, _, head = shape
                    # as the networks have it: views of one tensor in which the heads lie behind the positions
                    whole = self.tensor(batch, length, 3 * heads, head, grad=grad)
                    q, k, v = (part.transpose(1, 2) for part in whole.split((heads,) * 3, dim=2))
                    attend = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # noqa: E731
                    if not grad:
                        return attend
                    out = attend()
                    gradient = torch.full_like(out, VALUE)
                    return lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)

                def backward(forward: Callable[..., Call] = forward) -> Call:
                    return forward(grad=True)

                yield self.timed("attention", variant, False, shape, size, forward)
                yield self.timed("attention", variant, True, shape, 2 * size, backward)

    def convolutions(self, most: float) -> Iterator[Timed]:
        for shape in CONVOLUTIONS:
            batch, channels, out, height, width, kernel = shape
            if 2.0 * math.prod(shape) * kernel > most:
                continue
            size = self.width * (batch * height * width * (channels + out) + channels * out * kernel**2)

            def forward(shape: tuple[int, ...] = shape, of: int | None = None) -> Call:
                batch, channels, out, height, width, kernel = shape
                x, weight = self.tensor(batch, channels, height, width), self.tensor(out, channels, kernel, kernel)
                if channels > 1:  # as the networks have it
                    x = x.contiguous(memory_format=torch.channels_last)
                inputs = (x, weight)
                if of is None:
                    return lambda: F.conv2d(x, weight, padding=kernel // 2)
                inputs[of].requires_grad_()
                made = F.conv2d(x, weight, padding=kernel // 2)
                gradient = torch.full_like(made, VALUE)
                return lambda: torch.autograd.grad(made, inputs[of], gradient, retain_graph=True)

            def of_input(forward: Callable[..., Call] = forward) -> Call:
                return forward(of=0)

            def of_weight(forward: Callable[..., Call] = forward) -> Call:
                return forward(of=1)

            yield self.timed("convolution", "", False, shape, size, forward)
            # the tape has two operations of one shape: what they take together is what counts
            yield self.timed("convolution", "", True, shape, size, of_weight)
            if channels > 3:
                yield self.timed("convolution", "", True, shape, size, of_input)

    def recurrents(self, most: float) -> Iterator[Timed]:
        """An LSTM is one operation; of the others only the steps, which wait for one another, are: their inputs are narrow."""
        for shape in RECURRENTS:
            batch, steps, width, state = shape
            for variant, cell, gates in _CELLS:
                if 2.0 * gates * batch * steps * state * (width + state) > most:
                    continue
                inside = (batch, steps, width if variant == "lstm" else state, state)
                size = float(self.width * batch * steps * (inside[2] + gates * state))

                def forward(
                    shape: tuple[int, ...] = shape,
                    cell: type[torch.nn.RNNBase] = cell,
                    narrow: bool = variant != "lstm",
                    grad: bool = False,
                ) -> Call:
                    batch, steps, width, state = shape
                    width = NARROW if narrow else width
                    layer = cell(width, state).to(self.device, self.dtype)  # type: ignore[arg-type, call-arg]
                    x = self.tensor(steps, batch, width, grad=True)
                    if not grad:
                        return lambda: layer(x)
                    out = layer(x)[0]
                    gradient, inputs = torch.full_like(out, VALUE), (x, *layer.parameters())
                    return lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)

                def backward(forward: Callable[..., Call] = forward) -> Call:
                    return forward(grad=True)

                yield self.timed("recurrent", variant, False, inside, size, forward)
                yield self.timed("recurrent", variant, True, inside, 2 * size, backward)

    def passes(self, sizes: list[int]) -> Iterator[Timed]:
        """What goes through memory once: its abscissa are the bytes that the tape counts for it."""
        byte = self.width
        for n in sizes:
            rows = max(1, n // WIDE)
            flat, shape = (n,), (n,)
            yield self._forward("elementwise", "", shape, 3 * byte * n, lambda x, y: x + y, flat, flat)
            yield self._forward("copy", "", shape, 2 * byte * n, lambda x: x.clone(), flat)
            other = torch.float32 if self.number != "fp32" else torch.bfloat16
            moved = (byte + (4 if other == torch.float32 else 2)) * n
            yield self._forward("copy", "cast", shape, moved, lambda x, other=other: x.to(other), flat)
            yield self._forward("reduction", "", shape, byte * n, lambda x: x.sum(0), (rows, n // rows))
            for variant, function in _ACTIVATIONS.items():
                yield from self._both("activation", variant, shape, (2 * byte * n, 3 * byte * n), function, flat)
            for variant, norm in _NORMS.items():
                wide = (rows, min(n, WIDE))
                vectors = (wide[1:],) * (2 if variant == "layer" else 1)
                yield from self._both(
                    "normalisation", variant, shape, (2 * byte * n, 3 * byte * n), norm, wide, *vectors
                )
            if n >= VOCABULARY * 16:
                images = (n // (64 * 256), 64, 16, 16) if n >= 2**18 else (2, 16, 32, n // 1024)
                weights = (images[1],)
                yield from self._both(
                    "normalisation", "batch", shape, (3 * byte * n, 3 * byte * n), _batch_norm, images, weights, weights
                )
            if n >= VOCABULARY and self.number == "fp32":
                yield from self._losses(n, shape)
            if n >= WIDE:
                yield from self._lookups(rows, shape)

    def _forward(
        self,
        kind: Kind,
        variant: str,
        shape: tuple[int, ...],
        size: float,
        function: Callable[..., Tensor],
        *inputs: tuple[int, ...],
    ) -> Timed:
        def make() -> Call:
            tensors = [self.tensor(*each) for each in inputs]
            return lambda: function(*tensors)

        return self.timed(kind, variant, False, shape, size, make)

    def _both(
        self,
        kind: Kind,
        variant: str,
        shape: tuple[int, ...],
        sizes: tuple[float, float],
        function: Callable[..., Tensor],
        *inputs: tuple[int, ...],
    ) -> Iterator[Timed]:
        yield self._forward(kind, variant, shape, sizes[0], function, *inputs)

        def make() -> Call:
            tensors = [self.tensor(*each, grad=True) for each in inputs]
            out = function(*tensors)
            gradient = torch.full_like(out, VALUE)
            return lambda: torch.autograd.grad(out, tensors, gradient, retain_graph=True)

        yield self.timed(kind, variant, True, shape, sizes[1], make)

    def _losses(self, n: int, shape: tuple[int, ...]) -> Iterator[Timed]:
        rows = n // VOCABULARY
        size = 4 * n
        wide = (rows, VOCABULARY)
        yield from self._both("loss", "log_softmax", shape, (2 * size, 3 * size), lambda x: F.log_softmax(x, -1), wide)

        def nll() -> Call:
            x = self.tensor(*wide, grad=True)
            targets = torch.zeros(rows, dtype=torch.long, device=self.device)
            out = F.nll_loss(x, targets, reduction="sum")
            return lambda: torch.autograd.grad(out, x, retain_graph=True)

        yield self.timed("loss", "nll", True, shape, size, nll)

    def _lookups(self, rows: int, shape: tuple[int, ...]) -> Iterator[Timed]:
        def make(grad: bool = False) -> Call:
            table = self.tensor(VOCABULARY, WIDE, grad=grad)
            ids = torch.arange(rows, device=self.device) * 7919 % VOCABULARY
            if not grad:
                return lambda: F.embedding(ids, table)
            out = F.embedding(ids, table)
            gradient = torch.full_like(out, VALUE)
            return lambda: torch.autograd.grad(out, table, gradient, retain_graph=True)

        moved = 2.0 * self.width * rows * WIDE
        yield self.timed("lookup", "", False, shape, moved, make)
        whole = moved + self.width * VOCABULARY * WIDE
        yield self.timed("lookup", "", True, shape, whole, lambda: make(grad=True))


_CELLS: tuple[tuple[str, type[torch.nn.RNNBase], int], ...] = (
    ("lstm", torch.nn.LSTM, 4),
    ("gru", torch.nn.GRU, 3),
    ("rnn", torch.nn.RNN, 1),
)
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
"""The first stands for those that are not measured."""
_NORMS: dict[str, Callable[..., Tensor]] = {
    "layer": lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias),
    "rms": lambda x, weight: F.rms_norm(x, weight.shape, weight),
}


def _batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)
