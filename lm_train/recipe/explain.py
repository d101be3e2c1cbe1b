"""Turns what pydantic says into one line a person can act on: key, what was expected, what came, the nearest name."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lm_train.recipe.sections import SECTIONS, Recipe
from lm_train.recipe.text import WrittenFloat, WrittenInt, parse_scalar
from lm_train.recipe.tokenizer_names import TOKENIZER_NAMES

SYNONYMS = {
    "lr": "optim.learning_rate",
    "max_lr": "optim.learning_rate",
    "min_lr": "optim.min_learning_rate_ratio",
    "wd": "optim.weight_decay",
    "scheduler": "optim.schedule",
    "lr_schedule": "optim.schedule",
    "optimizer": "optim.kind",
    "warmup": "optim.warmup_steps",
    "lr_warmup_steps": "optim.warmup_steps",
    "epsilon": "optim.eps",
    "betas": "optim.beta1",
    "batch_size": "data.global_batch_size",
    "train_batch_size": "data.global_batch_size",
    "dataset": "data.path",
    "workers": "data.num_workers",
    "num_workers_per_gpu": "data.num_workers",
    "file": "data.path",
    "corpus": "data.path",
    "vocab_file": "data.tokenizer",
    "micro_bs": "data.micro_batch_size",
    "per_device_train_batch_size": "data.micro_batch_size",
    "device_batch_size": "data.micro_batch_size",
    "steps": "trainer.max_steps",
    "num_steps": "trainer.max_steps",
    "iterations": "trainer.max_steps",
    "iters": "trainer.max_steps",
    "epochs": "trainer.max_epochs",
    "num_epochs": "trainer.max_epochs",
    "max_iters": "trainer.max_steps",
    "gpus": "trainer.devices",
    "num_gpus": "trainer.devices",
    "world_size": "trainer.devices",
    "n_gpus": "trainer.devices",
    "nproc_per_node": "trainer.devices",
    "dtype": "trainer.precision",
    "amp": "trainer.precision",
    "backend": "trainer.strategy",
    "torch_compile": "trainer.compile",
    "patience": "trainer.early_stopping_patience",
    "grad_accum": "trainer.accumulate_grad_batches",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "grad_clip": "trainer.gradient_clip_val",
    "max_grad_norm": "trainer.gradient_clip_val",
    "clip_grad_norm": "trainer.gradient_clip_val",
    "clip": "trainer.gradient_clip_val",
    "eval_every": "trainer.val_check_interval",
    "val_every": "trainer.val_check_interval",
    "eval_interval": "trainer.val_check_interval",
    "log_interval": "trainer.log_every_n_steps",
    "logging_steps": "trainer.log_every_n_steps",
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
    "embedding_size": "model.n_embd",
    "emb_dim": "model.n_embd",
    "context": "model.block_size",
    "context_size": "model.block_size",
    "seq_len": "model.block_size",
    "sequence_length": "model.block_size",
    "context_length": "model.block_size",
    "max_seq_len": "model.block_size",
    "vocab": "model.vocab_size",
    "num_hidden_layers": "model.n_layer",
    "num_attention_heads": "model.n_head",
    "max_position_embeddings": "model.block_size",
    "kv_heads": "model.n_kv_head",
    "n_kv_heads": "model.n_kv_head",
    "num_kv_heads": "model.n_kv_head",
    "num_key_value_heads": "model.n_kv_head",
    "ffn_dim": "model.intermediate_size",
    "hidden_dim": "model.intermediate_size",
    "mlp_width": "model.intermediate_size",
    "theta": "model.rope_theta",
    "rope_base": "model.rope_theta",
    "rms_norm_eps": "model.norm_eps",
    "tied": "model.tie_embeddings",
    "tie_word_embeddings": "model.tie_embeddings",
    "hidden_sizes": "model.widths",
    "hidden_layers": "model.widths",
    "filters": "model.channels",
    "k_folds": "data.folds",
    "n_splits": "data.folds",
    "max_len": "data.max_length",
    "tokens": "trainer.max_tokens",
    "num_tokens": "trainer.max_tokens",
    "train_tokens": "trainer.max_tokens",
    "dollars": "budget.money",
    "usd": "budget.money",
    "cost": "budget.money",
    "max_cost": "budget.money",
    "max_time": "budget.hours",
    "deadline": "budget.hours",
    "time_limit": "budget.hours",
    "gpu_hour": "budget.gpu_hours",
    "energy": "budget.kwh",
    "price": "cluster.price_per_gpu_hour",
    "gpus_per_node": "cluster.devices_per_node",
    "save_interval": "checkpoint.every_n_steps",
    "save_steps": "checkpoint.every_n_steps",
    "every": "checkpoint.every_n_steps",
    "save_total_limit": "checkpoint.keep_last",
    "save_every": "checkpoint.every_n_steps",
    "wandb": "tracking.wandb",
    "team": "tracking.entity",
    "run_name": "name",
    "run": "name",
    "random_seed": "seed",
    "config": "recipe",
    "output_dir": "runs_dir",
    "out_dir": "runs_dir",
    "resume_from": "resume",
    "resume_from_checkpoint": "resume",
}
"""What other frameworks call our keys."""

SECTION_SYNONYMS = {
    "optimizer": "optim",
    "optimiser": "optim",
    "train": "trainer",
    "training": "trainer",
    "dataset": "data",
    "network": "model",
    "checkpointing": "checkpoint",
    "logging": "tracking",
    "logger": "tracking",
    "wandb": "tracking",
}
VALUE_SYNONYMS = {
    "true": ("true", "yes", "on", "y", "1"),
    "false": ("false", "no", "off", "n", "0"),
    "null": ("none", "nil", "never", "no", "off", "false", "0"),
    "bf16-mixed": ("bf16", "bfloat16", "amp", "mixed"),
    "16-mixed": ("16", "fp16", "float16", "half"),
    "32-true": ("32", "fp32", "float32", "float", "full"),
    "ddp": ("distributed", "data_parallel", "dp", "multi"),
    "single": ("none", "one", "1"),
    "fsdp": ("fsdp2", "fully_sharded", "fully_sharded_data_parallel", "model_parallel"),
    "zero1": ("deepspeed_stage_1", "stage1", "zero_1"),
    "zero2": ("deepspeed", "deepspeed_stage_2", "stage2", "zero", "zero_2"),
    "zero3": ("deepspeed_stage_3", "stage3", "zero_3"),
    "zero3_offload": ("deepspeed_stage_3_offload", "offload", "cpu_offload"),
    "disabled": ("off", "false", "no", "none"),
    "online": ("on", "true", "yes"),
    "auto": ("all", "-1", "default", "automatic", "true", "yes", "latest", "last"),
    "never": ("false", "no", "off", "none"),
    "warmup_stable_decay": ("wsd", "trapezoidal"),
    "cosine": ("cos", "cosine_annealing", "cosineannealing"),
    "full": ("all", "true", "on", "yes"),
    "none": ("false", "off", "no"),
}
"""What people write where a recipe says the key of this map; it counts only where that key is allowed."""
RESUME = ("auto", "never")
_SHOWN_CHARACTERS = 80


def shown(value: Any) -> str:
    """A value as it was written, or as YAML writes it; long ones cut short."""
    if isinstance(value, WrittenInt | WrittenFloat):
        text = value.text
    elif value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    else:
        text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def name_of(path: tuple[str, ...]) -> str:
    """A key for a message; in quotes if it is not plainly readable."""
    key = ".".join(path)
    plain = key.isprintable() and key.strip() == key and key
    return key if plain and len(key) <= _SHOWN_CHARACTERS else shown(key)


def nearest(word: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The most similar of `names`, letter case and the difference of - and _ ignored; None if nothing is close."""
    if len(word) > _SHOWN_CHARACTERS:
        return None
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
    kind = values.get("kind")
    kinds = kinds_of(section) if isinstance(kind, str) else {}
    return kinds.get(str(kind), type(Recipe.model_fields[section].default))


