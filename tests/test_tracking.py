"""W&B: real offline files read back, one run for one folder, no secret in any file, an outage that costs seconds."""

from __future__ import annotations

import json
import resource
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
    rows = [row for row in history(records(run)) if "train/loss" in row]
    assert [row["trainer/global_step"] for row in rows] == [*range(1, 9)]
    assert [row["trainer/start"] for row in rows] == [1] * 4 + [2] * 4
    steps = [row.history.step.num for row in records(run) if row.WhichOneof("record_type") == "history"]
    assert steps == sorted(set(steps)), "W&B drops a row whose own step does not rise"


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


def test_metrics_after_the_checkpoint_are_cut_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 10}\n{"step": 11}\n{"step": 12, "train/l')
    runs.cut_jsonl(file, 10)
    assert file.read_text() == '{"step": 1}\n{"step": 10}\n'


def test_an_infinite_value_stays_readable_json(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    tracking.MetricsFile(folder).log_metrics({"train/loss": float("nan")}, 3)
    assert json.loads(folder.metrics.read_text(), parse_constant=pytest.fail) == {"step": 3, "train/loss": "nan"}


def test_a_full_disk_delays_rows_and_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path)
    file = tracking.MetricsFile(folder)
    file.log_metrics({"loss": 1.0}, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (folder.metrics.stat().st_size + 10, before[1]))
        for step in (2, 3, 4):
            file.log_metrics({"loss": 1.0}, step)
            assert folder.metrics.read_text() == '{"step": 1, "loss": 1.0}\n'  # no half row
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file.close()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "the training goes on" in said[0]
    assert "the last 3 rows are missing" in said[1]
    file.log_metrics({"loss": 1.0}, 5)
    file.close()
    assert [row["step"] for row in read_jsonl(folder.metrics)] == [1, 2, 3, 4, 5]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("written", [None, "{", '{"start": 3}', '{"start": "x", "row": []}', "[]"])
def test_rows_are_numbered_over_all_starts(written: str | None, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.wandb.mkdir()
    if written is not None:
        (folder.wandb / "position.json").write_text(written)
    first = tracking._Position(folder)
    numbers = [first.next_row() for _ in range(1500)]
    assert (first.start, numbers) == (1, list(range(1500)))
    killed = tracking._Position(folder)  # the first one has not left
    assert (killed.start, killed.next_row() > 1499) == (2, True)
    killed.leave()
    third = tracking._Position(folder, at_least=1)
    assert third.start == 3
    assert third.next_row() == 2001


@pytest.mark.parametrize("written", ["../../../etc/x", "a b", "", "x" * 100, "$(touch x)"])
def test_a_run_id_that_is_a_path_is_not_used(written: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.wandb.mkdir()
    (folder.wandb / "run_id").write_text(written)
    drawn = tracking._run_id(folder)
    assert drawn.isalnum()
    assert tracking._run_id(folder) == drawn
