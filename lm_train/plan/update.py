"""What an optimizer's update needs beside the state. Free of torch.

Read in torch 2.13 (torch/optim): a GPU gets the fused kernel, which needs nothing, or under 16-mixed, and where torch has no
fused kernel, the foreach form, which works on all parameters at once; a CPU gets a loop over the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lm_train.plan.layout import Layout
from lm_train.plan.memory import StateBytes
from lm_train.recipe import AnyOptim

NamedShapes = Sequence[tuple[str, tuple[int, ...]]]


def temporaries(optim: AnyOptim, decays: bool) -> int:
    """Tensors as large as a parameter that the update of one holds at its worst moment, besides the state.

    adam, adamw    sqrt(v), and its quotient by the bias correction; adam's decay besides makes a new gradient
    sgd            the decayed gradient; Nesterov's
    adagrad        sqrt(sum) + eps; the decayed gradient
    rmsprop        sqrt(v) + eps; the decayed gradient
    muon           as adamw for its part
    """
    match optim.kind:
        case "adamw" | "muon":
            return 2
        case "adam":
            return 2 + decays
        case "sgd":
            return int(decays) + int(optim.nesterov)
        case "adagrad":
            return 1 + decays
        case "rmsprop":
            return 1 + decays


def update_bytes(shapes: NamedShapes, layout: Layout, optim: AnyOptim, state: StateBytes) -> tuple[int, int]:
    """Gradients and temporaries, in bytes, at the worst moment of the update.

    DeepSpeed updates the rank's part of all matrices as one flat fp32 parameter, so that the temporaries are as large as
    that; the others update one parameter after the other.
    """
    count = temporaries(optim, optim.weight_decay > 0)
    ranks, sizes = layout.ranks, [math.prod(shape) for _, shape in shapes]
    zero = layout.strategy.startswith("zero")
    width = 4 if zero or layout.precision != "bf16-true" else 2
    if zero:
        part = 4 * -(-sum(n for n, (_, shape) in zip(sizes, shapes, strict=True) if len(shape) >= 2) // ranks)
        whole = 4 * -(-sum(sizes) // ranks)
        gradients = state.gradients + part if layout.strategy.startswith("zero3") else part
    else:
        part = width * -(-max(sizes) // (ranks if layout.strategy == "fsdp" else 1))
        whole = state.parameters
        gradients = state.gradients
    if layout.accelerator == "cpu":
        needed = count * part
    elif optim.kind in ("adam", "adamw", "muon") or (optim.kind == "sgd" and layout.strategy != "fsdp"):
        fused = layout.precision != "16-mixed"
        needed = 0 if fused else max(1, count - 1) * whole
    else:
        needed = max(1, count) * whole
    if optim.kind == "muon":
        needed = max(needed, _newton_schulz(shapes))
    return gradients, needed


def _newton_schulz(shapes: NamedShapes) -> int:
    """Of the largest matrix of the blocks: the fp32 update and its bf16 copies (the iterate, its product, two Gram matrices)."""
    matrices = [shape for name, shape in shapes if name.startswith("blocks.") and len(shape) == 2]
    return max((4 * a * b + 2 * 3 * a * b + 2 * 3 * min(a, b) ** 2 for a, b in matrices), default=0)
