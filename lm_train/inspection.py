"""`lm-train checkpoint do=list|verify|convert run=...`: what a run has saved, whether it is good, and its tensors as plain files.

Free of torch: bytes are compared and copied, never taken for anything else.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_train.errors import CheckpointError, ExitCode, OutputError, UsageError
from lm_train.recipe import load
from lm_train.recipe.explain import nearest
from lm_train.runs import RunFolder
from lm_train.saved import BEST, LATEST, checkpoints_in, open_manifest, pointed, read_state, step_of, verify
from lm_train.saved.convert import Kind, convert
from lm_train.saved.publish import Keeping, kept
from lm_train.saved.shards import Shards
from lm_train.saved.space import size_of

WORDS = {
    "list": ("run", "format"),
    "verify": ("run", "step", "format"),
    "convert": ("run", "step", "out", "shards", "what", "format"),
}
"""Of each thing to do, the words that it takes."""
THREADS = min(8, os.cpu_count() or 1)


class _Asked(NamedTuple):
    do: str
    run: Path
    words: dict[str, str]

    @property
    def folder(self) -> Path:
        """The run's `checkpoints`, or the folder that holds the one that was named."""
        if step_of(self.run) >= 0:
            return self.run.resolve().parent
        return self.run if self.run.name == "checkpoints" else RunFolder(self.run).checkpoints

    @property
    def checkpoints(self) -> list[Path]:
        """Those that are meant, the newest first."""
        step = self.words.get("step", str(step_of(self.run)) if step_of(self.run) >= 0 else None)
        found = checkpoints_in(self.folder)
        if step is None:
            return found
        if step == "latest":
            pointer = pointed(self.folder, LATEST)
            step = "none" if pointer is None else str(pointer["step"])
        elif step == "best":
            pointer = pointed(self.folder, BEST)
            step = "none" if pointer is None else str(pointer["step"])
        chosen = [path for path in found if str(step_of(path)) == step]
        if not chosen:
            there = ", ".join(str(step_of(path)) for path in found) or "none"
            raise CheckpointError(
                f"{self.folder}: no checkpoint of step {self.words.get('step', step)}; there are {there}"
            )
        return chosen


def inspect(words: Sequence[str]) -> int:
    """Does what the words ask.

    Returns:
        The exit code: BAD_CHECKPOINT where something is damaged.

    Raises:
        UsageError: if the words are wrong.
        CheckpointError: if there is no such checkpoint, or what is to be converted is damaged.
        OutputError: if the place for what is converted cannot be written to.
    """
    asked = _asked(words)
    done: dict[str, Callable[[_Asked], int]] = {"list": _list, "verify": _verify, "convert": _convert}
    return done[asked.do](asked)


def _asked(words: Sequence[str]) -> _Asked:
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value:
            raise UsageError(f"{word}: expected key=value, such as do=verify run=runs/RUN")
        if key in given:
            raise UsageError(f"{key}: given twice")
        given[key] = value
    do = given.pop("do", "list")
    if do not in WORDS:
        near = nearest(do, WORDS)
        raise UsageError(f"do={do}: expected list, verify or convert" + (f"; did you mean do={near}?" if near else ""))
    for key in given:
        if key not in WORDS[do]:
            near = nearest(key, WORDS[do])
            hint = f"did you mean {near}?" if near else f"there are {', '.join(WORDS[do])}"
            raise UsageError(f"{key}: do={do} takes no such word; {hint}")
    if "run" not in given:
        raise UsageError("run: expected a run's folder, as in lm-train checkpoint do=list run=runs/RUN")
    run = Path(given.pop("run")).expanduser()
    if not run.is_dir():
        raise UsageError(f"run={run}: no such folder; expected a run's folder, or its checkpoints/step-N")
    if given.get("format", "text") not in ("text", "json"):
        raise UsageError(f"format={given['format']}: expected text or json")
    step = given.get("step", "0")
    if not step.isdecimal() and step not in ("latest", "best"):
        raise UsageError(f"step={step}: expected a number, latest or best")
    return _Asked(do, run, given)