def in_another_kind(path: tuple[str, ...], raw: Mapping[str, Any]) -> str | None:
    """The kind that has this key where the section's present kind has not; the first one in the order of the kinds."""
    if len(path) != 2 or path[0] not in SECTIONS or path[1] in _keys(path[0], raw):
        return None
    return next((kind for kind, cls in kinds_of(path[0]).items() if path[1] in cls.model_fields), None)


def unknown_key(path: tuple[str, ...], raw: Mapping[str, Any]) -> str:
    """`model.n_layers: no such key; did you mean model.n_layer?`"""
    key = name_of(path)
    if path == ("base",):
        return "base: it belongs into a file; on the command line give recipe=NAME and the keys to change"
    if path[-1] != ".".join(path) or "." not in path[-1]:
        suggestion = suggest(path, raw)
    else:  # a key of a YAML file with a dot in it
        section, _, leaf = path[-1].partition(".")
        if section in SECTIONS and leaf in _keys(section, raw):
            return f"{key}: a file nests its keys; write {section}: {{{leaf}: VALUE}}"
        suggestion = suggest((section, leaf), raw)
    secret = re.search("api_?key|secret|passw|(hf|wandb|auth|access|bearer)_?token$", path[-1].lower())
    if suggestion and not secret:
        return f"{key}: no such key; did you mean {suggestion}?"
    if secret or path[-1].lower().endswith("token"):
        return f"{key}: no such key; secrets come from the environment (WANDB_API_KEY, HF_TOKEN) and reach no recipe"
    if path[0] in SECTIONS:
        return f"{key}: no such key; {path[0]} has {', '.join(_keys(path[0], raw))}"
    top = [*(name for name in _top_level() if name != "recipe"), *(f"{name}.KEY" for name in SECTIONS)]
    return f"{key}: no such key; a recipe has {', '.join(top)}"


