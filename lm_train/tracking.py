"""Where metrics go: metrics.jsonl of the run folder always, Weights & Biases as the recipe says."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, WandbLogger

from lm_train.plan import Plan
from lm_train.recipe import Recipe
from lm_train.runs import RunFolder

REACH_TIMEOUT_S = 2.0
INIT_TIMEOUT_S = 4.0
"""With the offline start that follows under 10 s: what an unreachable W&B may delay the first step by."""


class MetricsFile(Logger):
    """One JSON object a line in the run folder."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self._file = folder.metrics

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
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class _Wandb(WandbLogger):
    """W&B without the power to end a run: Slurm ends its service process together with the ranks, which still save."""

    lost = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._attempt(lambda: super(_Wandb, self).log_metrics(metrics, step))

    def finish(self, exit_code: int) -> None:
        """Ends the W&B run. Waits for its service: without that two offline files were once found incomplete."""
        import wandb

        self._attempt(lambda: wandb.finish(exit_code=exit_code))
        self._attempt(wandb.teardown)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self.lost:
            return
        try:
            action()
        except ConnectionError as error:
            self.lost = True
            print(f"W&B's own process has ended ({error}); metrics.jsonl has all rows", file=sys.stderr)


@contextlib.contextmanager
def loggers(recipe: Recipe, plan: Plan, folder: RunFolder, rank: int) -> Iterator[list[Logger]]:
    """The run's loggers; W&B on rank 0 only, finished at the end however it comes."""
    result: list[Logger] = [MetricsFile(folder)]
    wandb_logger = _wandb(recipe, plan, folder) if rank == 0 and recipe.tracking.wandb != "disabled" else None
    if wandb_logger is not None:
        result.append(wandb_logger)
    failed = True
    try:
        yield result
        failed = False
    finally:
        if wandb_logger is not None:
            wandb_logger.finish(int(failed))


def _wandb(recipe: Recipe, plan: Plan, folder: RunFolder) -> _Wandb:
    import wandb

    section = recipe.tracking
    mode = section.wandb
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    run_id = _run_id(folder)
    if mode == "online":
        problem = _unreachable()
        if problem is None:
            try:
                return _start(recipe, plan, folder, run_id, "online")
            except (wandb.errors.Error, OSError) as error:
                problem = str(error).splitlines()[0]
                wandb.teardown()  # its service still holds the run's id
        print(
            f"W&B is out of reach ({problem}); tracking offline. Later: wandb sync {folder.wandb}/offline-run-*-{run_id}",
            file=sys.stderr,
        )
    return _start(recipe, plan, folder, run_id, "offline")


def _start(recipe: Recipe, plan: Plan, folder: RunFolder, run_id: str, mode: Literal["online", "offline"]) -> _Wandb:
    import wandb

    section = recipe.tracking
    # console and metadata capture would copy what is on the screen and in argv; the recipe and the plan say it all
    settings = wandb.Settings(
        init_timeout=INIT_TIMEOUT_S,
        console="off",
        silent=True,
        disable_git=True,
        x_disable_meta=True,
        x_save_requirements=False,
    )
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
        config={"recipe": recipe.model_dump(mode="json"), "plan": plan.model_dump(mode="json")},
        settings=settings,
    )
    return _Wandb(experiment=run)


def _run_id(folder: RunFolder) -> str:
    """One W&B run for the life of a run folder: the id is drawn once and kept in the folder."""
    file = folder.wandb / "run_id"
    try:
        return file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        folder.wandb.mkdir(exist_ok=True)
        file.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
        return file.read_text(encoding="utf-8").strip()


def _unreachable() -> str | None:
    """Why the W&B server cannot be reached, found in a few seconds; wandb itself would try for 90."""
    url = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")):
        return None  # a proxy decides, and init_timeout guards
    port = url.port or (443 if url.scheme == "https" else 80)
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
