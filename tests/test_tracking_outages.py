"""W&B that cannot be reached, goes away, or comes back: seconds and a line, and no row is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest

from lm_train import runs, tracking
from lm_train.runs import RunFolder, read_jsonl
from lm_train.train import train
from tests.test_tracking import history, records
from tests.wandb_server import WandbServer

NewRun = Callable[..., RunFolder]
KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT_S", 1.0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as started:
        monkeypatch.setenv("WANDB_BASE_URL", started.url)
        yield started


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kept = []

        def accept() -> None:
            with contextlib.suppress(OSError):  # the server's end
                while True:
                    kept.append(listener.accept())

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


class At(L.Callback):
    """Does something once, at the end of a step."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.action()


def losses(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(row["trainer/global_step"], row["train/loss"]) for row in rows if "train/loss" in row]


def steps_in(file: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(file) if "train/loss" in row]


def sync(command: str) -> None:
    """Carries out what a person is told to."""
    program = f"{sys.executable} -m {command}"
    subprocess.run(["bash", "-c", program], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("outage", ["refused", "silent"])
def test_an_unreachable_server_costs_seconds_and_a_line(
    outage: str, silent_server: str, new_run: NewRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", silent_server if outage == "silent" else "http://127.0.0.1:9")
    run = new_run("tracking.wandb=auto", "trainer.max_steps=3")
    starts: list[float] = []
    real = tracking._wandb

    def timed(*args: Any) -> Any:
        began = time.monotonic()
        logger = real(*args)
        starts.append(time.monotonic() - began)
        return logger

    monkeypatch.setattr(tracking, "_wandb", timed)
    train(run)
    assert starts[0] <= 10
    said = [line for line in capfd.readouterr().err.splitlines() if "W&B" in line or "wandb" in line]
    assert len(said) == 2, said
    assert "out of reach" in said[0]
    assert said[1].endswith(f"wandb sync {run.wandb}/offline-run-*-{(run.wandb / 'run_id').read_text().strip()}")
    files = sorted(str(file.relative_to(run.wandb)) for file in run.wandb.rglob("*.wandb"))
    assert [step for step, _ in losses(history(records(run)))] == steps_in(run.metrics) == [1, 2, 3], files


def test_a_server_that_goes_away_costs_a_line_and_no_row(
    server: WandbServer, new_run: NewRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = new_run("tracking.wandb=online", "trainer.max_steps=12")
    began = time.monotonic()
    train(run, callbacks=[At(6, server.die)])
    assert time.monotonic() - began < 30
    assert steps_in(run.metrics) == [*range(1, 13)]
    said = [line for line in capfd.readouterr().err.splitlines() if "W&B" in line or "wandb" in line.lower()]
    assert len(said) == 1, said
    assert "not all of this was sent" in said[0]
    with WandbServer() as later:
        monkeypatch.setenv("WANDB_BASE_URL", later.url)
        sync(said[0][said[0].index("wandb sync") :])
        (told,) = later.runs.values()
    assert losses(told.history) == [
        (row["step"], row["train/loss"]) for row in read_jsonl(run.metrics) if "train/loss" in row
    ]


def test_w_and_bs_own_process_may_be_killed(
    server: WandbServer, new_run: NewRun, capfd: pytest.CaptureFixture[str]
) -> None:
    """As Slurm does with the processes of a step while the ranks still save."""

    def kill() -> None:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        cores = [int(pid) for pid in children if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(cores) == 1
        os.kill(cores[0], signal.SIGKILL)

    run = new_run("tracking.wandb=online", "trainer.max_steps=12")
    train(run, callbacks=[At(4, kill)])
    assert steps_in(run.metrics) == [*range(1, 13)]
    said = [line for line in capfd.readouterr().err.splitlines() if "W&B" in line]
    assert [("own process has ended" in said[0], "not all of this was sent" in said[1])] == [(True, True)], said


def test_all_starts_are_one_run_and_rows_after_the_checkpoint_are_marked(server: WandbServer, new_run: NewRun) -> None:
    """Online to step 6 with a checkpoint at 4, offline from there to 8, online to 10; then what was offline is sent."""
    run = new_run(
        "tracking.wandb=online", "trainer.max_steps=6", "checkpoint.every_n_steps=4", "checkpoint.keep_last=9"
    )
    train(run)
    back = run.checkpoints / "step-4"
    runs.cut_jsonl(run.metrics, 4)
    train(new_run("tracking.wandb=offline", "trainer.max_steps=8"), back)
    train(new_run("tracking.wandb=online", "trainer.max_steps=10"), runs.latest_checkpoint(run))
    (told,) = server.runs.values()
    assert told.id == (run.wandb / "run_id").read_text().strip()
    sync(f"wandb sync {run.wandb}/offline-run-*-{told.id}")
    assert [*server.runs] == [told.id]
    rows = [row for row in told.history if "train/loss" in row]
    seen = sorted((row["trainer/start"], row["trainer/global_step"]) for row in rows)
    assert seen == [(1, s) for s in range(1, 7)] + [(2, s) for s in range(5, 9)] + [(3, s) for s in (9, 10)]
    own_steps = [row["_step"] for row in told.history]
    assert len(set(own_steps)) == len(own_steps), "two rows of one number: W&B would keep one of them"
    latest = {
        row["trainer/global_step"]: row["train/loss"] for row in sorted(rows, key=lambda row: row["trainer/start"])
    }
    assert sorted(latest.items()) == [
        (r["step"], r["train/loss"]) for r in read_jsonl(run.metrics) if "train/loss" in r
    ]
    assert not any(KEY.encode() in body for body in server.bodies)
