"""What the data say that the network must fit; some of it is known before the data are read."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_train.recipe import Recipe, further_ids, task_of
from lm_train.recipe.tokenizer_names import known_vocab_size


@dataclass(frozen=True)
class DataFacts:
    """None is what does not apply, or is not known yet."""

    vocab_size: int | None = None
    """Token ids of the tokenizer."""
    input_shape: tuple[int, ...] | None = None
    """Of one sample of numbers: (channels, height, width) of an image, (columns,) of a table's row."""
    n_outputs: int | None = None
    """Classes, or values to predict."""
    pad_id: int | None = None
    """Token id that fills short sequences up."""
    start_id: int | None = None
    """Token id that a decoder begins with."""
    end_id: int | None = None
    """Token id that ends a target."""
    max_length: int | None = None
    """Most tokens of one sample, where samples are texts of their own length."""
    tokens_per_sample: float | None = None
    """Mean length of the training texts, where each is a sample."""
    guessed_fraction: float | None = None
    """Share of a block's tokens that a masked language model guesses."""
    keeps_documents_apart: bool = False
    """Attention stays within documents: a mask of all pairs of a row's positions, instead of the causal kernels' own."""
    pair_lengths: tuple[float, float] | None = None
    """Mean lengths of the training pairs' sources and targets."""


HUB_IMAGES: dict[str, tuple[tuple[int, int, int], int]] = {
    "uoft-cs/cifar10": ((3, 32, 32), 10),
    "uoft-cs/cifar100": ((3, 32, 32), 100),
    "ylecun/mnist": ((1, 28, 28), 10),
    "zalando-datasets/fashion_mnist": ((1, 28, 28), 10),
}
"""Shape and classes of well-known data sets of the hub, by their cards."""
ASSUMED: dict[str, Any] = {"vocab_size": 256, "input_shape": (1, 28, 28), "n_outputs": 10}
"""Where only the data can tell: bytes, MNIST's images, ten classes."""


EMBEDDED_PAIR_LENGTHS = (14.1, 7.6)
"""Characters of the strings to copy and to reverse, as counted on Python 3.11's library; targets with their end."""


def with_assumptions(recipe: Recipe, facts: DataFacts) -> tuple[DataFacts, str]:
    """The facts with assumptions in place of what the network needs and is not known; and what was assumed, for a person."""
    task = task_of(recipe)
    if task in ("causal_lm", "masked_lm", "seq2seq"):
        wanted = ["vocab_size"]
    else:
        wanted = ["vocab_size" if facts.max_length is not None else "input_shape", "n_outputs"]
    missing = {name: ASSUMED[name] for name in wanted if getattr(facts, name) is None}
    said = ", ".join(f"{name}={value}" for name, value in missing.items())
    return dataclasses.replace(facts, **missing), said


def known_facts(recipe: Recipe) -> DataFacts:
    """What can be told without reading the data."""
    data = recipe.data
    asked: int | str = getattr(recipe.model, "vocab_size", "auto")
    tokenizer: str | None = getattr(data, "tokenizer", None)
    vocab_size = asked if isinstance(asked, int) else None if tokenizer is None else known_vocab_size(tokenizer)
    task = task_of(recipe)
    if data.kind == "shards" and vocab_size is None and task == "causal_lm":
        vocab_size = _prepared_vocab_size(data.wanted[0][0])
    if isinstance(asked, str) and vocab_size is not None and tokenizer is not None:
        vocab_size += further_ids(task, tokenizer)
    if task == "masked_lm":
        return DataFacts(vocab_size=vocab_size, guessed_fraction=getattr(data, "mask_fraction", None))
    if data.kind == "images" and data.path is None:
        return DataFacts(input_shape=(1, 8, 8), n_outputs=10)  # scikit-learn's digits
    if data.kind == "images" and data.path in HUB_IMAGES:
        shape, n_classes = HUB_IMAGES[data.path]
        return DataFacts(input_shape=shape, n_outputs=n_classes)
    if data.kind == "table" and data.path is None and not data.target and not data.drop_columns:
        # scikit-learn's breast cancer and diabetes sets
        classifies = data.task == "classification"
        return DataFacts(input_shape=(30,) if classifies else (10,), n_outputs=2 if classifies else 1)
    if data.kind == "pairs" and data.path is None and data.tokenizer == "chars":
        return DataFacts(vocab_size=vocab_size, pair_lengths=EMBEDDED_PAIR_LENGTHS)
    if data.kind == "text_classes":
        areas = 8 if data.path is None else None  # of the standard library
        return DataFacts(vocab_size=vocab_size, n_outputs=areas, max_length=data.max_length)
    apart = data.kind == "shards" and data.document_boundaries
    return DataFacts(vocab_size=vocab_size, keeps_documents_apart=apart)


def _prepared_vocab_size(folder: str) -> int | None:
    """Token ids that the manifest of prepared text names, where it lies on this machine."""
    try:
        found = json.loads((Path(folder).expanduser() / "manifest.json").read_text(encoding="utf-8"))
        size = found["tokenizer"]["vocab_size"]
    except (OSError, ValueError, RuntimeError, KeyError, TypeError):  # the ranks will say what is wrong with it
        return None
    return size if isinstance(size, int) and size > 0 else None
