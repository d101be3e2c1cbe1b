"""Batches of the right shapes for a recipe's task; the longest that its data can give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lm_train.data import Batch
from lm_train.plan import DataFacts
from lm_train.recipe import ImageData, LabelledData, Recipe, Task


class UnknownBatch(ValueError):
    """Nothing but the user's own code can say what a batch is."""


def training_batch(recipe: Recipe, task: Task, facts: DataFacts, size: int) -> Batch:
    """A micro batch of `size` samples with undefined values.

    Texts of their own length have all of them the greatest one: block_size, or data.max_length.

    Raises:
        UnknownBatch: if the data are the user's own and do not say what they are.
    """
    data = recipe.data
    batch: Batch = {"total": float(size)}
    match task:
        case "causal_lm":
            length = recipe.model.block_size  # type: ignore[union-attr]
            return batch | {"tokens": _ids(size, length), "targets": _ids(size, length), "total": float(size * length)}
        case "masked_lm":
            length = recipe.model.block_size  # type: ignore[union-attr]
            share = getattr(data, "mask_fraction", None) or facts.guessed_fraction or 0.15
            hidden = min(length, max(1, round(share * length)))
            return batch | {
                "tokens": _ids(size, length),
                "positions": _ids(size, hidden),
                "targets": _ids(size, hidden),
                "total": float(size * hidden),
            }
        case "seq2seq":
            length = facts.max_length or recipe.model.block_size  # type: ignore[union-attr]
            return batch | {
                "tokens": _ids(size, length),
                "lengths": torch.full((size,), length),
                "target_tokens": _ids(size, length),
                "targets": _ids(size, length),
            }
        case "classification" | "regression":
            return batch | _inputs(facts, size) | _targets(recipe, task, facts, size)
    raise UnknownBatch("only its own loader says what a batch of data=custom is")


def evaluation_batch(recipe: Recipe, task: Task, facts: DataFacts, size: int) -> Batch:
    """As `training_batch`, of a validation."""
    batch = training_batch(recipe, task, facts, size)
    del batch["total"]
    if task == "classification":
        batch["labels"] = _ids(size)
        batch.pop("weights", None)
    if task == "masked_lm":
        batch["lengths"] = torch.full((size,), batch["tokens"].shape[1])
    if task == "seq2seq":
        batch |= {"samples": _ids(size), "decode_tokens": 0}
    return batch if task in ("causal_lm", "masked_lm") else batch | {"valid": torch.ones(size, dtype=torch.bool)}


def bytes_of(batch: Batch) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_of(batch))


def tensors_of(batch: Batch) -> list[Tensor]:
    return [value for value in batch.values() if isinstance(value, Tensor)]


def _inputs(facts: DataFacts, size: int) -> Batch:
    if facts.max_length is not None:
        return {"tokens": _ids(size, facts.max_length), "lengths": torch.full((size,), facts.max_length)}
    if facts.input_shape is None:
        raise UnknownBatch("the data do not say the shape of a sample (facts: input_shape, or max_length of texts)")
    return {"inputs": torch.empty(size, *facts.input_shape)}


def _targets(recipe: Recipe, task: Task, facts: DataFacts, size: int) -> Batch:
    if facts.n_outputs is None:
        raise UnknownBatch("the data do not say how many values a sample has to predict (facts: n_outputs)")
    data = recipe.data
    if task == "regression":
        return {"targets": torch.empty(size, facts.n_outputs)}
    mixed = isinstance(data, ImageData) and data.mixup
    targets: dict[str, Any] = {"labels": torch.empty(size, facts.n_outputs) if mixed else _ids(size)}
    if isinstance(data, LabelledData) and getattr(data, "class_weights", "none") != "none":
        targets["weights"] = torch.empty(size)
    return targets


def _ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)
