"""Where metrics go: metrics.jsonl of the run folder always, Weights & Biases as the recipe says."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import re
import shlex
import socket
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, WandbLogger

from lm_train.plan import Plan
from lm_train.recipe import Recipe
from lm_train.redaction import redacted, redacted_values
from lm_train.runs import RunFolder, write_atomically

REACH_TIMEOUT_S = 2.0
INIT_TIMEOUT_S = 4.0
"""With the offline start that follows under 10 s: what an unreachable W&B may delay the first step by."""
FINISH_TIMEOUT_S = 15.0
"""How long the end of a run waits for what W&B has not taken yet; the rest stays in its file."""
KEPT_ROWS = 10_000
"""Rows that wait in memory while metrics.jsonl cannot be written."""
RESERVED_ROWS = 1000


class MetricsFile(Logger):
    """One JSON object a line in the run folder. A disk that is full does not end the training: rows wait for room."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self._file = folder.metrics
        self._waiting: deque[bytes] = deque(maxlen=KEPT_ROWS)
        self._failed = False

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass  # recipe.yaml and plan.json hold them

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, **{k: v if math.isfinite(v) else str(v) for k, v in metrics.items()}}
        self._waiting.append((json.dumps(row) + "\n").encode())
        try:
            _append(self._file, b"".join(self._waiting))
        except OSError as error:
            if not self._failed:
                self._failed = True
                _say(f"{self._file}: {error.strerror}; the training goes on, rows wait for room there")
            return
        self._waiting.clear()

    def close(self) -> None:
        """Says what could not be written to the end."""
        if self._waiting:
            rows = len(self._waiting)
            _say(f"{self._file}: the last {rows} row{'s are' if rows > 1 else ' is'} missing: it could not be written")


class _Wandb(WandbLogger):
    """W&B without the power to end a run: its server may go away, and Slurm ends its service process with the ranks.

    Rows carry `trainer/global_step` and `trainer/start`, the number of the start of this run that wrote them. What was logged
    after the checkpoint that a later start went on from thus stands beside what that start logs again; of rows of one step the
    one of the latest start counts. W&B's own step only numbers the rows and rises over all starts, since W&B drops what does
    not rise, and segments written offline are sent in any order.

    Args:
        run: of wandb.
        position: of the run's rows.
        sync: the command that sends what was not sent.
        unsent: whether that is known already.
    """

    def __init__(self, run: Any, position: _Position, sync: str, unsent: bool) -> None:
        super().__init__(experiment=run)
        self.lost, self._unsent, self._out = False, unsent, sys.stderr
        self._position, self._sync = position, sync
        self._attempt(lambda: run.define_metric("trainer/global_step"))
        self._attempt(lambda: run.define_metric("*", step_metric="trainer/global_step", step_sync=True))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        marks = {"trainer/global_step": step, "trainer/start": self._position.start}
        row = {**metrics, **{key: value for key, value in marks.items() if value is not None}}
        self._attempt(lambda: self.experiment.log(row, step=self._position.next_row(), commit=True))

    def finish(self, exit_code: int) -> None:
        """Ends the W&B run. Waits for its service: without that two offline files were once found incomplete."""
        with contextlib.redirect_stderr(io.StringIO()):  # what it says of an outage we say in one line
            self._attempt(lambda: wandb_module().finish(exit_code=exit_code), last=True)
            self._attempt(wandb_module().teardown, last=True)
        self._position.leave()
        if self._unsent:
            _say(f"not all of this was sent to W&B; once it can be reached: {self._sync}")

    def _attempt(self, action: Callable[[], object], last: bool = False) -> None:
        if self.lost and not last:
            return
        try:
            action()
        except TimeoutError:
            self._unsent = True
        except Exception as error:  # of W&B's own families, which change
            if self.lost:
                return
            self.lost = self._unsent = True
            print(f"W&B's own process has ended ({_reason(error)}); metrics.jsonl has all rows", file=self._out)