def suggest(path: tuple[str, ...], raw: Mapping[str, Any]) -> str | None:
    """The key that `path` most likely means, if any is likely."""
    parts = [part for part in re.split(r"[\s./:+~]+", ".".join(path)) if part]
    if not parts or len(parts) > 3:
        return None
    known = {f"{section}.{leaf}" for section in SECTIONS for leaf in _keys(section, raw)} | {*_top_level()}
    if ".".join(parts) in known:
        return ".".join(parts)
    if ".".join(parts[:-1]) in known:  # model.n_layer.x
        return ".".join(parts[:-1])
    if len(parts) == 1:
        return _suggest_leaf(parts[0], None, raw)
    word = parts[-2].lower()
    section = word if word in SECTIONS else SECTION_SYNONYMS.get(word) or nearest(word, SECTIONS)
    return _suggest_leaf(parts[-1], section, raw)


def _suggest_leaf(leaf: str, section: str | None, raw: Mapping[str, Any]) -> str | None:
    prefix, plain = f"{section}." if section else "", leaf.lower().replace("-", "_")
    own = _keys(section, raw) if section else [*_top_level(), *SECTIONS]
    if plain in own:
        return prefix + plain
    if section and in_another_kind((section, plain), raw):
        return _with_its_kind(f"{section}.{plain}", raw)
    near = nearest(leaf, own, cutoff=0.75)
    if plain in SYNONYMS and not (near and in_another_kind((*SYNONYMS[plain].split("."),), raw)):
        return _with_its_kind(SYNONYMS[plain], raw)
    if near:
        return prefix + near
    if section is None and plain in SECTION_SYNONYMS:
        return SECTION_SYNONYMS[plain]
    elsewhere = {name: name for name in _top_level()}
    for other in reversed(SECTIONS):
        elsewhere |= {name: f"{other}.{name}" for cls in kinds_of(other).values() for name in cls.model_fields}
        elsewhere |= {name: f"{other}.{name}" for name in _keys(other, raw)}
    if plain in elsewhere and plain != "kind":
        return elsewhere[plain]
    near = nearest(leaf, own) or nearest(leaf, SYNONYMS, cutoff=0.8)
    if near:
        return SYNONYMS.get(near, prefix + near)
    far = nearest(leaf, elsewhere, cutoff=0.7)
    return elsewhere[far] if far else None


def _with_its_kind(key: str, raw: Mapping[str, Any]) -> str:
    """The key, or where only another kind of the section has it: `model=llama, which has n_kv_head`."""
    section, _, leaf = key.partition(".")
    kind = in_another_kind((section, leaf), raw)
    return f"{section}={kind}, which has {leaf}" if kind else key


def _keys(section: str, raw: Mapping[str, Any]) -> list[str]:
    values = raw.get(section)
    return list(section_class(section, values if isinstance(values, Mapping) else {}).model_fields)


