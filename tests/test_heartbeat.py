"""A rank's signs of life, as its supervisor sees them from another process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lm_train import heartbeat
from lm_train.heartbeat import Board, Phase
from lm_train.watchdog import Watchdog, in_words

RANK = """
import os, sys, threading, time
from lm_train import heartbeat
from lm_train.heartbeat import Phase
heartbeat.join()
assert heartbeat.VARIABLE not in os.environ
heartbeat.mark(Phase.DATA, 6)
heartbeat.mark(Phase.STEP)
time.sleep(0.2)
heartbeat.mark(Phase.BOUNDARY, 7)
thread = threading.Thread(target=heartbeat.mark, args=(Phase.TEST, 9))
thread.start()
thread.join()
if os.fork() == 0:
    heartbeat.mark(Phase.TEST, 9)
    os._exit(0)
os.wait()
with heartbeat.during(Phase.SAVE):
    print("ready", flush=True)
    exec(sys.argv[1])
print("on", flush=True)
time.sleep(60)
"""


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.close()


def start(board: Board, then: str) -> subprocess.Popen[str]:
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK, then],
        pass_fds=board.inherited,
        env=board.variable,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert rank.stdout is not None
    assert rank.stdout.readline() == "ready\n"
    return rank


def test_phase_step_and_time_are_read_from_outside_and_only_the_main_thread_beats(board: Board) -> None:
    assert (board.read().step, board.read().dumps) == (-1, False)
    rank = start(board, "pass")
    try:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "on\n"
        beat = board.read()
        assert (beat.phase, beat.step, beat.marks, beat.dumps) == (Phase.BOUNDARY, 7, 1, True)
        assert 0 <= time.monotonic() - beat.at < 5
    finally:
        rank.kill()
        rank.wait()


def test_stacks_come_out_while_other_code_holds_the_interpreter(board: Board) -> None:
    held = "import ctypes\ndef stuck():\n    lock = ctypes.create_string_buffer(64)\n"
    held += "    for _ in 'ab': ctypes.PyDLL(None).pthread_mutex_lock(lock)\nstuck()"
    rank = start(board, held)
    try:
        time.sleep(0.2)
        assert board.read().phase is Phase.SAVE
        rank.send_signal(heartbeat.STACK_SIGNAL)
        deadline = time.monotonic() + 10
        while "in stuck" not in board.stacks():
            assert time.monotonic() < deadline, board.stacks()
            time.sleep(0.01)
        assert rank.poll() is None
    finally:
        rank.kill()
        rank.wait()


def test_a_stopped_child_is_named_for_whom_a_rank_waits(board: Board, tmp_path: Path) -> None:
    waits = "child = os.fork()\nif child == 0: time.sleep(100)\nprint(child, flush=True)\nos.waitpid(child, 0)"
    rank = start(board, waits)
    assert rank.stdout is not None
    child = int(rank.stdout.readline())
    dog = Watchdog([0], [board], 30.0, 1, tmp_path)
    try:
        assert [sight.stopped_child for sight in dog.stacks([rank.pid], on_cpu=True)] == [None]
        os.kill(child, signal.SIGSTOP)
        sights = dog.stacks([rank.pid], on_cpu=True)
        assert [sight.stopped_child for sight in sights] == [child]
        assert f"its child (process {child}) is stopped (SIGSTOP)" in in_words(sights[0], sights)
    finally:
        os.kill(child, signal.SIGKILL)
        rank.kill()
        rank.wait()


def test_a_crash_leaves_its_stack(board: Board) -> None:
    rank = start(board, "import ctypes\ndef crash():\n    ctypes.string_at(0)\ncrash()")
    assert rank.wait() == -signal.SIGSEGV
    assert "in crash" in board.stacks()


def test_the_pace_of_a_phase_is_its_longest_beat_of_late(board: Board) -> None:
    rank = start(board, "heartbeat.mark(Phase.STEP)\nprint(flush=True)\ntime.sleep(60)")
    try:
        assert rank.stdout is not None
        rank.stdout.readline()
        assert 0.2 <= board.read().pace < 5
    finally:
        rank.kill()
        rank.wait()


def test_without_a_supervisor_nothing_happens() -> None:
    heartbeat.join({})
    heartbeat.mark(Phase.STEP, 1)
    heartbeat.alive()
    with heartbeat.during(Phase.SAVE):
        heartbeat.enter(Phase.DATA)
    assert heartbeat._pulse is None, "nobody has given it memory to beat in"
