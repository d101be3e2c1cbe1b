"""Parameter groups, optimizers, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lm_train.recipe import AnyOptim


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices with `weight_decay`, vectors (biases, norms) without.

    Radford et al. 2018 (GPT), section 4.1: decay "on all non bias or gain weights".
    """
    trained = [p for _, p in named if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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
            return torch.optim.SGD(groups, rate, section.momentum, nesterov=section.nesterov, fused=fused)
        case "adagrad":
            return torch.optim.Adagrad(groups, rate, eps=section.eps)
        case "rmsprop":
            return torch.optim.RMSprop(groups, rate, section.alpha, section.eps, momentum=section.momentum)


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
