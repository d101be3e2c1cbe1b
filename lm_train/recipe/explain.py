"""Turns what pydantic says into one line a person can act on: key, what was expected, what came, the nearest name."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lm_train.recipe.sections import SECTIONS, Recipe

SYNONYMS = {
    "lr": "optim.learning_rate",
    "max_lr": "optim.learning_rate",
    "min_lr": "optim.min_learning_rate_ratio",
    "wd": "optim.weight_decay",
    "scheduler": "optim.schedule",
    "lr_schedule": "optim.schedule",
    "optimizer": "optim.kind",
    "warmup": "optim.warmup_steps",
    "batch_size": "data.global_batch_size",
    "train_batch_size": "data.global_batch_size",
    "dataset": "data.path",
    "workers": "data.num_workers",
    "steps": "trainer.max_steps",
    "max_iters": "trainer.max_steps",
    "gpus": "trainer.devices",
    "num_gpus": "trainer.devices",
    "world_size": "trainer.devices",
    "grad_accum": "trainer.accumulate_grad_batches",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "grad_clip": "trainer.gradient_clip_val",
    "max_grad_norm": "trainer.gradient_clip_val",
    "eval_interval": "trainer.val_check_interval",
    "log_interval": "trainer.log_every_n_steps",
    "gradient_checkpointing": "trainer.activation_checkpointing",
    "layers": "model.n_layer",
    "num_layers": "model.n_layer",
    "depth": "model.n_layer",
    "heads": "model.n_head",
    "num_heads": "model.n_head",
    "hidden_size": "model.n_embd",
    "d_model": "model.n_embd",
    "dim": "model.n_embd",
    "width": "model.n_embd",
    "seq_len": "model.block_size",
    "sequence_length": "model.block_size",
    "context_length": "model.block_size",
    "max_seq_len": "model.block_size",
    "vocab": "model.vocab_size",
    "save_every": "checkpoint.every_n_steps",
    "wandb": "tracking.wandb",
    "run_name": "name",
    "output_dir": "runs_dir",
}
"""What other frameworks call our keys."""


def nearest(word: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The most similar of `names`, letter case and the difference of - and _ ignored; None if nothing is close."""
    plain = {name.lower().replace("-", "_"): name for name in names}
    match = difflib.get_close_matches(word.lower().replace("-", "_"), plain, n=1, cutoff=cutoff)
    return plain[match[0]] if match else None


def kinds_of(section: str) -> dict[str, type[BaseModel]]:
    """The kinds a section may take (`data`: embedded, text); empty for a section without kinds."""
    annotation = Recipe.model_fields[section].annotation
    members = get_args(annotation) if _is_union(annotation) else (annotation,)
    return {m.model_fields["kind"].default: m for m in members if "kind" in getattr(m, "model_fields", {})}


def section_class(section: str, values: Mapping[str, Any]) -> type[BaseModel]:
    """The class that checks `values`: the one of their kind, else of the section's default kind."""
    field = Recipe.model_fields[section]
    return kinds_of(section).get(values.get("kind", ""), type(field.default))


def unknown_key(path: tuple[str, ...], raw: Mapping[str, Any]) -> str:
    """`model.n_layers: no such key; did you mean model.n_layer?`"""
    key = ".".join(path)
    section = path[0] if len(path) > 1 else None
    if section is not None and section not in SECTIONS:
        suggestion = nearest(section, SECTIONS)
        if suggestion and len(path) == 2:
            names = _keys(suggestion, raw)
            leaf = path[1] if path[1] in names else nearest(path[1], names) or path[1]
            suggestion = f"{suggestion}.{leaf}"
    else:
        suggestion = _suggest(path[-1], section, raw)
    if suggestion:
        return f"{key}: no such key; did you mean {suggestion}?"
    names = _keys(section, raw) if section in SECTIONS else [*SECTIONS, *(n for n in _top_level() if n != "recipe")]
    return f"{key}: no such key; {section or 'a recipe'} has {', '.join(names)}"


def _suggest(leaf: str, section: str | None, raw: Mapping[str, Any]) -> str | None:
    prefix = f"{section}." if section else ""
    own = _keys(section, raw) if section else [*_top_level(), *SECTIONS]
    near = nearest(leaf, own, cutoff=0.75)
    if near:
        return prefix + near
    if leaf.lower() in SYNONYMS:
        return SYNONYMS[leaf.lower()]
    elsewhere = {name: f"{s}.{name}" for s in SECTIONS for name in _keys(s, raw)} | {n: n for n in _top_level()}
    if leaf in elsewhere:
        return elsewhere[leaf]
    kinds = reversed(kinds_of(section).items()) if section else ()
    others = {name: kind for kind, cls in kinds for name in cls.model_fields}
    if leaf in others:
        return f"{section}={others[leaf]}, which has {leaf}"
    near = nearest(leaf, own) or nearest(leaf, SYNONYMS, cutoff=0.8)
    if near:
        return SYNONYMS.get(near, prefix + near)
    far = nearest(leaf, elsewhere, cutoff=0.7)
    return elsewhere[far] if far else None


def _keys(section: str, raw: Mapping[str, Any]) -> list[str]:
    values = raw.get(section)
    return list(section_class(section, values if isinstance(values, Mapping) else {}).model_fields)


def _top_level() -> list[str]:
    return [name for name in Recipe.model_fields if name not in SECTIONS]


def wrong_value(key: str, cls: type[BaseModel], leaf: str, value: Any, message: str) -> str:
    """`trainer.max_steps: expected an integer of at least 1; got 'many'`, with the nearest allowed word if one is near."""
    if message.startswith("Value error, "):
        return f"{key}: {message.removeprefix('Value error, ')}"
    expected, words = _describe(cls.model_fields[leaf])
    near = nearest(value, words) if isinstance(value, str) else None
    return f"{key}: expected {expected}; got {value!r}" + (f"; did you mean {near}?" if near else "")


def _describe(field: FieldInfo) -> tuple[str, list[str]]:
    parts, words = _parts(field.annotation, field.metadata)
    return " or ".join(parts), words


def _parts(annotation: Any, metadata: Iterable[Any]) -> tuple[list[str], list[str]]:
    origin = get_origin(annotation)
    if hasattr(annotation, "__metadata__"):
        return _parts(get_args(annotation)[0], [*metadata, *_constraints(annotation.__metadata__)])
    if _is_union(annotation):
        both = [_parts(member, metadata) for member in get_args(annotation)]
        return [p for parts, _ in both for p in parts], [w for _, words in both for w in words]
    if origin is Literal:
        words = list(get_args(annotation))
        return [", ".join(map(str, words))], [w for w in words if isinstance(w, str)]
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if origin is tuple:
        return ["a list such as [a, b]"], []
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return ["keys and values such as {key: value}"], []
    bounds = "".join(_bound(m) for m in metadata) if annotation in (int, float, str) else ""
    return [names.get(annotation, str(annotation)) + bounds], []


def _constraints(metadata: Iterable[Any]) -> list[Any]:
    return [c for m in metadata for c in (m.metadata if isinstance(m, FieldInfo) else [m])]


def _bound(constraint: Any) -> str:
    for name, words in (("ge", "of at least"), ("gt", "above"), ("le", "of at most"), ("lt", "below")):
        if getattr(constraint, name, None) is not None:
            return f" {words} {getattr(constraint, name)}"
    if getattr(constraint, "pattern", None):
        return " of letters, digits, dot, dash and underscore (100 at most)"
    return ""


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)
