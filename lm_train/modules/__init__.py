"""LightningModules: what a step of each task computes. `build` makes the one of the plan's task."""

from __future__ import annotations

import lightning.pytorch as L
from torch import nn

from lm_train.data import DataModule, PairDataModule
from lm_train.modules.base import TrainingModule, parameter_table
from lm_train.modules.classification import Classification
from lm_train.modules.custom import CustomTraining
from lm_train.modules.language import CausalLanguageModel
from lm_train.modules.masked_language import MaskedLanguageModel
from lm_train.modules.regression import Regression
from lm_train.modules.seq2seq import SequenceToSequence
from lm_train.plan import Plan
from lm_train.recipe import Recipe


def build(net: nn.Module, recipe: Recipe, plan: Plan, data: DataModule) -> TrainingModule:
    """The module that teaches `net` the plan's task.

    Args:
        net: as `models.build` makes it.
        recipe: whose optimizer and seed are meant, and what its data section says about targets.
        plan: names the task.
        data: prepared.
    """
    if isinstance(net, L.LightningModule):
        return CustomTraining(net, recipe.optim, plan, recipe.seed)
    match plan.task:
        case "causal_lm":
            return CausalLanguageModel(net, recipe.optim, plan, recipe.seed)
        case "masked_lm":
            return MaskedLanguageModel(net, recipe.optim, plan, recipe.seed)
        case "seq2seq":
            assert isinstance(data, PairDataModule)
            return SequenceToSequence(net, recipe.optim, plan, recipe.seed, data.start_id, data.end_id)
        case "classification":
            smoothing = getattr(recipe.data, "label_smoothing", 0.0)
            return Classification(net, recipe.optim, plan, recipe.seed, data.class_names, smoothing)
        case "regression":
            return Regression(net, recipe.optim, plan, recipe.seed, data.target_scale)
    raise AssertionError(plan.task)


__all__ = [
    "CausalLanguageModel",
    "Classification",
    "CustomTraining",
    "MaskedLanguageModel",
    "Regression",
    "SequenceToSequence",
    "TrainingModule",
    "build",
    "parameter_table",
]
