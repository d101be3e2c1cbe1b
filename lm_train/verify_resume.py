"""`lm-train verify-resume`: runs a recipe straight and with kills, and compares the two ledgers. Free of torch.

The kills are real: SIGKILL to one rank, or to the supervisor and all ranks at once, at seeded points; then the same command
again, as a person or a batch system would give it. What is compared is every bit of every step's loss and gradient norm, the
samples, the learning rate, and the values of every validation.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from lm_train import heartbeat, ledger, runs, signals
from lm_train.errors import CheckpointError, ExitCode, LMTrainError, UsageError
from lm_train.folds import number_of_folds
from lm_train.output import aligned
from lm_train.plan import Plan
from lm_train.planning import split_words
from lm_train.recipe import Recipe, load
from lm_train.runs import RunFolder
from lm_train.slurm import current_allocation
from lm_train.supervisor import say

WORDS: dict[str, tuple[str, ...]] = {"kills": (), "kill_seed": (), "format": ("text", "json")}
"""What this verb understands beside a recipe's words."""
KILLS, MOST_KILLS = 5, 1000
STRAIGHT, INTERRUPTED = "straight", "interrupted"
LEAVES_S = 60.0
"""How long a start whose rank was killed may take to end."""
POLL_S = 0.01
LONG_S = 300.0
"""A straight run that takes longer is told how to be shortened."""
SHOWN_LINES = 12
EVERYTHING = "all processes"


class Killed(NamedTuple):
    """One kill, and what became of the run."""

    target: str
    """`rank 1`, or all processes."""
    phase: str
    """What rank 0 was at."""
    step: int
    """The last step that it had done; where it cannot be seen, whose ledger line was on disk."""
    resumed_from: int
    """Step of the checkpoint that was there; 0: none."""
    seconds: float | None
    """From the kill to the next start's first step beyond the checkpoint."""

    @property
    def lost(self) -> int:
        """Steps that had to be done again."""
        return max(0, self.step - self.resumed_from)


class Point(NamedTuple):
    """When to kill, and whom."""

    step: int
    delay: float
    """Of the time of a step, after the step is done."""
    rank: int | None
    """None: the supervisor and all its ranks."""


def verify_resume(words: Sequence[str]) -> int:
    """Runs a recipe twice, once undisturbed and once with kills, and says whether both did the same.

    Args:
        words: a recipe's, and `kills=N kill_seed=N format=json`.

    Returns:
        DONE where both are the same, BUG where they differ, else what the run itself ended with.

    Raises:
        UsageError: if the words do not fit together.
        LMTrainError: if a run did not come to its end.
    """
    own, rest = split_words(words, WORDS)
    recipe = load(rest)
    kills = _number(own, "kills", KILLS, 1, MOST_KILLS)
    kill_seed = _number(own, "kill_seed", 0, 0, 2**32)
    _check(recipe)
    name = recipe.name or runs.claim_series(recipe, lambda title, i: f"{title}-{STRAIGHT}")
    straight, interrupted = (RunFolder(Path(recipe.runs_dir) / f"{name}-{part}") for part in (STRAIGHT, INTERRUPTED))
    for folder in (straight, interrupted):
        if folder.recipe.exists():
            raise UsageError(f"name={name}: {folder.root} is there already; take another name=")
    words = [word for word in rest if word.partition("=")[0] not in ("name", "--name")]
    if not any(word.startswith("tracking") for word in words):
        words.append("tracking.wandb=disabled")
    with _ended_together():
        began = time.monotonic()
        _through(words, straight)
        seconds = time.monotonic() - began
        steps = ledger.last_step(straight.ledger)
        if steps is None:
            raise LMTrainError(f"{straight.ledger}: no steps; see {_log_of(straight)}")
        say(f"straight: {steps:,} steps in {seconds:.0f} s, {straight.root}")
        if seconds > LONG_S:
            say(f"lm-train: note: {kills} kills take about as long again, and more; trainer.max_steps=N shortens it")
        every = _saves(recipe, steps, kills)
        plan = Plan.read(straight.plan)
        points = _points(kills, kill_seed, steps, plan.world_size)
        words = [word for word in words if word.partition("=")[0] != "checkpoint.every_n_steps"]
        words.append(f"checkpoint.every_n_steps={every}")
        if not any(word.startswith("trainer.restarts_without_progress=") for word in words):
            words.append("trainer.restarts_without_progress=null")  # the kills are not the run's fault
        killed = _with_kills(words, interrupted, points, _step_seconds(straight))
    difference = _difference(straight, interrupted)
    result = {
        "identical": difference is None,
        "steps": steps,
        "difference": difference,
        "kills": [k._asdict() | {"lost": k.lost} for k in killed],
        "straight": str(straight.root),
        "interrupted": str(interrupted.root),
    }
    print(json.dumps(result) if own.get("format") == "json" else _as_text(result, killed), flush=True)
    return ExitCode.DONE if difference is None else ExitCode.BUG


def _number(own: dict[str, str], key: str, default: int, least: int, most: int) -> int:
    text = own.get(key, str(default))
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise UsageError(f"{key}: expected a whole number from {least} to {most:,}; got {text!r:.40}")
    return int(text)


