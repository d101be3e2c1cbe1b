"""When a run is given up: starts in vain are counted in its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lm_train import restarts
from lm_train.errors import ExitCode, NoProgressError
from lm_train.failures import Report
from lm_train.runs import RunFolder

LOST = Report(1, 75, "was ended by SIGKILL", step=50)
CRASH = Report(1, 75, "was ended by SIGSEGV, a crash in compiled code, called at a.py:7 in f", step=50)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def start(
    run: RunFolder, step: int, saved: int, code: int | None = 75, failure: Report | None = LOST, changed: bool = False
) -> str | None:
    """One start from the checkpoint at `step` that ends, unless `code` is None, with a checkpoint at `saved`."""
    begun = restarts.begin(run, step, 3, changed)
    return None if code is None else restarts.end(run, begun, code, failure, saved, 3)


def test_three_more_starts_are_allowed_from_the_same_checkpoint(run: RunFolder) -> None:
    assert [start(run, 40, 40) for _ in range(3)] == [None] * 3
    said = start(run, 40, 40)
    assert said is not None
    assert (
        "4 starts from step 40 without a new checkpoint; the last: rank 1: was ended by SIGKILL. Not started again"
        in said
    )
    with pytest.raises(NoProgressError, match="restarts_without_progress=null") as caught:
        start(run, 40, 40)
    assert caught.value.exit_code == 76
    assert restarts.begin(run, 40, None, changed=False).number == 5
    run.starts.unlink()
    assert start(run, 40, 40) is None


def test_progress_and_a_changed_recipe_begin_anew(run: RunFolder) -> None:
    for step in (0, 0, 0):
        assert start(run, step, 0) is None
    assert start(run, 0, 20) is None
    for _ in range(3):
        assert start(run, 20, 20) is None
    assert start(run, 20, 20, changed=True) is None
    assert start(run, 20, 20) is None


def test_the_same_failure_at_the_same_step_is_given_up_at_once(run: RunFolder) -> None:
    assert start(run, 40, 40, failure=CRASH) is None
    said = start(run, 40, 40, failure=CRASH._replace(rank=1))
    assert said is not None
    assert "twice the same failure after step 50, from step 40; the last: rank 1: was ended by SIGSEGV" in said


@pytest.mark.parametrize(
    "other",
    [
        CRASH._replace(step=51),
        CRASH._replace(message="was ended by SIGBUS"),
        Report(1, 75, "hangs: no progress for 26 s; it is stopped (SIGSTOP)", step=50),
    ],
)
def test_other_failures_are_counted_only(run: RunFolder, other: Report) -> None:
    assert start(run, 40, 40, failure=CRASH) is None
    assert start(run, 40, 40, failure=other) is None
    assert start(run, 40, 40, failure=LOST) is None
    assert start(run, 40, 40, failure=LOST) is not None


def test_how_long_a_rank_stood_still_makes_no_other_failure(run: RunFolder) -> None:
    for seconds, ended in ((26, False), (27, True)):
        hangs = Report(0, 75, f"hangs: no progress for {seconds} s; at a.py:7 in f", step=50)
        assert (start(run, 40, 40, failure=hangs) is not None) is ended


def test_starts_that_end_without_a_word_count_too(run: RunFolder) -> None:
    for _ in range(4):
        start(run, 0, 0, code=None)
    with pytest.raises(NoProgressError, match=r"4 starts from the beginning .* as when its node is lost"):
        start(run, 0, 0)


def test_a_run_that_is_preempted_has_more_patience_and_ctrl_c_does_not_count(run: RunFolder) -> None:
    for _ in range(20):
        assert start(run, 0, 0, code=ExitCode.INTERRUPTED, failure=None) is None
    said = [start(run, 0, 0, failure=None) for _ in range(11)]
    assert said[:-1] == [None] * 10
    assert said[-1] is not None
    assert "a signal stopped it before it could save anything new" in said[-1]


def test_a_file_that_was_cut_is_read_as_far_as_it_goes(run: RunFolder) -> None:
    start(run, 0, 0)
    run.starts.write_text(run.starts.read_text() + json.dumps({"start": "x"}) + '\n{"start": 2, "ev')
    assert [(found.number, found.code) for found in restarts.read(run)] == [(1, 75)]
    assert start(run, 0, 0) is None
