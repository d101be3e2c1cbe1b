"""Batches that a thread makes ahead: the same ones, errors in their place, and no thread left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from torch.utils.data import Dataset

from lm_train.data import Batch
from lm_train.data.loading import TimedLoader, made_ahead, make_loader
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
