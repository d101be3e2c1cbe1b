"""Batches that a thread makes ahead: the same ones, errors in their place, and no thread left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from lm_train.data import Batch, loading
from lm_train.data.loading import TimedLoader, WorkerLost, made_ahead, make_loader
from lm_train.errors import DataError, ExitCode, StopRequested
from tests.text_data import plan_of


class Numbers(Dataset[Batch]):
    """Ten batches; what stands at `fault` is raised instead."""

    def __init__(self, fault: int = -1, error: BaseException | None = None) -> None:
        self.fault, self.error = fault, error
        self.made: list[int] = []

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Batch:
        if self.error is not None and index == self.fault:
            raise self.error
        self.made.append(index)
        return {"number": index}


def ahead(numbers: Numbers) -> Iterator[Batch]:
    return iter(TimedLoader(make_loader(numbers, plan_of(), 0), ahead=True))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_the_same_batches_and_then_the_end() -> None:
    assert [batch["number"] for batch in ahead(Numbers())] == list(range(10))
    assert not threads()
    assert not list(made_ahead(iter([])))


@pytest.mark.parametrize("error", [DataError("row 7: broken"), StopRequested(ExitCode.REQUEUE), OSError("disk")])
def test_an_error_comes_at_its_batch(error: BaseException) -> None:
    batches = ahead(Numbers(4, error))
    assert [next(batches)["number"] for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(type(error), match=str(error)):
        next(batches)
    assert not threads()


def test_a_loop_that_ends_early_leaves_no_thread() -> None:
    numbers = Numbers()
    batches = ahead(numbers)
    next(batches)
    assert len(threads()) == 1
    batches.close()
    assert not threads()
    assert len(numbers.made) <= 4, "only a little ahead"


THREADS = """
import torch
from lm_train.data.loading import made_ahead
list(made_ahead(iter([{"total": 1.0}])))
print(torch.get_num_threads())
"""


def test_the_threads_of_the_step_stay_as_many() -> None:
    """In a process of its own: torch asks for the number once, at the first operation that could use several threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    found = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["2"]


class Slow(Numbers):
    """From batch 4 on waits until it is let go."""

    def __init__(self, gate: Path) -> None:
        super().__init__()
        self.gate = gate

    def __getitem__(self, index: int) -> Batch:
        while index >= 4 and not self.gate.exists():
            time.sleep(0.01)
        return {"number": index, "process": os.getpid()}


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "LOOK_S", 0.2)


def first_batches(gate: Path, patience: float | None = 60.0) -> tuple[Iterator[Batch], list[int]]:
    """The batches after the first four of two workers, and the workers' processes in their order."""
    batches = iter(TimedLoader(make_loader(Slow(gate), plan_of(workers=2), 2), patience=patience))
    return batches, [next(batches)["process"] for _ in range(4)][:2]


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_worker_ends_the_wait_with_its_name(number: int, tmp_path: Path, quick_looks: None) -> None:
    batches, processes = first_batches(tmp_path / "gate")
    os.kill(processes[number], signal.SIGKILL)
    (tmp_path / "gate").touch()
    began = time.monotonic()
    with pytest.raises(
        WorkerLost, match=rf"^loader worker {number} \(process {processes[number]}\) of rank 0 on .* by SIGKILL"
    ) as lost:
        list(batches)
    assert time.monotonic() - began < 10
    assert lost.value.exit_code == ExitCode.REQUEUE


def test_nothing_is_raised_in_the_midst_of_a_step(tmp_path: Path, quick_looks: None) -> None:
    """torch's own handler raises wherever the main thread is when a worker dies."""
    batches, processes = first_batches(tmp_path / "gate")
    os.kill(processes[0], signal.SIGKILL)
    (tmp_path / "gate").touch()
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        time.sleep(0.01)
    with pytest.raises(WorkerLost):
        list(batches)


def test_a_stopped_worker_ends_the_wait_with_its_name(tmp_path: Path, quick_looks: None) -> None:
    batches, processes = first_batches(tmp_path / "gate")
    os.kill(processes[1], signal.SIGSTOP)
    (tmp_path / "gate").touch()
    with pytest.raises(WorkerLost, match=rf"^loader worker 1 \(process {processes[1]}\) .* was stopped from outside$"):
        list(batches)


def test_a_worker_that_gives_nothing_ends_the_wait_and_a_slow_one_does_not(tmp_path: Path, quick_looks: None) -> None:
    batches, processes = first_batches(tmp_path / "a", patience=0.5)
    threading.Timer(1.5, (tmp_path / "a").touch).start()
    with pytest.raises(
        WorkerLost, match=rf"^loader worker 0 \(process {processes[0]}\) .* gave no batch for \d s; it was"
    ):
        list(batches)
    batches, _ = first_batches(tmp_path / "gate", patience=None)
    threading.Timer(0.5, (tmp_path / "gate").touch).start()
    assert [batch["number"] for batch in batches] == [4, 5, 6, 7, 8, 9]
