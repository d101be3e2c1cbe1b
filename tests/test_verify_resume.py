"""`lm-train verify-resume`: real runs, real kills, and a comparison that sees what differs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lm_train import ledger, verify_resume
from lm_train.errors import ExitCode, UsageError
from lm_train.ledger import Row
from lm_train.runs import RunFolder

TEXT = (
    "recipe=gpt_debug",
    "data.tokenizer=bytes",
    "data.global_batch_size=8",
    "trainer.max_steps=40",
    "trainer.val_check_interval=15",
    "trainer.limit_val_batches=2",
    "trainer.sample_tokens=0",
)
GPT = "model={kind: gpt, n_layer: 2, n_head: 2, n_embd: 32, block_size: 16, dropout: 0.1}"
TIMEOUT_S = 1500


def command(tmp_path: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "lm_train", "verify-resume", *words, "name=run", f"runs_dir={tmp_path}"]


def verified(tmp_path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and what was found."""
    done = subprocess.run(command(tmp_path, *words, "format=json"), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.stdout.count("\n") == 1, f"{done.stdout}\n{done.stderr}"
    return done.returncode, json.loads(done.stdout)


def test_two_ranks_with_two_kills(tmp_path: Path, cache: Path, text_file: Path) -> None:
    code, found = verified(tmp_path, *TEXT, GPT, f"data.path={text_file}", "trainer.devices=2", "kills=2")
    assert code == 0, found
    assert found["identical"] is True
    assert found["steps"] == 40
    assert len(found["kills"]) == 2
    for kill in found["kills"]:
        assert kill["target"] in ("rank 0", "rank 1", verify_resume.EVERYTHING)
        assert 0 <= kill["resumed_from"] <= kill["step"] < 40
    folders = [RunFolder(found[part]) for part in (verify_resume.STRAIGHT, verify_resume.INTERRUPTED)]
    assert folders[0].ledger.read_bytes() == folders[1].ledger.read_bytes()
    assert [row.step for row in ledger.read(folders[0].ledger)] == list(range(1, 41))
    assert found["kills"][0]["resumed_from"] > 0 or found["kills"][1]["resumed_from"] > 0


IMAGES = (
    "recipe=cnn_digits",
    "model={kind: resnet, stem: 4, channels: [4, 8], blocks: [1, 0]}",
    "data={kind: images, global_batch_size: 16, crop: 1}",
    "trainer.max_steps=30",
    "trainer.val_check_interval=10",
    "trainer.limit_val_batches=2",
)
LSTM = "model={kind: recurrent, cell: lstm, n_layer: 2, n_embd: 16, hidden_size: 32, block_size: 16, dropout: 0.1}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        pytest.param((*TEXT, GPT), id="single"),
        pytest.param((*TEXT, GPT, "trainer.devices=2", "trainer.strategy=fsdp"), id="fsdp"),
        pytest.param((*TEXT, GPT, "trainer.devices=2", "trainer.strategy=zero2"), id="zero2"),
        pytest.param((*TEXT, GPT, "trainer.devices=2", "data.num_workers=2"), id="workers"),
        pytest.param((*TEXT, GPT, "trainer.devices=2", "trainer.accumulate_grad_batches=2"), id="accumulation"),
        pytest.param((*TEXT, LSTM, "trainer.devices=2"), id="lstm"),
        pytest.param((*IMAGES, "trainer.devices=2"), id="images"),
    ],
)
def test_whatever_is_trained(words: tuple[str, ...], tmp_path: Path, cache: Path, text_file: Path) -> None:
    data = (f"data.path={text_file}",) if words[: len(TEXT)] == TEXT else ()
    code, found = verified(tmp_path, *words, *data, "kills=2", "kill_seed=1")
    assert (code, found["identical"]) == (0, True), found
    assert len(found["kills"]) == 2


def folder_with(root: Path, rows: list[Row], *metrics: dict[str, Any]) -> RunFolder:
    folder = RunFolder(root)
    folder.root.mkdir()
    ledger.append(folder.ledger, rows)
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return folder


