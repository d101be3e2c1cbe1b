"""Ranks that die or stand still: real processes, named from outside with what they were at, and the run ended for a requeue."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lm_train import heartbeat, watchdog
from lm_train.heartbeat import Board, Phase
from lm_train.watchdog import Sight, Watchdog, at_fault
from tests import faulty_parts
from tests.commands import ENDLESS, Command

PAIR = ("trainer.devices=2", *ENDLESS)
Launch = Callable[..., Command]


@pytest.fixture
def launch(tmp_path: Path, text_file: Path) -> Iterator[Launch]:
    started = []

    def start(*words: str) -> Command:
        command = Command(tmp_path, (f"data.path={text_file}", "name=run", *words))
        started.append(command)
        return command

    yield start
    for command in started:
        command.clean()


def said(err: str) -> str:
    """The one line of a failure."""
    lines = [line for line in err.splitlines() if line.startswith("lm-train: rank")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


# which rank holds the others up


def sight(rank: int, progress: tuple[int, int], silent: float, **more: object) -> Sight:
    return Sight(rank, "step", *progress, silent, **({"patience": 26.0} | more))  # type: ignore[arg-type]


def names(*sights: Sight) -> list[int]:
    return [found.rank for found in watchdog.at_fault(sights, 26)] if watchdog.stands_still(sights, 26) else []


def test_the_rank_at_fault_is_the_one_that_the_others_wait_for() -> None:
    waits = {"waits": True}
    assert names(sight(0, (7, 2), 25), sight(1, (7, 2), 25)) == []
    assert names(sight(0, (7, 2), 27, **waits), sight(1, (7, 1), 27)) == [1], "has come less far"
    assert names(sight(0, (8, 1), 27, **waits), sight(1, (7, 3), 27)) == [1], "a step less"
    assert names(sight(0, (7, 2), 27, **waits), sight(1, (7, 2), 27)) == [1], "as far, but does not wait"
    assert names(sight(0, (7, 2), 27), sight(1, (7, 2), 27, state="T")) == [1], "stopped"
    assert names(sight(0, (7, 2), 27), sight(1, (7, 2), 27, state="T", patience=600)) == [1], "stopped while it saves"
    assert names(sight(0, (7, 2), 27, **waits), sight(1, (7, 2), 27, **waits)) == [0, 1], "nobody can tell"
    three = [sight(0, (7, 2), 27, **waits), sight(1, (7, 2), 27, **waits), sight(2, (8, 1), 27, **waits)]
    assert names(*three) == [2], "it left a collective out and went on alone"


def test_ranks_that_wait_for_one_that_takes_its_own_time_do_not_hang() -> None:
    waiting = sight(1, (7, 3), 40, waits=True)
    assert names(sight(0, (7, 2), 40, patience=300), waiting) == []
    assert names(sight(0, (7, 3), 40, patience=300), waiting) == []
    assert names(sight(0, (7, 2), 301, patience=300), waiting) == [0]
    assert names(sight(0, (7, 3), 1), waiting) == [1], "as far, and it comes on: the other does not"


def seen_by_two(tmp_path: Path, first: tuple[Phase, int], second: tuple[Phase, int], silent: float) -> list[list[int]]:
    """Whom each of two supervisors, of a rank each, finds at fault; both ranks are in the same step, silent for so long."""
    boards = [Board(), Board()]
    for board, (phase, marks) in zip(boards, (first, second), strict=True):
        heartbeat._write(board._memory, 2, 1, marks, 7, phase, 10**6)
    dogs = [Watchdog([rank], [board], 30.0, 2, tmp_path) for rank, board in enumerate(boards)]
    found: list[list[int]] = []
    for _ in range(2):  # the first time, the second one has not told yet
        for dog in dogs:
            dog._silent = [silent]
            dog._looked = time.monotonic()
        found = [[sight.rank for sight in at_fault(dog.look([os.getpid()]), dog.limit)] for dog in dogs]
    for board in boards:
        board.close()
    return found


def test_supervisors_of_several_nodes_tell_one_another_before_they_judge(tmp_path: Path) -> None:
    step, save = Phase.STEP, Phase.SAVE
    assert seen_by_two(tmp_path, (step, 3), (step, 3), 20) == [[], []]
    assert seen_by_two(tmp_path, (step, 3), (save, 3), 40) == [[], []], "one waits while the other saves"
    assert seen_by_two(tmp_path, (step, 3), (step, 2), 27) == [[1], [1]]
    assert seen_by_two(tmp_path, (save, 2), (step, 3), 700) == [[0], [0]]


# real processes


@pytest.mark.slow
def test_a_stopped_rank_is_named_with_its_stack_and_the_run_ends_for_a_requeue(launch: Launch) -> None:
    command = launch(*PAIR, "trainer.hang_timeout_s=3")
    command.wait_for_steps()
    os.kill(command.ranks()[1], signal.SIGSTOP)
    began = time.monotonic()
    code, _, err = command.end(timeout=30)
    assert time.monotonic() - began < 10
    assert code == 75, err
    assert re.match(
        r"lm-train: rank 1 on \S+, after step \d+ \(\w+\): hangs: no progress for [23] s; it is stopped", said(err)
    )
    assert re.search(r"at \w+\.py:\d+ in \w+ < ", said(err))
    assert (command.run.errors / "rank-0.stack").exists()
    assert "most recent call first" in (command.run.errors / "rank-1.stack").read_text()
    assert command.ranks() == {}


@pytest.mark.slow
def test_a_held_interpreter_is_named_by_where_and_parts_that_take_their_own_time_are_no_hang(launch: Launch) -> None:
    """The first validation batch takes longer than a step may be silent."""
    words = ("trainer.hang_timeout_s=6", "trainer.val_check_interval=10", "trainer.limit_val_batches=2")
    fault = faulty_parts.words(train="hold_the_interpreter@20", evaluate="take_long@1")
    code, _, err = launch("trainer.devices=2", *words, *fault).end(timeout=240)
    assert code == 75, err
    assert "rank 1 on " in said(err)
    assert ", after step 19 (step): hangs" in said(err)
    assert "in hold_the_interpreter < faulty_parts.py:" in said(err)


@pytest.mark.slow
def test_two_ranks_in_different_collectives_are_both_named(launch: Launch) -> None:
    command = launch(*PAIR, "trainer.hang_timeout_s=3", *faulty_parts.words("leave_out@20"))
    code, _, err = command.end()
    assert code == 75, err
    assert "in all_reduce" in said(err)
    assert "likewise rank 1 after step 19 (step) at" in said(err)


@pytest.mark.slow
def test_a_machine_that_sleeps_is_no_hang(launch: Launch) -> None:
    """As Slurm suspends a job: all its processes are stopped, and go on later."""
    command = launch(*PAIR, "trainer.hang_timeout_s=2", "trainer.max_steps=3000")
    command.wait_for_steps()
    everybody = [*command.ranks().values(), command.process.pid]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in everybody:
            os.kill(pid, number)
        time.sleep(5)
    command.process.send_signal(signal.SIGTERM)
    code, _, err = command.end()
    assert code in (0, 75), err
    assert "hangs" not in err


def test_a_crash_is_told_by_where_and_the_same_one_again_ends_the_run_for_good(launch: Launch) -> None:
    words = (*ENDLESS, *faulty_parts.words("crash@20", rank=0))
    crash = r"was ended by SIGSEGV, a crash in compiled code, called at .* < faulty_parts.py:\d+ in crash <"
    for expected in (75, 76):
        command = launch(*words)
        code, _, err = command.end()
        assert code == expected, err
        assert command.run.outcome() == expected
        assert re.match(rf"lm-train: rank 0 on \S+, after step 19 \(step\): {crash}", said(err)), err
    given_up = "lm-train: runs/run: twice the same failure after step 19, from the beginning; the last: rank 0: was ended by SIG"
    assert any(line.startswith(given_up) for line in err.splitlines()), err
    code, _, err = launch(*words).end()
    assert code == 76
    assert "remove runs/run/starts.jsonl, or give trainer.restarts_without_progress=null" in err.splitlines()[-1]


@pytest.mark.slow
def test_a_process_that_leaves_without_a_word_is_named(launch: Launch) -> None:
    code, _, err = launch(*ENDLESS, *faulty_parts.words("leave@20", rank=0)).end()
    assert code == 70, err
    assert ", after step 19 (step): ended with exit code 3 and left no message" in said(err)
