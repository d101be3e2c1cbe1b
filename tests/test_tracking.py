"""W&B: real offline files read back, one run for one folder, no secret in any file, an outage that costs seconds."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from lm_train import runs, tracking
from lm_train.runs import RunFolder, read_jsonl
from lm_train.train import train

NewRun = Callable[..., RunFolder]
SECRET = "canary-3f9c1b7e"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "WANDB_API_KEY",
        "WANDB_MODE",
        "WANDB_BASE_URL",
        "HTTPS_PROXY",
        "https_proxy",
        "HTTP_PROXY",
        "http_proxy",
    ):
        monkeypatch.delenv(name, raising=False)


def records(run: RunFolder) -> list[Any]:
    """Every record of every offline W&B file of the run, oldest file first."""
    found = []
    for file in sorted(run.wandb.glob("offline-run-*/*.wandb")):
        for data in log_entries(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            found.append(record)
    return found


def log_entries(content: bytes) -> Iterator[bytes]:
    """Entries of a .wandb file: a 7-byte header, then LevelDB's log format (blocks of 32 KiB, each piece of an entry with
    checksum, length and type: 1 full, 2 first, 3 middle, 4 last)."""
    assert content[:4] == b":W&B"
    at, entry = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # too little left in the block for another piece
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        entry = content[at + 7 : at + 7 + length] if kind in (1, 2) else entry + content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield entry


def history(found: list[Any]) -> list[dict[str, Any]]:
    rows = [record.history for record in found if record.WhichOneof("record_type") == "history"]
    return [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row.item} for row in rows]


def test_an_offline_run_holds_metrics_recipe_and_plan(new_run: NewRun) -> None:
    words = (
        "tracking={project: demo, group: trials, tags: [tiny, bytes]}",
        "tracking.wandb=offline",
        "trainer.max_steps=12",
    )
    run = new_run(*words, "trainer.val_check_interval=6", "trainer.log_every_n_steps=3")
    train(run)
    found = records(run)
    run_record = next(record.run for record in found if record.WhichOneof("record_type") == "run")
    assert (run_record.project, run_record.run_group, list(run_record.tags)) == ("demo", "trials", ["tiny", "bytes"])
    assert run_record.display_name == "run"
    assert run_record.run_id == (run.wandb / "run_id").read_text().strip()
    config = {item.key: json.loads(item.value_json) for item in run_record.config.update}
    assert config["recipe"]["model"]["n_embd"] == 64
    assert config["plan"]["micro_batch_size"] == 16
    ours = [row for row in read_jsonl(run.metrics) if "train/loss" in row]
    theirs = [row for row in history(found) if "train/loss" in row]
    assert [row["trainer/global_step"] for row in theirs] == [1, 3, 6, 9, 12]
    for mine, other in zip(ours, theirs, strict=True):
        assert other["train/loss"] == pytest.approx(mine["train/loss"])
        assert set(mine) - {"step"} <= set(other)
    assert [row["val/loss"] for row in history(found) if "val/loss" in row] == [
        pytest.approx(row["val/loss"]) for row in read_jsonl(run.metrics) if "val/loss" in row
    ]


def test_a_resumed_run_is_the_same_wandb_run(new_run: NewRun) -> None:
    words = ("tracking.wandb=offline", "trainer.max_steps=4")
    run = new_run(*words)
    train(run)
    train(new_run("tracking.wandb=offline", "trainer.max_steps=8"), runs.latest_checkpoint(run))
    ids = {r.run.run_id for r in records(run) if r.WhichOneof("record_type") == "run"}
    assert len(ids) == 1
    assert len(list(run.wandb.glob("offline-run-*"))) == 2


def test_secrets_of_the_environment_reach_no_file(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET * 3)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    run = new_run("tracking.wandb=offline", "trainer.max_steps=2")
    train(run)
    files = [file for file in run.root.rglob("*") if file.is_file()]
    assert len(files) > 8
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []


def test_disabled_writes_the_metrics_file_only(new_run: NewRun) -> None:
    run = new_run("tracking.wandb=disabled", "trainer.max_steps=2")
    train(run)
    assert not run.wandb.exists()
    assert len(list(read_jsonl(run.metrics))) == 3


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def accept() -> None:
            with contextlib.suppress(OSError):  # the server's end
                while True:
                    kept.append(server.accept())

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("outage", ["refused", "silent"])
def test_an_unreachable_server_costs_seconds_and_a_line(
    outage: str, silent_server: str, new_run: NewRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
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
    warning = [line for line in capfd.readouterr().err.splitlines() if "W&B" in line]
    assert len(warning) == 1
    assert "wandb sync" in warning[0]
    logged = [row["step"] for row in read_jsonl(run.metrics) if "train/loss" in row]
    files = sorted(str(file.relative_to(run.wandb)) for file in run.wandb.rglob("*.wandb"))
    kept = [row["trainer/global_step"] for row in history(records(run)) if "train/loss" in row]
    assert kept == logged == [1, 2, 3], files


def test_metrics_after_the_checkpoint_are_cut_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 10}\n{"step": 11}\n{"step": 12, "train/l')
    runs.cut_jsonl(file, 10)
    assert file.read_text() == '{"step": 1}\n{"step": 10}\n'


def test_an_infinite_value_stays_readable_json(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    tracking.MetricsFile(folder).log_metrics({"train/loss": float("nan")}, 3)
    assert json.loads(folder.metrics.read_text(), parse_constant=pytest.fail) == {"step": 3, "train/loss": "nan"}