def test_what_differs_is_said(tmp_path: Path) -> None:
    rows = [Row.of(step, None, 1.0, 2.0, 1e-3) for step in (1, 2, 3)]
    one = folder_with(tmp_path / "a", rows, {"step": 2, "val/loss": 0.5, "perf/step_seconds": 1.0})
    same = folder_with(tmp_path / "b", rows, {"step": 2, "val/loss": 0.5, "perf/step_seconds": 2.0})
    late = folder_with(tmp_path / "c", rows, {"step": 2, "val/loss": 0.5000001})
    short = folder_with(tmp_path / "d", rows[:2])
    other = folder_with(tmp_path / "e", [*rows[:2], rows[2]._replace(loss="0x1.000002p+0")])
    assert verify_resume._difference(one, same) is None
    assert verify_resume._difference(one, late) == "step 2: val/loss 0.5 straight, 0.5000001 interrupted"
    assert verify_resume._difference(one, short) == "step 3: step present straight, absent interrupted"
    assert verify_resume._difference(one, other) == "step 3: loss 0x1.0p+0 straight, 0x1.000002p+0 interrupted"


@pytest.mark.slow
def test_a_recipe_that_no_seed_decides_is_found_out(tmp_path: Path, cache: Path) -> None:
    """A network that adds what the system draws: the check must be able to fail."""
    words = (
        'model={kind: custom, factory: "tests.custom_parts:undecided"}',
        'data={kind: custom, factory: "tests.custom_parts:points", global_batch_size: 4, micro_batch_size: 4, '
        "task: classification}",
        "plugins=tests", "optim={kind: sgd, learning_rate: 0.1}", "recipe=gpt_debug", "trainer.max_steps=12",
        "trainer.val_check_interval=null",
    )  # fmt: skip
    code, found = verified(tmp_path, *words, "kills=1")
    assert code == ExitCode.BUG
    assert found["identical"] is False
    assert "step 1: loss" in found["difference"]


def test_points_are_seeded_and_follow_one_another() -> None:
    points = verify_resume._points(10, 3, 200, 4)
    assert points == verify_resume._points(10, 3, 200, 4)
    assert points != verify_resume._points(10, 4, 200, 4)
    assert [p.step for p in points] == sorted(p.step for p in points)
    assert all(1 <= p.step < 200 and 0 <= p.delay < 1 for p in points)
    assert {p.rank for p in verify_resume._points(200, 0, 1000, 2)} == {0, 1, None}
    assert len(verify_resume._points(5, 0, 2, 1)) == 5


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("kills=0",), "kills: expected a whole number from 1"),
        (("kills=many",), "kills: expected"),
        (("kill_seed=-1",), "kill_seed: expected"),
        (("format=xml",), "format: expected"),
        (("resume=never",), "drop it"),
        (("dry_run=true",), "drop it"),
        (("debug=true",), "drop it"),
        (("trainer.max_steps=auto", "budget.hours=1"), "depends on the clock"),
        (("trainer.max_stepz=3",), "max_steps"),
        (("name=there",), "is there already"),
    ],
)
def test_what_cannot_be_verified_is_refused(
    words: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there-straight").mkdir()
    (tmp_path / "there-straight" / "recipe.yaml").touch()
    with pytest.raises(UsageError, match=says):
        verify_resume.verify_resume(["recipe=gpt_debug", f"runs_dir={tmp_path}", *words])
    assert [path.name for path in tmp_path.iterdir()] == ["there-straight"]


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, cache: Path, text_file: Path) -> None:
    words = [word for word in TEXT if not word.startswith("trainer.max_steps")]
    words += [GPT, f"data.path={text_file}", "trainer.devices=2", "trainer.max_steps=100000"]
    process = subprocess.Popen(command(tmp_path, *words), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    started: set[int] = set()
    try:
        deadline = time.monotonic() + 60
        while len(verify_resume._ranks_of(process.pid)) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        started = set(verify_resume._below(process.pid))
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == ExitCode.INTERRUPTED
        deadline = time.monotonic() + 10
        while any(alive(pid) for pid in started):
            assert time.monotonic() < deadline, [pid for pid in started if alive(pid)]
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()
        for pid in filter(alive, started):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