def _check(recipe: Recipe) -> None:
    """What has no two equal runs."""
    if recipe.trainer.max_steps == "auto":
        raise UsageError(
            "trainer.max_steps=auto: where the budget ends such a run depends on the clock; give trainer.max_steps=N"
        )
    if recipe.dry_run or recipe.debug:
        raise UsageError(
            f"{'dry_run' if recipe.dry_run else 'debug'}=true: such a run saves nothing to resume; drop it"
        )
    if recipe.resume != "auto":
        raise UsageError(f"resume={recipe.resume}: both runs begin at step 0 here; drop it")
    if number_of_folds(recipe) is not None:
        raise UsageError("data.folds: several runs; give data.fold=1 to verify one of them")
    allocation = current_allocation()
    if allocation is not None and allocation.tasks > 1:
        raise UsageError(
            f"{allocation} has {allocation.tasks} tasks; verify-resume starts and kills the processes itself: run it in a step "
            "of one task, with all its GPUs"
        )


def _saves(recipe: Recipe, steps: int, kills: int) -> int:
    """Steps between two saves of the interrupted run: the recipe's, or fewer, so that there is something to resume from."""
    asked, needed = recipe.checkpoint.every_n_steps, max(1, steps // (2 * kills))
    if asked is not None and asked <= needed:
        return asked
    if kills > 1 or asked is None or asked > steps // 2:
        say(f"checkpoint.every_n_steps={needed} in the interrupted run, so that a kill finds a checkpoint behind it")
        return needed
    return asked


def _points(kills: int, seed: int, steps: int, world_size: int) -> list[Point]:
    """One point in each of `kills` equal stretches of the run."""
    draw = random.Random(seed)
    targets = [*range(world_size), None]
    bounds = [1 + round(i * (steps - 1) / kills) for i in range(kills + 1)]
    return [
        Point(draw.randint(first, max(first, last - 1)), draw.random(), draw.choice(targets))
        for first, last in itertools.pairwise(bounds)
    ]


def _step_seconds(folder: RunFolder) -> float:
    rows = [row["perf/step_seconds"] for row in runs.read_jsonl(folder.metrics) if "perf/step_seconds" in row]
    return float(rows[-1]) if rows else 0.0


class _Start:
    """One start of a run, with its output in a file beside the run folder."""

    def __init__(self, words: Sequence[str], folder: RunFolder) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "lm_train", "train", *words, f"name={folder.name}"]
        folder.root.parent.mkdir(parents=True, exist_ok=True)
        with _log_of(folder).open("ab") as log:
            # a group of its own: Ctrl-C comes here alone; and with this process it ends, too
            self.supervisor = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0, preexec_fn=_end_with_parent
            )
        _running.append(self)
        self._left: list[int] = []
        self._rank_zero: int | None = None
        self._before = _changed(folder.ledger)

    def seen(self) -> tuple[int, str]:
        """The last step of this start, 0 before its first one can be seen, and what rank 0 is at."""
        if self._rank_zero is None:
            self._rank_zero = _ranks_of(self.supervisor.pid).get(0)
        beat = None if self._rank_zero is None else heartbeat.seen(self.supervisor.pid, self._rank_zero)
        if beat is not None:
            return max(0, beat.step), beat.phase.in_words
        grown = _changed(self.folder.ledger) != self._before
        return (ledger.last_step(self.folder.ledger) or 0) if grown else 0, ""

    def ended(self) -> int | None:
        return self.supervisor.poll()

    def kill(self, rank: int | None) -> str:
        """SIGKILL to a rank, or to everything; gives what was killed."""
        self._left = _below(self.supervisor.pid)
        ranks = _ranks_of(self.supervisor.pid)
        if rank is not None and rank in ranks:
            _kill(ranks[rank])
            return f"rank {rank}"
        for process in (self.supervisor.pid, *ranks.values()):
            _kill(process)
        return EVERYTHING

    def end(self) -> None:
        """Nothing of it is left when this returns."""
        processes = {*self._left, *_below(self.supervisor.pid)}
        if self.supervisor.poll() is None:
            self.supervisor.kill()
        self.supervisor.wait()
        for process in processes:
            if b"lm_train.rank" in _command(
                process
            ):  # workers of a loader take seconds to notice that their rank has gone
                _kill(process)
        _running.remove(self)


_running: list[_Start] = []


def _end_with_parent() -> None:
    signals.die_with_parent()


