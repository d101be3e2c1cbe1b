"""The run folder: its name, its files, and the rules by which they are written and cut."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_train.errors import CheckpointError, ExitCode, OutputError, UsageError
from lm_train.plan import Plan
from lm_train.recipe import Recipe, dump
from lm_train.recipe.text import parse_yaml

DEBUG_SUFFIX = "-debug"


class RunFolder:
    """Paths of one run. Making one touches nothing on disk."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.recipe = self.root / "recipe.yaml"
        self.plan = self.root / "plan.json"
        self.exit_code = self.root / "exit_code"
        self.metrics = self.root / "metrics.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.wandb = self.root / "wandb"
        self.errors = self.root / "errors"
        self.tokenizer = self.root / "tokenizer.json"

    @property
    def name(self) -> str:
        return self.root.name

    def outcome(self) -> int | None:
        """The exit code of the last start that ended; None if it never ended or is under way."""
        try:
            return int(self.exit_code.read_text())
        except (OSError, ValueError):
            return None

    def write_outcome(self, code: int) -> None:
        """Writes `exit_code` unless another supervisor of the same job has already told of a failure."""
        try:
            with self.exit_code.open("x") as file:
                file.write(f"{code}\n")
        except FileExistsError:
            pass
        except OSError as error:
            raise OutputError(f"{self.exit_code}: {error.strerror}") from None


def existing(recipe: Recipe) -> RunFolder | None:
    """The run that `name=` means, if it is there already."""
    folder = RunFolder(Path(recipe.runs_dir) / recipe.name) if recipe.name else None
    return folder if folder is not None and folder.recipe.exists() else None


def create(recipe: Recipe, plan: Plan) -> RunFolder:
    """Makes the run's folder, or takes the existing one of that name, and writes the resolved recipe and the plan.

    Without `name=` the folder is the recipe's name and the next free number; two starts at once get two numbers.

    Raises:
        OutputError: if the folder cannot be made or written to.
    """
    runs = Path(recipe.runs_dir)
    try:
        runs.mkdir(parents=True, exist_ok=True)
        folder = RunFolder(runs / recipe.name if recipe.name else _next_free(runs, _safe_title(recipe)))
        folder.root.mkdir(exist_ok=True)
        shutil.rmtree(folder.errors, ignore_errors=True)
        folder.errors.mkdir()
        folder.checkpoints.mkdir(exist_ok=True)
        folder.exit_code.unlink(missing_ok=True)
        write_atomically(folder.recipe, dump(recipe))
        write_atomically(folder.plan, plan.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise OutputError(
            f"cannot write {error.filename or runs}: {error.strerror}; choose another place with runs_dir=DIR"
        ) from None
    return folder


def _safe_title(recipe: Recipe) -> str:
    title = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in recipe.recipe)
    return title.lstrip("._-") + (DEBUG_SUFFIX if recipe.debug else "") or "run"


def _next_free(runs: Path, title: str) -> Path:
    taken = {int(rest) for p in runs.glob(f"{title}-*") if (rest := p.name[len(title) + 1 :]).isdigit()}
    number = max(taken, default=0) + 1
    while True:
        try:
            (runs / f"{title}-{number}").mkdir()
            return runs / f"{title}-{number}"
        except FileExistsError:
            number += 1


def write_atomically(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    partial.replace(file)


def recipe_differences(folder: RunFolder, recipe: Recipe) -> list[str]:
    """What the recipe says otherwise than the one the folder was made with, a line a key."""
    texts = (folder.recipe.read_text(encoding="utf-8"), dump(recipe))
    old, new = (_flat(parse_yaml(text, "recipe.yaml")[0]) for text in texts)
    keys = sorted((old.keys() | new.keys()) - {"name", "recipe", "runs_dir"})
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a ledger; a torn last line, left by a kill, is dropped."""
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def cut_jsonl(file: Path, step: int) -> None:
    """Drops the rows after optimizer step `step`, so that a resumed run writes no step twice."""
    if file.exists():
        kept = [row for row in read_jsonl(file) if row.get("step", 0) <= step]
        write_atomically(file, "".join(json.dumps(row) + "\n" for row in kept))


def latest_checkpoint(folder: RunFolder) -> Path | None:
    """The run's newest checkpoint, or None if it has none yet."""
    try:
        name = json.loads((folder.checkpoints / "latest").read_text(encoding="utf-8"))["checkpoint"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder.checkpoints / 'latest'}: damaged; name a checkpoint with resume=PATH") from None
    if Path(str(name)).name != name or not (folder.checkpoints / name).is_dir():
        raise CheckpointError(
            f"{folder.checkpoints / str(name)}: missing, but the newest according to {folder.checkpoints / 'latest'}; name "
            "another checkpoint with resume=PATH"
        )
    return folder.checkpoints / name


def checkpoint_to_resume(recipe: Recipe, folder: RunFolder | None) -> Path | None:
    """Where this start goes on from, or None for step 0.

    A run that has checkpoints of its own goes on from its newest, also where `resume=PATH` once gave it its start in
    another run; only a PATH inside its own folder goes back.

    Args:
        recipe: whose `resume` counts.
        folder: the run, if it exists.

    Raises:
        UsageError: if `resume=never` meets a folder with checkpoints.
        CheckpointError: if the named place has none.
    """
    own = latest_checkpoint(folder) if folder is not None else None
    if recipe.resume in ("auto", "never"):
        if own is not None and recipe.resume == "never":
            raise UsageError(
                f"resume=never: {own.parent.parent} has checkpoints (newest {own.name}); take another name=, or resume=auto"
            )
        return own
    path = Path(recipe.resume).expanduser()
    if own is not None and own.parent.resolve() not in (path.resolve(), *path.resolve().parents):
        return own
    found = path if (path / "manifest.json").exists() else latest_checkpoint(RunFolder(path))
    if found is None:
        raise CheckpointError(f"resume={path}: holds no checkpoint; expected a run's folder or its checkpoints/step-N")
    return found


def check_resumable(checkpoint: Path, recipe: Recipe, plan: Plan) -> int:
    """Whether a recipe can go on from a checkpoint, as far as its JSON files tell; before anything is overwritten.

    Returns:
        The checkpoint's optimizer step.

    Raises:
        CheckpointError: saying what differs.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        step, seed, optimizer = int(state["step"]), state["seed"], manifest["optimizer"]
        saved = sum(math.prod(t["shape"]) for t in manifest["tensors"].values() if "param" in t["keys"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint}: state.json or manifest.json missing or damaged ({type(error).__name__}); name another "
            "checkpoint with resume=PATH"
        ) from None
    otherwise = "or start a new run with another name="
    if seed != recipe.seed:
        raise CheckpointError(
            f"{checkpoint}: was trained with seed={seed}, now seed={recipe.seed}, which is another order of samples; give "
            f"seed={seed}, {otherwise}"
        )
    if optimizer.lower() != recipe.optim.kind:
        raise CheckpointError(
            f"{checkpoint}: holds the state of {optimizer}, the recipe asks for {recipe.optim.kind}; give "
            f"optim.kind={optimizer.lower()}, {otherwise}"
        )
    if plan.n_parameters is not None and saved != plan.n_parameters:
        raise CheckpointError(
            f"{checkpoint}: holds a model of {saved:,} parameters, the recipe's has {plan.n_parameters:,}; give the model it "
            f"was trained with, {otherwise}"
        )
    return step


def is_finished(recipe: Recipe, folder: RunFolder) -> bool:
    """Whether the run in `folder` came to its end and the recipe asks for nothing else than it did."""
    return folder.outcome() == ExitCode.DONE and not recipe_differences(folder, recipe)
