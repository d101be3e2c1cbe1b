"""Parameter groups, optimizers, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lm_train.models.transformer import Block
from lm_train.recipe import AnyOptim
from lm_train.recipe.sections import Muon as MuonSection


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices with `weight_decay`, vectors (biases, norms) without.

    Radford et al. 2018 (GPT), section 4.1: decay "on all non bias or gain weights".
    """
    trained = [p for _, p in named if p.requires_grad]
    groups = [
        {"params": [p for p in trained if _dimensions(p) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if _dimensions(p) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _dimensions(parameter: nn.Parameter) -> int:
    """Of the full parameter, also where ZeRO 3 has cut it up and left a flat rest in its place."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def build_optimizer(section: AnyOptim, module: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """The section's optimizer over `module`'s trained parameters.

    Args:
        section: the recipe's optim section.
        module: what is trained.
        fused: one kernel for the whole update, where torch has it (Adam, AdamW, SGD, Adagrad on its own terms).
    """
    groups = parameter_groups(module.named_parameters(), section.weight_decay)
    rate = section.learning_rate
    match section.kind:
        case "adamw":
            return torch.optim.AdamW(groups, rate, (section.beta1, section.beta2), section.eps, fused=fused)
        case "adam":
            return torch.optim.Adam(groups, rate, (section.beta1, section.beta2), section.eps, fused=fused)
        case "sgd":
            fused &= not any(isinstance(p, DTensor) for p in module.parameters())  # torch 2.13 cannot shard that kernel
            return torch.optim.SGD(groups, rate, section.momentum, nesterov=section.nesterov, fused=fused)
        case "adagrad":
            return torch.optim.Adagrad(groups, rate, eps=section.eps)
        case "rmsprop":
            return torch.optim.RMSprop(groups, rate, section.alpha, section.eps, momentum=section.momentum)
        case "muon":
            return Muon(section, module, fused)


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The trained matrices inside transformer blocks: what Muon is made for."""
    blocks = (m for m in module.modules() if isinstance(m, Block))
    return [p for block in blocks for p in block.parameters() if p.dim() == 2 and p.requires_grad]


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of the blocks, AdamW for embeddings, head, norms and biases, as one optimizer.

    Jordan et al. 2024 (kellerjordan.github.io/posts/muon): the momentum's singular values are all brought to about 1 by
    Newton-Schulz steps. Updates have 0.2 sqrt(larger side) times that size, the root mean square of AdamW's, so that one
    learning rate and one weight decay serve both parts (Liu et al. 2025, arXiv:2502.16982, section 2.2). Queries,
    keys and values of an attention are one matrix here; the post treats them apart.

    Args:
        section: the recipe's optim section.
        module: what is trained; each matrix is needed whole, so parameters must not be sharded.
        fused: one kernel for AdamW's update.
    """

    def __init__(self, section: MuonSection, module: nn.Module, fused: bool) -> None:
        hidden = hidden_matrices(module)
        own = set(map(id, hidden))
        others = ((name, p) for name, p in module.named_parameters() if id(p) not in own)
        rate = section.learning_rate
        groups = parameter_groups(others, section.weight_decay)
        self._parts: list[torch.optim.Optimizer] = []
        if groups:
            self._parts.append(
                torch.optim.AdamW(groups, rate, (section.beta1, section.beta2), section.eps, fused=fused)
            )
        if hidden:
            self._parts.append(
                torch.optim.Muon(
                    hidden,
                    rate,
                    section.weight_decay,
                    section.momentum,
                    section.nesterov,
                    ns_steps=section.ns_steps,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = 0
        for part in self._parts:  # both work on this optimizer's own groups and state, wherever these came from
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            part.step()
            first = last
        return loss


def learning_rate(section: AnyOptim, step: int, max_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 1) of `max_steps`.

    Warm-up is linear and reaches the peak at step `warmup_steps`. Then, with p from 0 (end of warm-up) to 1 (last step)
    and m the ratio of minimum to peak:
        constant             1
        linear               1 - (1 - m) p
        cosine               m + (1 - m) (1 + cos(pi p)) / 2         (Loshchilov & Hutter 2017, arXiv:1608.03983)
        warmup_stable_decay  1, then linear to m over the last `decay_fraction` of all steps, at most those after the
                             warm-up (Hu et al. 2024, arXiv:2404.06395; linear decay after Haegele et al. 2024,
                             arXiv:2405.18392)
    Steps beyond `max_steps` stay where the schedule ends.
    """
    if step <= section.warmup_steps:
        return section.learning_rate * step / section.warmup_steps
    minimum = section.min_learning_rate_ratio
    after_warmup = max(1, max_steps - section.warmup_steps)
    progress = min(1.0, (step - section.warmup_steps) / after_warmup)
    match section.schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1 - (1 - minimum) * progress
        case "cosine":
            factor = minimum + (1 - minimum) * (1 + math.cos(math.pi * progress)) / 2
        case "warmup_stable_decay":
            decay_steps = min(max(1.0, section.decay_fraction * max_steps), after_warmup)
            left = max(0, max_steps - step) / decay_steps
            factor = minimum + (1 - minimum) * min(1.0, left)
    return section.learning_rate * factor