class _Position:
    """Counts the starts of a run and its rows over all of them, in a file beside W&B's own.

    Rows are reserved many at a time, so that a start after a kill finds numbers that nobody has used.
    """

    def __init__(self, folder: RunFolder, at_least: int = 0) -> None:
        self._file = folder.wandb / "position.json"
        start, row = 0, 0
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            start, row = int(content["start"]), int(content["row"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # the first start, or a file that tells nothing
        self.start, self._row = start + 1, max(row, at_least)
        self._reserved = self._row
        self._reserve()

    def next_row(self) -> int:
        if self._row >= self._reserved:
            self._reserve()
        self._row += 1
        return self._row - 1

    def leave(self) -> None:
        """Gives back what was reserved and not used."""
        self._write(self._row)

    def _reserve(self) -> None:
        self._reserved = self._row + RESERVED_ROWS
        self._write(self._reserved)

    def _write(self, row: int) -> None:
        with contextlib.suppress(OSError):  # the count goes on in memory
            write_atomically(self._file, json.dumps({"start": self.start, "row": row}) + "\n")


@contextlib.contextmanager
def loggers(recipe: Recipe, plan: Plan, folder: RunFolder, rank: int) -> Iterator[list[Logger]]:
    """The run's loggers; W&B on rank 0 only, finished at the end however it comes."""
    metrics = MetricsFile(folder)
    result: list[Logger] = [metrics]
    wandb_logger = _wandb(recipe, plan, folder) if rank == 0 and recipe.tracking.wandb != "disabled" else None
    if wandb_logger is not None:
        result.append(wandb_logger)
    failed = True
    try:
        yield result
        failed = False
    finally:
        metrics.close()
        if wandb_logger is not None:
            wandb_logger.finish(int(failed))


def _wandb(recipe: Recipe, plan: Plan, folder: RunFolder) -> _Wandb | None:
    """W&B as the recipe says; offline where it cannot be reached; None where not even that can be started."""
    mode = recipe.tracking.wandb
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    try:
        problem = _unreachable() if mode == "online" else None
        run_id = _run_id(folder)
        if mode == "online" and problem is None:
            try:
                return _start(recipe, plan, folder, run_id, "online")
            except Exception as error:
                problem = _reason(error)
                wandb_module().teardown()  # its service still holds the run's id
        if problem is not None:
            _say(f"W&B is out of reach ({problem}); tracking offline")
        return _start(recipe, plan, folder, run_id, "offline", unsent=problem is not None)
    except Exception as error:
        _say(f"W&B cannot be started, not even offline ({_reason(error)}); metrics.jsonl has all rows")
        return None


def _start(
    recipe: Recipe,
    plan: Plan,
    folder: RunFolder,
    run_id: str,
    mode: Literal["online", "offline"],
    unsent: bool = False,
) -> _Wandb:
    wandb = wandb_module()
    section = recipe.tracking
    # console and metadata capture would copy what is on the screen and in argv; the recipe and the plan say it all
    settings = {
        "init_timeout": INIT_TIMEOUT_S,
        "finish_timeout": FINISH_TIMEOUT_S,  # without it the end of a run waits for an outage for ever
        "finish_timeout_raises": True,
        "console": "off",
        "silent": True,
        "disable_git": True,
        "x_disable_meta": True,
        "x_save_requirements": False,
    }
    config = {"recipe": recipe.model_dump(mode="json"), "plan": plan.model_dump(mode="json")}
    with contextlib.redirect_stderr(io.StringIO()):  # such as where it has its key from; what fails is an error
        run = wandb.init(
            id=run_id,
            name=folder.name,
            dir=str(folder.root),
            project=section.project,
            entity=section.entity,
            group=section.group,
            tags=list(section.tags),
            resume="allow" if mode == "online" else None,
            mode=mode,
            config=redacted_values(config),
            settings=wandb.Settings(
                **{key: value for key, value in settings.items() if key in wandb.Settings.model_fields}
            ),
        )
    files = "offline-run" if mode == "offline" else "run"
    options = "" if mode == "offline" else "--include-online "
    sync = f"wandb sync {options}{shlex.quote(str(folder.wandb))}/{files}-*-{run_id}"
    return _Wandb(run, _Position(folder, run.step), sync, unsent)


def _run_id(folder: RunFolder) -> str:
    """One W&B run for the life of a run folder: the id is drawn once and kept in the folder."""
    file = folder.wandb / "run_id"
    try:
        known = file.read_text(encoding="utf-8").strip()
        if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", known):  # it becomes part of a path
            return known
    except (FileNotFoundError, UnicodeDecodeError):
        pass
    drawn = uuid.uuid4().hex[:12]
    folder.wandb.mkdir(exist_ok=True)
    write_atomically(file, drawn + "\n")
    return drawn


def wandb_module() -> Any:
    """wandb, which takes a second to import, where it is used."""
    import wandb

    return wandb


def _append(file: Path, content: bytes) -> None:
    """Adds to a file all of it or nothing: half a row would spoil the next one.

    Raises:
        OSError: if there is no room for all of it.
    """
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, content)
        except OSError:
            os.ftruncate(descriptor, before)
            raise
        if written < len(content):
            os.ftruncate(descriptor, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return redacted(" ".join(str(error).split()) or type(error).__name__)[:200]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _unreachable() -> str | None:
    """Why the W&B server cannot be reached, found in a few seconds; wandb itself would try for 90."""
    url = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")):
        return None  # a proxy decides, and init_timeout guards
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
    except ValueError:
        return "WANDB_BASE_URL: its port is no number"
    answer: list[str | None] = []

    def ask() -> None:
        try:
            socket.create_connection((url.hostname or "", port), timeout=REACH_TIMEOUT_S).close()
            answer.append(None)
        except OSError as error:
            answer.append(f"{url.hostname}:{port}: {error.strerror or error}")

    asking = threading.Thread(target=ask, daemon=True)  # looking a name up has no timeout of its own
    asking.start()
    asking.join(REACH_TIMEOUT_S)
    return answer[0] if answer else f"{url.hostname}:{port}: no answer within {REACH_TIMEOUT_S:.0f} s"