def _top_level() -> list[str]:
    return [name for name in Recipe.model_fields if name not in SECTIONS]


def wrong_value(key: str, cls: type[BaseModel], leaf: str, value: Any, message: str) -> str:
    """`trainer.max_steps: expected an integer of at least 1; got 'many'`, with the value that was probably meant."""
    if message.startswith("Value error, "):
        near = nearest_value(value, TOKENIZER_NAMES, []) if leaf == "tokenizer" else None
        return f"{key}: {message.removeprefix('Value error, ')}" + (f"; did you mean {near}?" if near else "")
    parts, words = _parts(cls.model_fields[leaf].annotation, cls.model_fields[leaf].metadata, value)
    near = nearest_value(value, RESUME if leaf == "resume" else words, parts)
    return f"{key}: expected {' or '.join(dict.fromkeys(parts))}; got {shown(value)}" + (
        f"; did you mean {near}?" if near else ""
    )


def nearest_value(value: Any, words: Iterable[str], expected: Iterable[str]) -> str | None:
    """What `value` was probably meant to be, where these words and these kinds of value are allowed."""
    text = value if isinstance(value, str) else shown(value)
    words = list(words)
    plain = text.strip(" \"'=;,").lower()
    for meant, others in VALUE_SYNONYMS.items():
        if meant in words and plain.replace("-", "_") in (meant, *others, *(o.replace("-", "_") for o in others)):
            return meant
    number = parse_scalar(plain.replace(",", "").removesuffix(".0"))
    whole = isinstance(number, float) and number.is_integer() and abs(number) < 1e15
    if any(part.startswith("an integer") for part in expected) and not isinstance(value, int):
        if plain[:-1].isdigit() and plain[-1] in "km":
            return str(int(plain[:-1]) * {"k": 1000, "m": 1_000_000}[plain[-1]])
        if whole or (isinstance(number, int) and not isinstance(number, bool)):
            return str(int(number))
    elif any(part.startswith("a number") for part in expected) and isinstance(value, str):
        return plain if isinstance(number, int | float) and not isinstance(number, bool) else None
    if any(part.startswith("text of letters") for part in expected) and isinstance(value, str):
        return re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-._")[:100] or None
    if any(part.startswith("a list") for part in expected) and isinstance(value, str):
        return f"[{value}]" if value.replace(",", "").isidentifier() else None
    return nearest(plain, words) if isinstance(value, str) else None


def _parts(annotation: Any, metadata: Iterable[Any], value: Any) -> tuple[list[str], list[str]]:
    """What a key takes, in words, and the words among what it takes."""
    origin = get_origin(annotation)
    if hasattr(annotation, "__metadata__"):
        return _parts(get_args(annotation)[0], [*metadata, *_constraints(annotation.__metadata__)], value)
    if _is_union(annotation):
        both = [_parts(member, metadata, value) for member in get_args(annotation)]
        return [p for parts, _ in both for p in parts], [w for _, words in both for w in words]
    if origin is Literal:
        words = list(get_args(annotation))
        return [", ".join(map(str, words))], [w for w in words if isinstance(w, str)]
    if origin is tuple:
        return ["a list such as [a, b]"], []
    if origin is dict:
        return ["keys and values such as {key: value}"], []
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    words = {bool: ["true", "false"], type(None): ["null"]}.get(annotation, [])
    bounds = [b for m in metadata for b in _bounds(m, value)] if annotation in (int, float, str) else []
    of = " of " if bounds and not bounds[0].startswith("above") else " " if bounds else ""
    return [names.get(annotation, str(annotation)) + of + " and ".join(bounds)], words


def _constraints(metadata: Iterable[Any]) -> list[Any]:
    return [c for m in metadata for c in (m.metadata if isinstance(m, FieldInfo) else [m])]


def _bounds(constraint: Any, value: Any) -> Iterator[str]:
    for name, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
        limit = getattr(constraint, name, None)
        far = limit is not None and limit >= 2**31 and not (isinstance(value, int) and value >= limit)
        if limit is not None and not far:  # a bound that nobody meets by accident is told to who met it
            yield f"{words} {limit}"
    if getattr(constraint, "pattern", None):
        yield "letters, digits, dot, dash and underscore (100 at most)"


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)