def _list(asked: _Asked) -> int:
    """One line a checkpoint; cheap: no tensor is read."""
    keeping = _keeping(asked)
    pointers, problems = {}, []
    for name in (LATEST, BEST):
        try:
            pointers[name] = pointed(asked.folder, name)
        except CheckpointError as error:
            problems.append(str(error))
    found = checkpoints_in(asked.folder)
    steps = [step_of(path) for path in found]
    latest = pointers.get(LATEST)
    newest = int(latest["step"]) if latest is not None else max(steps, default=-1)
    best = pointers.get(BEST)
    reasons = kept(steps, newest, keeping, None if best is None else int(best["step"]))
    rows = []
    for path in reversed(found):
        step = step_of(path)
        row: dict[str, Any] = {"step": step, "kept_for": reasons.get(step, [])}
        if best is not None and best["step"] == step:
            row["metric"] = {str(best.get("monitor")): best.get("value")}
        try:
            manifest = open_manifest(path)
            written = (path / "manifest.json").stat().st_mtime
            row |= {"bytes": manifest.bytes, "age_seconds": round(max(0.0, time.time() - written), 1)}
            row |= {"ranks": manifest.world_size, "parameters": manifest.n_parameters}
        except CheckpointError as error:
            problems.append(str(error))
            row["problem"] = str(error)
        rows.append(row)
    if asked.words.get("format") == "json":
        print(json.dumps({"checkpoints": rows, "problems": problems}))
    else:
        for row in rows:
            print(_line(row))
        if not rows:
            print(f"{asked.folder}: no checkpoint yet")
        for problem in problems:
            print(f"lm-train: {problem}")
    return ExitCode.BAD_CHECKPOINT if problems else ExitCode.DONE


def _line(row: dict[str, Any]) -> str:
    if "problem" in row:
        return f"step {row['step']:>9}  damaged or incomplete"
    metric = "".join(f"  {name} {value:.6g}" for name, value in row.get("metric", {}).items())
    return (
        f"step {row['step']:>9}  {size_of(row['bytes']):>9}  {_age(row['age_seconds']):>7} old  {row['ranks']:>3} "
        f"rank{'s' if row['ranks'] != 1 else ' '}  {', '.join(row['kept_for']) or 'goes with the next save'}{metric}"
    )


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _keeping(asked: _Asked) -> Keeping:
    file = asked.folder.parent / "recipe.yaml"
    if not file.exists():
        return Keeping(1)
    try:
        section = load([f"recipe={file.resolve()}"]).checkpoint
    except UsageError:  # a recipe of another version: what is kept is not known
        return Keeping(1)
    return Keeping(section.keep_last, section.keep_every_n_steps)


def _verify(asked: _Asked) -> int:
    """Reads everything, and says of each checkpoint whether it is what was written."""
    problems: list[str] = []
    rows = []
    for name in (LATEST, BEST):
        try:
            pointed(asked.folder, name)
        except CheckpointError as error:
            problems.append(str(error))
    chosen = asked.checkpoints
    if not chosen:
        raise CheckpointError(f"{asked.folder}: holds no checkpoint")
    text = asked.words.get("format") != "json"
    for path in reversed(chosen):
        began = time.monotonic()
        try:
            manifest = open_manifest(path)
            verify(path, manifest, threads=THREADS)
            read_state(path, manifest)
            Shards(path, manifest)
        except CheckpointError as error:
            problems.append(str(error))
            rows.append({"step": step_of(path), "good": False, "problem": str(error)})
            continue
        seconds = time.monotonic() - began
        rows.append({"step": step_of(path), "good": True, "bytes": manifest.bytes, "seconds": round(seconds, 3)})
        if text:
            print(f"{path.name}: good, {size_of(manifest.bytes)} in {len(manifest.files) + 1} files, {seconds:.1f} s")
    if not text:
        print(json.dumps({"checkpoints": rows, "problems": problems}))
    for problem in problems if text else ():
        print(f"lm-train: {problem}")
    return ExitCode.BAD_CHECKPOINT if problems else ExitCode.DONE


def _convert(asked: _Asked) -> int:
    """Writes whole tensors as plain safetensors files."""
    shards, what = asked.words.get("shards", "1"), asked.words.get("what", "model")
    if not shards.isdecimal() or not 1 <= int(shards) <= 9999:
        raise UsageError(f"shards={shards}: expected a number of files from 1 to 9999")
    if what not in ("model", "optimizer", "all"):
        raise UsageError(f"what={what}: expected model, optimizer or all")
    if "step" not in asked.words and step_of(asked.run) < 0:
        asked.words["step"] = "latest"
    path = asked.checkpoints[0]
    out = Path(asked.words.get("out", f"{path.name}-{what}")).expanduser()
    if out.exists():
        raise UsageError(f"out={out}: is there already; name a new folder")
    manifest = open_manifest(path)
    verify(path, manifest, threads=THREADS)
    kinds: list[Kind] = ["model", "optimizer"] if what == "all" else ["optimizer" if what == "optimizer" else "model"]
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for kind in kinds:
            convert(path, manifest, partial, kind, int(shards))
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(f"cannot write {out}: {error.strerror or error}; name another folder with out=DIR") from None
    if asked.words.get("format") == "json":
        print(json.dumps({"out": str(out), "files": sorted(file.name for file in out.iterdir())}))
    else:
        print(out)
    return ExitCode.DONE