@contextlib.contextmanager
def _ended_together() -> Iterator[None]:
    """However the block is left, by Ctrl-C and SIGTERM too, no process of a run stays."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        while _running:
            _running[-1].end()
        for number, handler in before.items():
            signal.signal(number, handler)


def _through(words: Sequence[str], folder: RunFolder) -> None:
    """One start to its end."""
    start = _Start(words, folder)
    while start.ended() is None:
        time.sleep(POLL_S)
    _expect(start, ExitCode.DONE)


def _with_kills(words: Sequence[str], folder: RunFolder, points: Sequence[Point], step_s: float) -> list[Killed]:
    """Starts again and again until the run is done, each start but the last with its kill."""
    killed: list[Killed] = []
    kill_at, resumed_from = 0.0, 0
    for point in (*points, None):
        start = _Start(words, folder)
        due: float | None = None
        step, phase = 0, ""
        while start.ended() is None:
            step, phase = start.seen()
            if killed and killed[-1].seconds is None and step > resumed_from:
                killed[-1] = killed[-1]._replace(seconds=round(time.monotonic() - kill_at, 2))
            if point is not None and step >= max(point.step, resumed_from + 1):
                due = due or time.monotonic() + point.delay * step_s
                if time.monotonic() >= due:
                    break
            time.sleep(POLL_S)
        if start.ended() is not None:  # the last start, or one that has left its point behind before it could be seen
            _expect(start, ExitCode.DONE)
            break
        assert point is not None
        step, phase = start.seen()
        target = start.kill(point.rank)
        kill_at = time.monotonic()
        try:
            code = start.supervisor.wait(LEAVES_S)
        except subprocess.TimeoutExpired:
            raise LMTrainError(
                f"{folder.root}: {target} was killed, and the rest still ran after {LEAVES_S:.0f} s; see {_log_of(folder)}"
            ) from None
        if code not in (ExitCode.REQUEUE, -signal.SIGKILL, ExitCode.DONE):
            _expect(start, ExitCode.REQUEUE)
        start.end()
        resumed_from = _saved_step(folder)
        killed.append(Killed(target, phase, step, resumed_from, None))
        say(f"kill {len(killed)}: {target} after step {step}; goes on from {resumed_from or 'the start'}")
    return killed


def _saved_step(folder: RunFolder) -> int:
    try:
        checkpoint = runs.latest_checkpoint(folder)
    except CheckpointError:
        checkpoint = None
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))


def _expect(start: _Start, code: ExitCode) -> None:
    found = start.ended()
    start.end()
    if found == code:
        return
    log = _log_of(start.folder)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
    error = LMTrainError(
        f"{start.folder.root}: a start ended with exit code {found}, expected {int(code)}; the end of {log}:\n"
        + "\n".join(f"  {line}" for line in lines)
    )
    error.exit_code = ExitCode(found) if found in list(ExitCode) else ExitCode.BUG
    raise error


def _difference(straight: RunFolder, interrupted: RunFolder) -> str | None:
    """Where the runs part, in words; None where they do not."""
    found = ledger.compare(straight.ledger, interrupted.ledger)
    if found is not None:
        here, there = (
            f"{value or 'absent'} {part}" for part, value in zip((STRAIGHT, INTERRUPTED), found[2:], strict=True)
        )
        return f"step {found.step}: {found.key} {here}, {there}"
    one, other = _evaluations(straight), _evaluations(interrupted)
    for step, key in sorted(one.keys() | other.keys()):
        values = one.get((step, key)), other.get((step, key))
        if values[0] != values[1]:
            return f"step {step}: {key} {values[0]} {STRAIGHT}, {values[1]} {INTERRUPTED}"
    return None


def _evaluations(folder: RunFolder) -> dict[tuple[int, str], Any]:
    """Values of validations and of the test, by step and name."""
    rows = runs.read_jsonl(folder.metrics)
    return {(row["step"], key): row[key] for row in rows for key in row if key.startswith(("val/", "test/"))}


def _as_text(result: dict[str, Any], killed: Sequence[Killed]) -> str:
    head = ["kill", "of", "during", "after step", "resumed from", "lost steps", "seconds"]
    rows = [
        [
            str(i),
            k.target,
            k.phase,
            str(k.step),
            str(k.resumed_from),
            str(k.lost),
            "" if k.seconds is None else f"{k.seconds:.1f}",
        ]
        for i, k in enumerate(killed, start=1)
    ]
    s = "" if len(killed) == 1 else "s"
    verdict = (
        f"identical: {result['steps']:,} steps, {len(killed)} kill{s}"
        if result["difference"] is None
        else f"different: {result['difference']}"
    )
    return "\n".join([*aligned([head, *rows], left=3), verdict])


def _log_of(folder: RunFolder) -> Path:
    return folder.root.with_name(f"{folder.name}.log")


def _changed(file: Path) -> tuple[int, int] | None:
    """What differs after a file was written to or cut."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _below(process: int) -> list[int]:
    """All processes that this one has started, directly or not; on Linux, elsewhere none are found."""
    found = []
    try:
        children = " ".join(f.read_text() for f in Path(f"/proc/{process}/task").glob("*/children")).split()
    except OSError:
        return []
    for child in map(int, children):
        found += [child, *_below(child)]
    return found


def _ranks_of(supervisor: int) -> dict[int, int]:
    """Process ids of the ranks by their number."""
    found: dict[int, int] = {}
    for process in _below(supervisor):
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            rank = next((entry[5:] for entry in environment if entry.startswith(b"RANK=")), b"")
            if b"lm_train.rank" in _command(process) and rank.isdigit():
                found.setdefault(int(rank), process)  # what a rank starts has the same words
    return found


def _command(process: int) -> list[bytes]:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
