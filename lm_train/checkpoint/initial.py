"""The initial weights under a strategy that has cast or cut them: the fp32 values of an unsharded build."""

from __future__ import annotations

import torch

from lm_train.checkpoint.views import PARAM, View, Views
from lm_train.strategy.weights import Weights


def set_initial_weights(views: Views, weights: Weights) -> None:
    """Gives every parameter the value that `weights` has for it, one at a time, and keeps this rank's ranges.

    DeepSpeed makes its fp32 master weights from parameters that were cast to 16 bits before: another model than the one
    that the other strategies start from.
    """
    own: dict[str, list[View]] = {}
    for view in views.to_load():
        if view.key == PARAM:
            own.setdefault(view.name, []).append(view)
    shapes = views.shapes()
    with weights(views.net) as fill:
        for name, shape in shapes.items():
            full = torch.empty(shape, dtype=torch.float32)
            fill(name, full)
            for view in own.get(name, []):
                view.flat.copy_(full.flatten()[view.start : view.start + view.flat.numel()])
        views.loaded()
