"""Where fake tensors would go another way than real ones do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

_PROBED = (8, 16)
"""Steps, and rows, of which a workspace is measured."""


@contextlib.contextmanager
def as_with_values() -> Iterator[None]:
    """transformers looks into position ids for packed sequences, which ours never are; of fakes it assumes them to be, and
    makes a mask of B x T x T values."""
    try:
        from transformers import masking_utils
    except ImportError:
        masking_utils = None
    name = "find_packed_sequence_indices"
    if not hasattr(masking_utils, name):
        yield
        return
    with mock.patch.object(masking_utils, name, return_value=None):
        yield


def corrected(name: str, args: Any, out: Any) -> Any:
    """The outputs of an operation on fakes: mkldnn's LSTM layer with the workspace that it keeps for its backward pass, of
    which the fake has no bytes."""
    if name != "mkldnn_rnn_layer" or not isinstance(args[0], FakeTensor) or not torch.is_grad_enabled():
        return out
    *results, workspace = out
    steps, rows, width = args[0].shape
    size = _workspace_bytes(steps, rows, width, tuple(args[1].shape), tuple(args[2].shape), args[0].dtype, args[8:])
    return (*results, workspace.new_empty(size))


def _workspace_bytes(
    steps: int, rows: int, width: int, inputs: tuple[int, ...], states: tuple[int, ...], dtype: torch.dtype, rest: Any
) -> int:
    """A bilinear function of steps and rows, up to rounding: measured at four small pairs of them."""
    (t0, t1), (b0, b1) = _PROBED, _PROBED
    rest = tuple(tuple(value) if isinstance(value, list) else value for value in rest)
    sizes = {(t, b): _measured(t, b, width, inputs, states, dtype, rest) for t in (t0, t1) for b in (b0, b1)}
    x, y = (steps - t0) / (t1 - t0), (rows - b0) / (b1 - b0)
    return round(
        sizes[t0, b0] * (1 - x) * (1 - y)
        + sizes[t1, b0] * x * (1 - y)
        + sizes[t0, b1] * (1 - x) * y
        + sizes[t1, b1] * x * y
    )


@cache
def _measured(
    steps: int, rows: int, width: int, inputs: tuple[int, ...], states: tuple[int, ...], dtype: torch.dtype, rest: Any
) -> int:
    with unset_fake_temporarily(), torch.enable_grad():  # without gradients it keeps nothing
        gates, size = states
        weights = [torch.zeros(inputs, dtype=dtype), torch.zeros(states, dtype=dtype)]
        biases = [torch.zeros(gates, dtype=dtype) for _ in range(2)]
        at_start = [torch.zeros(rows, size, dtype=dtype) for _ in range(2)]
        given = torch.zeros(steps, rows, width, dtype=dtype)
        options = [list(value) if isinstance(value, tuple) else value for value in rest]
        out: tuple[Tensor, ...] = torch.ops.aten.mkldnn_rnn_layer(given, *weights, *biases, *at_start, False, *options)
        return out[-1].numel()
