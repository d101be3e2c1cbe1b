"""What can be told of a model of transformers, or of the user's own, before anything of theirs is imported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm_train.recipe.hub_names import is_hub_name
from lm_train.recipe.model_sections import HuggingFace
from lm_train.recipe.sections import Recipe
from lm_train.recipe.strategies import Conflict
from lm_train.recipe.task import samples_are_sequences
from lm_train.recipe.tokenizer_names import exists, known_vocab_size

_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
"""What the configurations of transformers call the longest sequence."""
_POSITIONS_AFTER_PADDING = (
    "camembert",
    "data2vec-text",
    "esm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
)
"""Model types whose positions count from pad_token_id + 1 on."""
_RELATIVE_POSITIONS = ("t5", "mt5", "umt5", "longt5")
"""Model types that read texts of any length; some of their released configurations name an n_positions all the same."""


def foreign_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """What a model that is not ours cannot do: the keys concerned, and a sentence with a way out."""
    model, trainer = recipe.model, recipe.trainer
    if model.kind not in ("hf", "custom"):
        return
    if trainer.cross_entropy_chunks not in ("auto", 1):
        yield (
            [("trainer", "cross_entropy_chunks"), ("model", "kind")],
            f"model={model.kind} computes its logits in one piece; set trainer.cross_entropy_chunks=1",
        )
    if isinstance(trainer.activation_checkpointing, int) or (
        model.kind == "custom" and trainer.activation_checkpointing == "full"
    ):
        can = "all of its blocks or none" if model.kind == "hf" else "what it recomputes by itself"
        way_out = "full or none" if model.kind == "hf" else "none"
        yield (
            [("trainer", "activation_checkpointing"), ("model", "kind")],
            f"model={model.kind} recomputes {can}; set trainer.activation_checkpointing={way_out}",
        )
    if recipe.optim.kind == "muon":
        yield (
            [("optim", "kind"), ("model", "kind")],
            f"optim.kind=muon knows the matrices of lm_train's own blocks only, not those of model={model.kind}; try "
            "optim.kind=adamw",
        )
    if model.kind == "hf":
        yield from _folder_conflicts(model)
        yield from _size_conflicts(recipe, model)


def _folder_conflicts(model: HuggingFace) -> Iterator[Conflict]:
    if model.path is None or is_hub_name(model.path):
        return
    key: list[tuple[str, ...]] = [("model", "path")]
    folder = Path(model.path).expanduser()
    if not exists(model.path):
        yield key, f"no such file or folder: {model.path!r}; a hub name looks like owner/name"
    elif not (folder / "config.json").is_file():
        yield (
            key,
            f"{model.path}: holds no config.json; expected a folder that transformers' save_pretrained has written",
        )
    elif not model.from_scratch and not any(folder.glob("*.safetensors")):
        yield (
            key,
            f"{model.path}: holds no *.safetensors; other formats of weights are not read (pickle runs code): save them anew "
            "with safetensors, or set model.from_scratch=true",
        )


def _size_conflicts(recipe: Recipe, model: HuggingFace) -> Iterator[Conflict]:
    config = {**_config_of(model), **model.config}
    where = "model.config" if model.path is None else model.path
    tokenizer: str | None = getattr(recipe.data, "tokenizer", None)
    ids, size = known_vocab_size(tokenizer) if tokenizer is not None else None, config.get("vocab_size")
    if ids is not None and isinstance(size, int) and ids > size:
        way_out = "leave vocab_size out" if model.path is None else "give the tokenizer that belongs to the weights"
        yield (
            [("model", "config"), ("data", "tokenizer")],
            f"data.tokenizer={tokenizer} has {ids} ids, vocab_size={size} of {where} is smaller; {way_out}",
        )
    limit = next((config[key] for key in _POSITIONS if isinstance(config.get(key), int)), None)
    section, key, longest = _longest_sample(recipe, model)
    if limit is None or longest is None or config.get("model_type") in _RELATIVE_POSITIONS:
        return
    limit -= unused_positions(str(config.get("model_type")), config.get("pad_token_id"))
    if longest > limit > 0:
        yield (
            [(section, key), ("model", "config")],
            f"{section}.{key}={longest} is more than the {limit} positions of {where}; try {section}.{key}={limit}",
        )


def _longest_sample(recipe: Recipe, model: HuggingFace) -> tuple[str, str, int | None]:
    """The key that limits the tokens of a sample, and its value; None where samples are no tokens."""
    if samples_are_sequences(recipe) or recipe.data.kind == "pairs":
        return "model", "block_size", model.block_size
    return "data", "max_length", getattr(recipe.data, "max_length", None)


def unused_positions(model_type: str, pad_id: Any) -> int:
    """How many of its positions a model of transformers leaves unused; at least so many where the padding is not known."""
    return (pad_id if isinstance(pad_id, int) else 0) + 1 if model_type in _POSITIONS_AFTER_PADDING else 0


def _config_of(model: HuggingFace) -> dict[str, Any]:
    """The folder's config.json, if it can be read here."""
    try:
        content = json.loads((Path(str(model.path)).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    return content if isinstance(content, dict) else {}
