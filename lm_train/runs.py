"""The run folder: its name, its files, and the rules by which they are written and cut."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_train.errors import ExitCode, OutputError, UsageError
from lm_train.plan import Plan
from lm_train.recipe import Recipe, dump, flat
from lm_train.recipe.text import parse_yaml
from lm_train.saved import newest_good
from lm_train.saved.durable import write_atomically as write_atomically
from lm_train.slurm import Allocation

DEBUG_SUFFIX = "-debug"
LEAVING_S = 120.0
"""How long a requeued job waits for its earlier start to let go; a file server may hold a dead node's lock for 90 s."""


class RunFolder:
    """Paths of one run. Making one touches nothing on disk."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.recipe = self.root / "recipe.yaml"
        self.plan = self.root / "plan.json"
        self.exit_code = self.root / "exit_code"
        self.metrics = self.root / "metrics.jsonl"
        self.ledger = self.root / "ledger.jsonl"
        self.starts = self.root / "starts.jsonl"
        self.anomalies = self.root / "anomalies.jsonl"
        self.budget = self.root / "budget.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.evaluation = self.root / "evaluation"
        self.wandb = self.root / "wandb"
        self.errors = self.root / "errors"
        self.tokenizer = self.root / "tokenizer.json"
        self.preprocessing = self.root / "preprocessing.json"

    @property
    def name(self) -> str:
        return self.root.name

    def outcome(self) -> int | None:
        """The exit code of the last start that ended; None if it never ended or is under way."""
        try:
            return int(self.exit_code.read_text())
        except (OSError, ValueError):
            return None

    def write_outcome(self, code: int) -> bool:
        """Writes `exit_code` unless another supervisor of the same start has; returns whether this one did."""
        try:
            with self.exit_code.open("x") as file:
                file.write(f"{code}\n")
        except FileExistsError:
            return False
        except OSError as error:
            raise OutputError(f"{self.exit_code}: {error.strerror}") from None
        return True


def existing(recipe: Recipe, allocation: Allocation | None = None) -> RunFolder | None:
    """The run that the recipe's name, or without one the Slurm job, means, if it is there already."""
    name = run_name(recipe, allocation)
    folder = RunFolder(Path(recipe.runs_dir) / name) if name else None
    return folder if folder is not None and folder.recipe.exists() else None


def run_name(recipe: Recipe, allocation: Allocation | None) -> str | None:
    """The run's name, the same after a requeue; None where the next free number will be taken."""
    if recipe.name or allocation is None:
        return recipe.name
    return f"{_safe_title(recipe)}-{allocation.run_suffix}"


def make_folder(recipe: Recipe, allocation: Allocation | None = None) -> RunFolder:
    """Makes the run's folder, or takes the existing one of that name.

    Without a name the folder is the recipe's name and the next free number; two starts at once get two numbers.

    Raises:
        OutputError: if it cannot be made.
    """
    runs = Path(recipe.runs_dir)
    name = run_name(recipe, allocation)
    try:
        runs.mkdir(parents=True, exist_ok=True)
        folder = RunFolder(runs / name if name else _next_free(runs, _safe_title(recipe)))
        folder.root.mkdir(exist_ok=True)
    except OSError as error:
        raise _cannot_write(error, runs) from None
    return folder


def begin(folder: RunFolder, recipe: Recipe, plan: Plan) -> None:
    """Clears what the last start left about its end, and writes the resolved recipe and the plan.

    Raises:
        OutputError: if the folder cannot be written to.
    """
    try:
        shutil.rmtree(folder.errors, ignore_errors=True)
        folder.errors.mkdir(exist_ok=True)
        folder.checkpoints.mkdir(exist_ok=True)
        folder.exit_code.unlink(missing_ok=True)
        write_atomically(folder.recipe, dump(recipe))
        write_atomically(folder.plan, plan.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise _cannot_write(error, folder.root) from None


def beginning(folder: RunFolder) -> dict[Path, str]:
    """What `begin` writes over: the recipe and the plan that the run has so far."""
    texts = {}
    for file in (folder.recipe, folder.plan):
        with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):  # what is no text is worth nothing
            texts[file] = file.read_text(encoding="utf-8")
    return texts


def put_back(before: Mapping[Path, str]) -> None:
    """After a start that was refused: the run is still what it was.

    Raises:
        OutputError: if the folder cannot be written to.
    """
    for file, text in before.items():
        try:
            write_atomically(file, text)
        except OSError as error:
            raise _cannot_write(error, file) from None


def create(recipe: Recipe, plan: Plan) -> RunFolder:
    """A folder ready for its ranks, for programs that train without a supervisor."""
    folder = make_folder(recipe)
    begin(folder, recipe, plan)
    return folder


def _cannot_write(error: OSError, place: Path) -> OutputError:
    file = Path(error.filename or place)
    reason = error.strerror
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        reason = "a link that leads nowhere" if file.is_symlink() and not file.exists() else "in its way is a file"
    return OutputError(f"cannot write {file}: {reason}; choose another place with runs_dir=DIR")


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


def claim_series(recipe: Recipe, member: Callable[[str, int], str]) -> str:
    """A name for several runs that belong together: the recipe's and the next number that neither a run nor a series has.

    The folder of its first member is made, so that two starts at once get two names.

    Args:
        recipe: without a name.
        member: the name of the i-th run, from 1, of a series.

    Raises:
        OutputError: if the folder cannot be made.
    """
    folder, title = Path(recipe.runs_dir), _safe_title(recipe)
    taken = (re.match(rf"{re.escape(title)}-(\d+)(-|$)", path.name) for path in folder.glob(f"{title}-*"))
    number = max((int(match[1]) for match in taken if match), default=0) + 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                (folder / member(f"{title}-{number}", 1)).mkdir()
                return f"{title}-{number}"
            except FileExistsError:
                number += 1
    except OSError as error:
        raise _cannot_write(error, folder) from None


def recipe_differences(folder: RunFolder, recipe: Recipe) -> list[str]:
    """What the recipe says otherwise than the one the folder was made with, a line a key.

    Raises:
        UsageError: if the folder's recipe cannot be read.
    """
    try:
        written = parse_yaml(folder.recipe.read_text(encoding="utf-8"), str(folder.recipe))[0]
    except UnicodeDecodeError:
        written = None
    if not isinstance(written, dict):
        raise UsageError(
            f"{folder.recipe}: holds no recipe; put the run's own back, or start a new run with another name="
        )
    old, new = flat(written), flat(parse_yaml(dump(recipe), "recipe.yaml")[0])
    keys = sorted((old.keys() | new.keys()) - {"name", "recipe", "runs_dir"})
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a ledger; a torn last line, left by a kill, is dropped."""
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def cut_jsonl(file: Path, step: int) -> None:
    """Drops the rows after optimizer step `step`, so that a resumed run writes no step twice."""
    if file.exists():
        kept = [row for row in read_jsonl(file) if not (isinstance(row.get("step"), int) and row["step"] > step)]
        try:
            write_atomically(file, "".join(json.dumps(row) + "\n" for row in kept))
        except OSError as error:
            raise _cannot_write(error, file) from None


def latest_checkpoint(folder: RunFolder) -> Path | None:
    """The run's newest good checkpoint, or None if it has none yet.

    Raises:
        CheckpointError: if there are some, and none is good.
    """
    return newest_good(folder.checkpoints).checkpoint


def is_finished(recipe: Recipe, folder: RunFolder) -> bool:
    """Whether the run in `folder` came to its end and the recipe asks for nothing else than it did."""
    return folder.outcome() == ExitCode.DONE and not recipe_differences(folder, recipe)
