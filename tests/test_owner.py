"""A run folder has one owner: who else comes is refused, and a claim whose holder is gone is taken over after proof."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lm_train import owner
from lm_train.errors import OutputError
from lm_train.owner import Owner
from lm_train.runs import RunFolder
from lm_train.slurm import Allocation
from tests.commands import ENDLESS, Command

HOLDER = """
import sys, time
from lm_train.owner import Owner
from lm_train.runs import RunFolder
from lm_train.errors import OutputError
for line in sys.stdin:
    try:
        with Owner(RunFolder(sys.argv[1]), None):
            print("held", flush=True)
            time.sleep(float(line))
    except OutputError as error:
        print(error, flush=True)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


@pytest.fixture
def other(run: RunFolder) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts other processes, each of which claims the folder for so many seconds whenever it is told to."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(run.root)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str], seconds: float) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{seconds}\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def allocation(job: str = "12", restart: int = 0) -> Allocation:
    return Allocation(job, "0", 1, 1, 0, 0, "n1", restart_count=restart)


def claim(run: RunFolder) -> dict[str, Any]:
    return json.loads((run.root / ".owner").read_text())


def test_a_folder_has_one_owner_and_a_killed_one_frees_it_at_once(
    run: RunFolder, other: Callable[[], subprocess.Popen[str]]
) -> None:
    holder = other()
    tell(holder, 60)
    assert answer(holder) == "held"
    who = rf"is at work already .process {holder.pid} on {re.escape(socket.gethostname())}."
    for _ in range(3):
        began = time.monotonic()
        with pytest.raises(OutputError, match=who) as caught:
            Owner(run, allocation())
        assert caught.value.exit_code == 73
        assert time.monotonic() - began < 1
    holder.kill()
    holder.wait()
    with Owner(run, allocation()):
        assert claim(run)["who"].startswith("Slurm job 12, process ")


def test_of_two_starts_at_once_one_has_it(run: RunFolder, other: Callable[[], subprocess.Popen[str]]) -> None:
    both = [other(), other()]
    for seconds in [0.0] * 10:
        for process in both:
            tell(process, seconds + 0.02)
        found = [answer(process) for process in both]
        assert "held" in found, found
        assert all(text == "held" or "is at work already" in text for text in found)


def test_a_requeued_job_waits_for_its_earlier_start(run: RunFolder) -> None:
    first = Owner(run, allocation())
    threading.Timer(0.5, first.__exit__).start()
    began = time.monotonic()
    with Owner(run, allocation(restart=1)):
        assert time.monotonic() - began > 0.4


# a claim whose lock says otherwise than its holder's fate


def left(run: RunFolder, **changes: object) -> Any:
    """A claim of this process as it says of itself, changed; and its lock, as a file server keeps one."""
    with Owner(run, None):
        text = claim(run) | changes
    file = (run.root / ".owner").open("w")
    file.write(json.dumps(text))
    file.flush()
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


@pytest.mark.parametrize(
    ("changes", "age", "gone"),
    [
        ({}, 0, False),
        ({"began": "1"}, 0, True),  # the number is another process' now
        ({"pid": 2**22 + 1}, 0, True),
        ({"boot": "another"}, 0, True),
        ({"host": "elsewhere"}, 5, False),
        ({"host": "elsewhere"}, 55, False),
        ({"host": "elsewhere"}, 65, True),
    ],
)
def test_a_lock_is_taken_over_only_with_proof(run: RunFolder, changes: dict[str, object], age: int, gone: bool) -> None:
    kept = left(run, **changes)
    before = time.time() - age
    os.utime(run.root / ".owner", (before, before))
    if not gone:
        with pytest.raises(OutputError, match="is at work already"):
            Owner(run, None)
        return
    with Owner(run, None):
        assert claim(run)["pid"] == os.getpid()
        with pytest.raises(OutputError, match=f"process {os.getpid()} on "):
            Owner(run, None)
    assert [file.name for file in run.root.iterdir()] == [".owner"]
    kept.close()


def test_a_file_system_without_locks_is_guarded_by_what_the_file_says(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "_lock", lambda file: None)
    monkeypatch.setattr(owner, "SETTLE_S", 0.05)
    with Owner(run, None), pytest.raises(OutputError, match=f"process {os.getpid()} on "):
        Owner(run, None)
    with Owner(run, None):
        pass
    left(run, began="1").close()
    with Owner(run, None):
        pass


def test_slurm_knows_which_jobs_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def says(script: str) -> bool:
        (tmp_path / "squeue").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "squeue").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return owner._slurm_has_ended("7")

    assert not says("echo RUNNING")
    assert not says("echo COMPLETING")
    assert says("echo CANCELLED")
    assert says("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    assert not says("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1")


@pytest.mark.slow
def test_fifty_second_starts_are_refused_in_five_seconds_each(tmp_path: Path, text_file: Path) -> None:
    words = (f"data.path={text_file}", "name=run", *ENDLESS)
    first = Command(tmp_path, words)
    try:
        first.wait_for_steps()
        for _ in range(50):
            began = time.monotonic()
            second = Command(tmp_path, words)
            code, _, err = second.end()
            assert time.monotonic() - began < 5
            assert code == 73, err
            assert f"is at work already (process {first.process.pid} on " in err
        assert first.process.poll() is None
    finally:
        first.clean()
