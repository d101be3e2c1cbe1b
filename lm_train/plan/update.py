"""What an optimizer's update needs beside the state. Free of torch.

Read in torch 2.13 (torch/optim) and measured: a GPU gets the fused kernel, which needs nothing; under 16-mixed, and where torch
has none, the foreach form, which works on all parameters of a group at once; a CPU gets a loop over the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lm_train.plan.layout import Layout
from lm_train.plan.memory import StateBytes
from lm_train.plan.moments import UPDATE, Moment, NamedShapes, bucket_of_zero_3
from lm_train.recipe import AnyOptim


def update_moment(shapes: NamedShapes, layout: Layout, optim: AnyOptim, state: StateBytes, batches: int = 0) -> Moment:
    """The worst moment of an update; `batches`: bytes of the micro batches in memory.

    DeepSpeed updates the rank's part of all matrices as one flat fp32 parameter, whose gradient is a copy: the temporaries are
    as large as that, and the gradients that it was made of are still there.
    """
    zero = layout.strategy.startswith("zero")
    width = 4 if zero or layout.precision != "bf16-true" else 2
    gradients, buffers = state.gradients, 0
    groups = list(_groups(shapes, optim))
    match layout.strategy:
        case "single" | "ddp":
            sizes = [[math.prod(shape) for shape in group] for group in groups]
        case "fsdp":
            sizes = [
                [-(-(shape or (1,))[0] // layout.ranks) * math.prod(shape[1:]) for shape in group] for group in groups
            ]
        case _:
            sizes = [[-(-sum(map(math.prod, group)) // layout.ranks)] for group in groups]
            buffers = width * max(map(sum, sizes))
            if layout.strategy.startswith("zero3"):
                buffers += bucket_of_zero_3(shapes, layout)
            else:
                low = 4 if layout.precision == "32-true" else 2
                gradients = low * -(-sum(math.prod(shape) for _, shape in shapes) // layout.ranks)
    if layout.accelerator == "cpu":
        needed = width * max(_looped(optim, group) for group in sizes)
    else:
        fused = optim.kind in ("adam", "adamw", "muon") or (optim.kind == "sgd" and layout.strategy != "fsdp")
        at_once = 0 if fused and layout.precision != "16-mixed" else _foreach(optim)
        needed = width * at_once * max(sum(group) for group in sizes)
    if optim.kind == "muon":
        needed = max(needed, _newton_schulz(shapes, optim.nesterov))
    return Moment(UPDATE, gradients, batches, 0, buffers + needed)


def _groups(shapes: NamedShapes, optim: AnyOptim) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of each of the optimizer's groups, in order: matrices, vectors (`lm_train.optim.parameter_groups`)."""
    loose = [
        shape for name, shape in shapes if not (optim.kind == "muon" and name.startswith("blocks.") and len(shape) == 2)
    ]
    for group in ([s for s in loose if len(s) >= 2], [s for s in loose if len(s) < 2]):
        if group:
            yield group


def _looped(optim: AnyOptim, sizes: Sequence[int]) -> int:
    """Elements of temporaries at the worst parameter, with those that the one before has left in Python's names.

    adamw, muon    sqrt(v), its quotient by the bias correction; left: that quotient
    adam           the decayed gradient besides
    sgd            the decayed gradient, Nesterov's; left: the last of them
    adagrad        sqrt(sum), the decayed gradient; left: the former
    rmsprop        sqrt(v), the decayed gradient; left: the former
    """
    decays = int(optim.weight_decay > 0)
    match optim.kind:
        case "adamw" | "muon":
            own, left = 2, 1
        case "adam":
            own, left = 2 + decays, 1
        case "sgd":
            own, left = decays + int(optim.nesterov), 0
        case "adagrad" | "rmsprop":
            own, left = 1 + decays, 1
    return max(own * size + left * before for before, size in zip((0, *sizes), sizes, strict=False))


def _foreach(optim: AnyOptim) -> int:
    """Copies of a group that the foreach form makes."""
    decays = int(optim.weight_decay > 0)
    match optim.kind:
        case "adamw" | "muon":
            return 1
        case "adam":
            return 1 + decays
        case "sgd":
            return decays
        case "adagrad":
            return 2
        case "rmsprop":
            return 1 + decays


def _newton_schulz(shapes: NamedShapes, nesterov: bool) -> int:
    """Bytes for the largest a x b matrix of the blocks: Nesterov's update in fp32, the iterate before and after in bf16, and two
    Gram matrices of the smaller side."""
    matrices = [shape for name, shape in shapes if name.startswith("blocks.") and len(shape) == 2]
    first = 4 if nesterov else 0
    return max(((first + 2 + 2) * a * b + 2 * 2 * min(a, b) ** 2 for a, b in matrices), default=0)
