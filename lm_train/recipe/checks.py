"""What two sections say against each other, paths that do not exist, and what `debug=true` sets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_train.recipe.data_sections import LabelledData, ShardData
from lm_train.recipe.explain import RESUME, nearest, nearest_value, shown
from lm_train.recipe.foreign import foreign_conflicts
from lm_train.recipe.hub_names import is_hub_name
from lm_train.recipe.sections import SECTIONS, Recipe
from lm_train.recipe.strategies import Conflict, strategy_conflicts
from lm_train.recipe.task import further_ids, length_conflicts, samples_are_sequences, task_conflicts, task_of
from lm_train.recipe.tokenizer_names import exists, is_path, known_vocab_size

DEBUG_STEPS = 20


def near_path(path: str, folder: Path = Path()) -> str:
    """`; did you mean DIR/other.txt?` for a path that does not exist, or nothing."""
    asked = Path(path)
    try:
        names = [file.name for file in (folder / asked.expanduser().parent).iterdir()]
    except (OSError, ValueError, RuntimeError):
        return ""
    near = nearest(asked.stem, (Path(name).stem for name in names if Path(name).suffix == asked.suffix), cutoff=0.7)
    name = f"{near}{asked.suffix}" if near else nearest(asked.name, names, cutoff=0.8)
    return f"; did you mean {path[: len(path) - len(asked.name)]}{name}?" if name else ""


def debug_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What `debug=true` puts in place of what the recipe names."""
    data = raw.get("data") if isinstance(raw.get("data"), Mapping) else {}
    optim = raw.get("optim") if isinstance(raw.get("optim"), Mapping) else {}
    batch, warmup = (data or {}).get("global_batch_size", 16), (optim or {}).get("warmup_steps", 0)
    return {
        "debug": True,
        "data": {
            "global_batch_size": min(batch, 8) if isinstance(batch, int) else batch,
            "micro_batch_size": "auto",
        },
        "optim": {"warmup_steps": min(warmup, 5) if isinstance(warmup, int) else warmup},
        "trainer": {
            "strategy": "single",
            "devices": 1,
            "num_nodes": "auto",
            "max_steps": DEBUG_STEPS,
            "accumulate_grad_batches": "auto",
            "log_every_n_steps": 1,
            "val_check_interval": None,
            "limit_val_batches": 2,
            "limit_test_batches": 2,
            "early_stopping_patience": None,
            "compile": False,
            "deterministic": True,
        },
        "checkpoint": {"every_n_steps": None},
        "tracking": {"wandb": "disabled"},
    }


def conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Everything in a well-typed recipe that cannot be done: the keys concerned, and a sentence with a way out."""
    for section in SECTIONS:
        for keys, message in getattr(recipe, section).conflicts():
            yield [(section, key) for key in keys], message
    yield from task_conflicts(recipe)
    yield from length_conflicts(recipe)
    yield from foreign_conflicts(recipe)
    yield from _batch_conflicts(recipe)
    yield from _trainer_conflicts(recipe)
    yield from _budget_conflicts(recipe)
    yield from _fold_conflicts(recipe)
    yield from strategy_conflicts(recipe)
    yield from _path_conflicts(recipe)


def _batch_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    total, micro = recipe.data.global_batch_size, recipe.data.micro_batch_size
    accumulate, devices = recipe.trainer.accumulate_grad_batches, recipe.trainer.devices
    keys = [
        (key, value)
        for key, value in (
            (("data", "micro_batch_size"), micro),
            (("trainer", "accumulate_grad_batches"), accumulate),
            (("trainer", "devices"), devices),
            (("trainer", "num_nodes"), recipe.trainer.num_nodes),
        )
        if isinstance(value, int)
    ]
    if total == "auto":
        if not samples_are_sequences(recipe):
            yield (
                [("data", "global_batch_size"), ("data", "kind")],
                "data.global_batch_size=auto follows a rule for running text only; give a number, such as 256",
            )
        return
    product = math.prod(int(value) for _, value in keys)
    terms = " x ".join(f"{'.'.join(key)}={value}" for key, value in keys)
    all_given = len(keys) == 4
    if keys and (total != product if all_given else total % product):
        fit = product if all_given else max(product, round(total / product) * product)
        relation = "is not" if all_given else "is not a multiple of"
        yield (
            [("data", "global_batch_size"), *(key for key, _ in keys)],
            f"data.global_batch_size={total} {relation} {terms}; try data.global_batch_size={fit}",
        )


def _trainer_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    trainer, model = recipe.trainer, recipe.model
    if trainer.strategy == "single" and trainer.devices not in ("auto", 1):
        debug = "debug=true runs one process" if recipe.debug else "trainer.strategy=single is one process"
        yield (
            [("trainer", "devices"), ("trainer", "strategy")],
            f"{debug}, not trainer.devices={trainer.devices}; try trainer.{'devices=1' if recipe.debug else 'strategy=ddp'}",
        )
    elif recipe.debug and (trainer.strategy != "single" or trainer.devices != 1):
        yield (
            [("trainer", "strategy"), ("trainer", "devices")],
            "debug=true runs one process; drop trainer.strategy and trainer.devices, or debug=true",
        )
    if trainer.early_stopping_patience is not None and (
        trainer.limit_val_batches == 0 or trainer.val_check_interval is None
    ):
        yield (
            [
                ("trainer", "early_stopping_patience"),
                ("trainer", "val_check_interval"),
                ("trainer", "limit_val_batches"),
            ],
            "early stopping needs validations on the way; set trainer.val_check_interval and no limit_val_batches=0",
        )
    every, n_layer = trainer.activation_checkpointing, getattr(model, "n_layer", None)
    if every not in ("auto", "none") and model.kind in ("recurrent", "mlp", "cnn", "resnet"):
        yield (
            [("trainer", "activation_checkpointing"), ("model", "kind")],
            f"model={model.kind} has no blocks to recompute; set trainer.activation_checkpointing=none",
        )
    elif isinstance(every, int) and n_layer is not None and every > n_layer:
        yield (
            [("trainer", "activation_checkpointing"), ("model", "n_layer")],
            f"every {every}th block of model.n_layer={n_layer} is none; write none, full, or a number up to {n_layer}",
        )
    tokenizer: Any = getattr(recipe.data, "tokenizer", None)
    vocab_size = getattr(model, "vocab_size", "auto")
    known = None if tokenizer is None else known_vocab_size(tokenizer)
    if known is None or not isinstance(vocab_size, int) or any(task_conflicts(recipe)):
        return
    further = further_ids(task_of(recipe), tokenizer)
    if known + further > vocab_size:
        symbols = f" and the task {further} more" if further else ""
        yield (
            [("model", "vocab_size"), ("data", "tokenizer")],
            f"data.tokenizer={tokenizer} has {known} ids{symbols}, model.vocab_size={vocab_size} is smaller; "
            f"try model.vocab_size=auto",
        )


def _budget_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    trainer, limits = recipe.trainer, recipe.budget.limits
    if trainer.max_steps == "auto" and trainer.max_tokens is None and trainer.max_epochs is None and not limits:
        yield (
            [("trainer", "max_steps"), ("budget", "gpu_hours")],
            "trainer.max_steps=auto trains for as long as the budget pays; give budget.hours, budget.gpu_hours, budget.money or "
            "budget.kwh, or a number of steps",
        )
    if trainer.max_tokens is not None and trainer.max_epochs is not None:
        yield (
            [("trainer", "max_tokens"), ("trainer", "max_epochs")],
            f"trainer.max_tokens={trainer.max_tokens} and trainer.max_epochs={trainer.max_epochs:g} both say how long; keep one",
        )
    if trainer.max_tokens is not None and not samples_are_sequences(recipe):
        yield (
            [("trainer", "max_tokens"), ("data", "kind")],
            "trainer.max_tokens counts running text, which this data is not; give trainer.max_epochs or trainer.max_steps",
        )


def _fold_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    data = recipe.data
    if not isinstance(data, LabelledData) or data.folds is None or data.fold is not None:
        return
    if recipe.trainer.limit_val_batches == 0:
        yield (
            [("data", "folds"), ("trainer", "limit_val_batches")],
            f"data.folds={data.folds} compares what each fold validates, and trainer.limit_val_batches=0 validates nothing; "
            "drop one of them",
        )
    if recipe.budget.limits:
        name, value = next(iter(recipe.budget.limits.items()))
        yield (
            [("data", "folds"), ("budget", name)],
            f"data.folds={data.folds} is {data.folds} runs, and each run has a budget of its own; give data.fold=1 with "
            f"budget.{name}={value / data.folds:.3g}, and so on, or drop the budget",
        )
    if recipe.resume not in ("auto", "never"):
        yield (
            [("data", "folds"), ("resume",)],
            f"data.folds={data.folds} is {data.folds} runs, and resume={recipe.resume} one run's checkpoint; give data.fold, "
            "or take a series up again by its name=",
        )


def _folder_conflicts(data: ShardData) -> Iterator[Conflict]:
    for path, _ in data.wanted:
        if "://" in path or exists(f"{path}/manifest.json"):
            continue
        key = ("data", "path" if data.path else "sources")
        if not exists(path):
            yield [key], f"no such folder: {shown(path)}{near_path(path)}"
        else:
            yield [key], f"{shown(path)} holds no manifest.json; expected a folder that lm-train prepare wrote"


def _path_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    data: Any = recipe.data
    if isinstance(data, ShardData):
        yield from _folder_conflicts(data)
    elif "path" in type(data).model_fields:
        for key, value in (("path", data.path), ("val_path", data.val_path), ("test_path", data.test_path)):
            if value is not None and not exists(value) and not (key == "path" and is_hub_name(value)):
                hint = near_path(value) or ("; a hub name looks like owner/name" if key == "path" else "")
                yield [("data", key)], f"no such file or folder: {shown(value)}{hint}"
    tokenizer = getattr(recipe.data, "tokenizer", None)
    if tokenizer is not None and is_path(tokenizer):
        if not exists(tokenizer):
            yield [("data", "tokenizer")], f"no such file or folder: {shown(tokenizer)}{near_path(tokenizer)}"
        elif known_vocab_size(tokenizer) is None:
            yield (
                [("data", "tokenizer")],
                f"{tokenizer} holds no vocabulary; expected a tokenizer.json, or a folder with "
                "tokenizer.json, or encoder.json and vocab.bpe, or vocab.json and merges.txt",
            )
    if recipe.plan is not None and not exists(recipe.plan):
        yield (
            [("plan",)],
            f"expected a file that lm-train plan wrote; no such file: {shown(recipe.plan)}{near_path(recipe.plan)}",
        )
    if recipe.resume not in ("auto", "never") and not exists(recipe.resume):
        near = nearest_value(recipe.resume, RESUME, ())
        hint = f"; did you mean resume={near}?" if near else near_path(recipe.resume)
        yield (
            [("resume",)],
            f"expected auto, never, or a run or checkpoint; no such folder: {shown(recipe.resume)}{hint}",
        )
    if not recipe.runs_dir.isprintable():
        yield [("runs_dir",)], f"runs_dir: expected the path of a folder; got {shown(recipe.runs_dir)}"
    elif recipe.runs_dir.startswith("~") or "$" in recipe.runs_dir:
        yield (
            [("runs_dir",)],
            f"runs_dir: {shown(recipe.runs_dir)}: ~ and $ mean something to a shell only; write it out",
        )
    elif exists(recipe.runs_dir) and not Path(recipe.runs_dir).is_dir():
        yield [("runs_dir",)], f"{recipe.runs_dir} is a file; name a folder"
