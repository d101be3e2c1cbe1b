"""From which checkpoint a start goes on, and whether its recipe may. Free of torch; ranks have the terms by the environment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lm_train.errors import CheckpointError, UsageError
from lm_train.plan import Plan
from lm_train.recipe import Recipe, dump, flat
from lm_train.recipe.text import parse_yaml
from lm_train.runs import RunFolder
from lm_train.saved import Choice, newest_good, open_manifest, read_state

VARIABLE = "LM_TRAIN_RESUME_TERMS"
"""Environment variable by which a supervisor tells its ranks the terms."""
_UNSPOKEN = ("name", "recipe", "runs_dir")
"""Keys that say nothing of a run."""
_GUARDED = ("seed", "model.", "data.")
_SAFE = ("data.micro_batch_size", "data.num_workers", "data.path", "data.val_path", "data.test_path")
"""Where samples lie and how they are read: that they are the same ones is told by their fingerprint."""


class Terms(NamedTuple):
    """How a start goes on from its checkpoint."""

    strict: bool = False
    """From this one or from none, since a person has named it."""
    allow_change: tuple[str, ...] = ()
    """Sections and keys of the recipe that may be other than the checkpoint's although that changes the run."""

    def allows(self, key: str) -> bool:
        return any(key == word or key.startswith(f"{word}.") for word in self.allow_change)

    def tell_ranks(self) -> None:
        """Ranks are started with this process' environment."""
        os.environ[VARIABLE] = json.dumps(self)


AS_IT_IS = Terms()


def terms() -> Terms:
    """As the supervisor has told them."""
    strict, allow_change = json.loads(os.environ.get(VARIABLE) or "[false, []]")
    return Terms(strict, tuple(allow_change))


def checkpoint_to_resume(recipe: Recipe, folder: RunFolder | None) -> tuple[Choice, Terms]:
    """Where this start goes on from; no checkpoint for step 0.

    A run that has checkpoints of its own goes on from its newest good one, also where `resume=PATH` once gave it its start in
    another run; only a PATH inside its own folder goes back.

    Args:
        recipe: whose `resume` counts.
        folder: the run, if it exists.

    Raises:
        UsageError: if `resume=never` meets a folder with checkpoints.
        CheckpointError: if the named place has none, or none is good.
    """
    lenient = Terms(allow_change=recipe.allow_change)
    own = Choice(None, []) if folder is None else newest_good(folder.checkpoints)
    if recipe.resume in ("auto", "never"):
        if own.checkpoint is not None and recipe.resume == "never":
            raise UsageError(
                f"resume=never: {own.checkpoint.parent.parent} has checkpoints (newest {own.checkpoint.name}); take another "
                "name=, or resume=auto"
            )
        return own, lenient
    path = Path(recipe.resume).expanduser()
    if own.checkpoint is not None and own.checkpoint.parent.resolve() not in (path.resolve(), *path.resolve().parents):
        return own, lenient
    strict = lenient._replace(strict=True)
    if (path / "manifest.json").exists():
        return Choice(path, []), strict
    found = newest_good(RunFolder(path).checkpoints)
    if found.checkpoint is None:
        raise CheckpointError(f"resume={path}: holds no checkpoint; expected a run's folder or its checkpoints/step-N")
    if found.skipped:
        raise CheckpointError(f"{found.skipped[0]}; resume={found.checkpoint} takes the newest good one there")
    return found, strict


def check_resumable(checkpoint: Path, recipe: Recipe, plan: Plan, terms: Terms = AS_IT_IS) -> int:
    """Whether a recipe can go on from a checkpoint, as far as its JSON files tell; before anything is overwritten.

    Args:
        checkpoint: a step-N folder.
        recipe: of this start.
        plan: of this start.
        terms: what may change.

    Returns:
        The checkpoint's optimizer step.

    Raises:
        CheckpointError: saying what differs.
    """
    manifest = open_manifest(checkpoint)
    state = read_state(checkpoint, manifest)
    step = state.get("step")
    if type(step) is not int:
        raise CheckpointError(f"{checkpoint / 'state.json'}: expected a number of steps, found {step!r}")
    otherwise = "or start a new run with another name="
    _check_unchanged(checkpoint, state, recipe, plan, terms)
    if (
        manifest.optimizer.lower() != recipe.optim.kind and recipe.model.kind != "custom"
    ):  # a LightningModule brings its own
        raise CheckpointError(
            f"{checkpoint}: holds the state of {manifest.optimizer}, the recipe asks for {recipe.optim.kind}; give "
            f"optim.kind={manifest.optimizer.lower()}, {otherwise}"
        )
    if plan.n_parameters is not None and manifest.n_parameters != plan.n_parameters:
        raise CheckpointError(
            f"{checkpoint}: holds a model of {manifest.n_parameters:,} parameters, the recipe's has {plan.n_parameters:,}; give "
            f"the model it was trained with, {otherwise}"
        )
    return step


def _check_unchanged(checkpoint: Path, state: dict[str, Any], recipe: Recipe, plan: Plan, terms: Terms) -> None:
    """That nothing has changed in silence that makes another run of it."""
    changed = [(key, old, new) for key, old, new in _changes(state, recipe) if _is_guarded(key)]
    batch = state.get("global_batch_size", plan.global_batch_size)
    if batch != plan.global_batch_size and all(key != "data.global_batch_size" for key, _, _ in changed):
        changed.append(("data.global_batch_size", batch, plan.global_batch_size))
    refused = [(key, old, new) for key, old, new in changed if not terms.allows(key)]
    if refused:
        listed = ", ".join(f"{key}={_word(old)} (now {_word(new)})" for key, old, new in refused[:8])
        more = f" and {len(refused) - 8} more" if len(refused) > 8 else ""
        names = ",".join([*terms.allow_change, *(key for key, _, _ in refused)])
        raise CheckpointError(
            f"{checkpoint}: was trained with {listed}{more}, which makes another run of it; give the same, or "
            f"allow_change=[{names}] to go on with the new, or start a new run with another name="
        )


def _is_guarded(key: str) -> bool:
    return key.startswith(_GUARDED) and key not in _SAFE


def _word(value: object) -> str:
    return "null" if value is None else str(value)[:80]


def recipe_state(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a checkpoint keeps it: one level of keys."""
    values = flat(parse_yaml(dump(recipe), "recipe.yaml")[0])
    return {key: value for key, value in values.items() if key not in _UNSPOKEN}


def differences(checkpoint: Path, recipe: Recipe) -> list[str]:
    """What the recipe says otherwise than the one that the checkpoint was trained with, a line a key."""
    state = read_state(checkpoint, open_manifest(checkpoint))
    return [f"{key}: {_word(old)} -> {_word(new)}" for key, old, new in _changes(state, recipe)]


def _changes(state: dict[str, Any], recipe: Recipe) -> Iterable[tuple[str, Any, Any]]:
    """Key, old value and new value of everything that is other than in the checkpoint."""
    new = json.loads(json.dumps(recipe_state(recipe)))
    old = state.get("recipe")
    if not isinstance(old, dict):
        old = new | ({"seed": state["seed"]} if "seed" in state else {})
    return [
        (key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    ]
