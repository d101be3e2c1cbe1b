"""Whole runs on prepared shards, by the command line: killed and gone on with, damaged, cut off from their server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lm_train.runs import read_jsonl
from tests.shard_folders import make_folder
from tests.test_remote_shards import Server

WORDS = {
    "recipe": "gpt_debug",
    "model": "{kind: gpt, n_layer: 1, n_head: 2, n_embd: 32, block_size: 16}",
    "trainer.max_steps": "30",
    "trainer.log_every_n_steps": "5",
    "trainer.val_check_interval": "null",
    "trainer.limit_val_batches": "2",
    "trainer.sample_tokens": "0",
    "checkpoint.every_n_steps": "10",
    "tracking.wandb": "disabled",
    "name": "run",
}
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., list[str]]:
    make_folder(tmp_path / "prepared", n_shards=3, documents=400)

    def words(verb: str, data: str = "", **given: Any) -> list[str]:
        path = given.pop("path", tmp_path / "prepared")
        asked = WORDS | {
            "data": f"{{kind: shards, path: '{path}', global_batch_size: 12{data}}}",
            "runs_dir": str(tmp_path / "runs"),
            **{key.replace("__", "."): value for key, value in given.items()},
        }
        return [sys.executable, "-m", "lm_train", verb, *(f"{key}={value}" for key, value in asked.items())]

    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    return words


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "devices", "model"),
    [
        ("", 2, "gpt"),
        (", document_boundaries: true, num_workers: 2", 2, "llama"),
        (", document_boundaries: true", 1, "recurrent"),
        (", num_workers: 2", 3, "gpt"),
    ],
)
def test_a_killed_run_has_the_ledger_of_the_undisturbed_one(
    data: str, devices: int, model: str, command: Callable[..., list[str]]
) -> None:
    sizes = {
        "gpt": WORDS["model"],
        "llama": "{kind: llama, n_layer: 1, n_head: 2, n_embd: 32, block_size: 16}",
        "recurrent": "{kind: recurrent, cell: lstm, n_layer: 1, n_embd: 16, hidden_size: 16, block_size: 16}",
    }
    words = command("verify-resume", data, trainer__devices=devices, model=sizes[model])
    done = run([*(word for word in words if not word.startswith("name=")), "kills=2"])
    assert done.returncode == 0, done.stderr
    assert "identical" in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_damage_ends_the_run_with_a_line_or_is_passed_over_and_counted(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    file = tmp_path / "prepared/train-00001.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    stopped = run(command("train", trainer__devices=2))
    assert stopped.returncode == 66, stopped.stderr
    assert f"{file}: bytes 0 to" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    skipped = run(command("train", ", on_damage: skip", trainer__devices=2, name="skips"))
    assert skipped.returncode == 0, skipped.stderr
    counted = [
        row["data/replaced"] for row in read_jsonl(tmp_path / "runs/skips/metrics.jsonl") if "data/replaced" in row
    ]
    assert counted == sorted(counted)
    assert counted[-1] > 0
    assert f"{int(counted[-1]):,} samples stood in damaged parts" in skipped.stderr


@pytest.mark.slow
def test_a_server_that_dies_ends_the_run_with_a_line(command: Callable[..., list[str]], tmp_path: Path) -> None:
    server = Server(tmp_path / "prepared")
    try:
        first = run(command("train", path=server.url, trainer__devices=2))
        assert first.returncode == 0, first.stderr
    finally:
        server.stop()
    began = time.monotonic()
    dead = run(command("train", path=server.url, name="dead"))
    assert dead.returncode == 66, dead.stderr
    assert "out of reach after 6 tries" in dead.stderr
    assert time.monotonic() - began < 60


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_loader_process_that_is_lost_asks_for_a_new_start(
    number: signal.Signals, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    words = command("train", ", num_workers: 1", trainer__devices=2, trainer__max_steps=100_000)
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            metrics = tmp_path / "runs/run/metrics.jsonl"
            until = time.monotonic() + 120
            while not (metrics.exists() and len(list(read_jsonl(metrics))) > 2) and time.monotonic() < until:
                time.sleep(0.1)
            worker = _workers(process.pid)[0]
            os.kill(worker, number)
            began = time.monotonic()
            _, said = process.communicate(timeout=120)
            assert time.monotonic() - began < 45
        finally:
            process.kill()
    assert process.returncode == 75, said
    assert f"(process {worker})" in said
    # stopped in the midst of handing over a batch, it holds the rank itself, which only the watchdog sees from outside
    assert "loader worker 0" in said or (number == signal.SIGSTOP and "is stopped (SIGSTOP)" in said)


def _workers(supervisor: int) -> list[int]:
    """Children of the ranks that are Python processes forked from them."""

    def children(process: int) -> list[int]:
        tasks = Path(f"/proc/{process}/task").glob("*/children")  # each thread has its own
        return [int(child) for task in tasks for child in task.read_text().split()]

    ranks = children(supervisor)
    return [child for rank in ranks for child in children(rank)]
