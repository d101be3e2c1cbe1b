"""What an operation of torch's dispatcher costs: its kind, FLOPs, bytes and shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lm_train.plan.work import Kind, Number

aten: Any = torch.ops.aten
IGNORED_OPS = frozenset((torch.ops.prim.device.default, aten.detach.default, aten.sym_size.int))
"""Neither work nor memory."""
_NUMBERS: dict[torch.dtype, Number] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_KINDS: dict[Kind, tuple[str, ...]] = {
    "attention": ("_scaled_dot_product", "_flash_attention", "_efficient_attention"),
    "convolution": ("convolution", "mkldnn_convolution"),
    "recurrent": ("mkldnn_rnn", "_thnn_fused", "_cudnn_rnn", "lstm_mps"),
    "matmul": ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot", "matmul", "linear"),
    "normalisation": (
        "native_layer_norm", "native_batch_norm", "native_group_norm", "_fused_rms_norm", "_native_batch_norm", "batch_norm",
        "cudnn_batch_norm",
    ),
    "loss": ("_log_softmax", "nll_loss", "mse_loss", "binary_cross_entropy", "smooth_l1_loss", "huber_loss"),
    "activation": (
        "gelu", "relu", "silu", "tanh", "sigmoid", "threshold", "leaky_relu", "_softmax", "elu", "hardtanh", "softplus", "mish",
    ),
    "reduction": (
        "sum", "mean", "amax", "amin", "max", "min", "argmax", "norm", "linalg_vector_norm", "var", "std", "any", "all",
    ),
    "lookup": ("embedding", "gather", "scatter", "index", "_index", "max_pool2d", "avg_pool2d", "_unsafe_index"),
    "copy": (
        "copy", "_to_copy", "clone", "cat", "stack", "fill", "zero", "zeros", "ones", "empty", "new_", "full", "arange",
        "scalar_tensor", "slice_backward", "select_backward", "repeat", "constant_pad", "flip", "roll", "split", "lift",
    ),
}  # fmt: skip
_WHOLE_NAMES = frozenset(
    ("mm", "mv", "dot", "sum", "mean", "max", "min", "norm", "all", "any", "var", "std", "linear", "index")
)
"""Short names that begin others."""


def kind_of(name: str) -> Kind:
    """Of the operation `name` of aten, by how it begins."""
    plain = name.removesuffix("_")
    for kind, beginnings in _KINDS.items():
        for beginning in beginnings:
            if plain == beginning or (beginning not in _WHOLE_NAMES and plain.startswith(beginning)):
                return kind
    return "elementwise"


def describe(
    func: Any, args: Any, kwargs: Any, out: Any, outputs: Sequence[Tensor]
) -> tuple[Kind, float, float, tuple[int, ...], Number]:
    """Kind, FLOPs, bytes, shape and number of one operation; see `lm_train.plan.work.Op`.

    Args:
        func, args, kwargs, out: as the dispatcher has them.
        outputs: the tensors in `out`.
    """
    name = func.overloadpacket.__name__
    kind = kind_of(name)
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    flops = _flops(func, name, args, kwargs, out)
    moved = sum(map(_bytes, outputs))
    if name == "embedding":  # reads as many rows as it gives
        moved += moved + _bytes(args[1])
    else:
        moved += sum(map(_bytes, inputs))
    floats = [tensor for tensor in (*inputs, *outputs) if tensor.is_floating_point()]
    widest = max(floats, key=lambda tensor: tensor.numel(), default=None)
    number = "fp32" if widest is None else _NUMBERS.get(widest.dtype, "fp32")
    if kind in ("matmul", "attention", "convolution", "recurrent"):
        of_inputs = max((tensor for tensor in inputs if tensor.is_floating_point()), key=_precision, default=None)
        number = number if of_inputs is None else _NUMBERS.get(of_inputs.dtype, "fp32")
    return kind, flops, float(moved), _shape(kind, name, args, inputs, outputs), number


def _precision(tensor: Tensor) -> tuple[bool, int]:
    return tensor.dtype in _NUMBERS, tensor.numel()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _flops(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> float:
    """torch's own count, and by its formulas what it leaves out on a CPU: fused attention, whose backward pass computes the
    scores again, and mkldnn's LSTM."""
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return float(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return float(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    if name.startswith("mkldnn_rnn_layer"):
        steps, rows = args[0].shape[:2]
        forward = 2.0 * steps * rows * (args[1].numel() + args[2].numel())
        return 2 * forward if name.endswith("backward") else forward
    count = flop_registry.get(func.overloadpacket)
    if count is None:
        return 0.0
    return float(count(*args, **kwargs, out_val=out))


def _shape(kind: Kind, name: str, args: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[int, ...]:
    match kind:
        case "matmul" if len(inputs) >= 2:
            left, right = inputs[-2:]
            rows = math.prod(left.shape[:-1])
            return rows, right.shape[-1], left.shape[-1]
        case "attention":
            query, key = args[1:3] if name.endswith("backward") else args[:2]
            batch, heads, queries, head_size = query.shape
            return batch, heads, queries, key.shape[2], head_size
        case "convolution":
            out, weight = (args[0], args[2]) if name.endswith("backward") else (outputs[0], args[1])
            height, width = (*out.shape[2:], 1, 1)[:2]
            return out.shape[0], weight.shape[1], out.shape[1], height, width, weight.shape[-1]
        case "recurrent" if args[0].dim() == 3:
            steps, rows, width = args[0].shape
            return rows, steps, width, args[2].shape[-1]
    # never a maximum of weights and samples, which would not grow in proportion to the samples
    reads = kind in ("reduction", "loss") or name == "embedding_dense_backward"
    return (max((tensor.numel() for tensor in (inputs[:1] if reads else outputs)), default=0),)
