"""A save that is cut off, by a kill or by the end of the disk, leaves what was there."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from lm_train import checkpoint
from lm_train.checkpoint import CheckpointReader, Group, HostMemory, Snapshot, Writer, saving, views_of
from lm_train.errors import OutputError
from lm_train.saved import checkpoints_in, newest_good, publish
from lm_train.saved.places import leftovers
from lm_train.saved.publish import Keeping, remove_old


def made(value: float, side: int = 8) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network all of whose numbers tell when it was saved."""
    net = nn.Linear(side, side)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    return net, torch.optim.SGD(net.parameters())


def save(folder: Path, value: float | None = None, side: int = 8) -> None:
    step = int(folder.name.removeprefix("step-"))
    views = views_of(*made(step if value is None else value, side))
    snapshot = Snapshot(views, {"step": step, "value": step if value is None else value}, HostMemory())
    checkpoint.write(snapshot, folder, Group(1), lambda newest: remove_old(newest, Keeping(2)))


def latest(run: Path) -> tuple[int, float]:
    """Step and value of what a resume would load, each file compared and each number the one of that save."""
    found = newest_good(run)
    assert found.checkpoint is not None
    assert found.skipped == []
    reader = CheckpointReader(found.checkpoint)
    net, optimizer = made(-1.0)
    reader.load(views_of(net, optimizer))
    value = reader.state["value"]
    assert all(bool((parameter == value).all()) for parameter in net.parameters())
    return reader.state["step"], value


def in_child(work: Callable[[], None], at: int | None) -> bool:
    """Runs `work` in a process that kills itself right before its `at`-th step on the file system; whether it got so far."""
    child = os.fork()
    if child == 0:
        try:
            if at is not None:
                _kill_before(at)
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _kill_before(at: int) -> None:
    """Only for a process that ends soon: audit hooks stay."""
    left = at
    write, fsync, exchange = os.write, os.fsync, publish._exchanged

    def step() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def half_written(descriptor: int, content: memoryview) -> int:
        if left == 1:
            write(descriptor, content[: len(content) // 2])
        step()
        return write(descriptor, content)

    def synced(descriptor: int) -> None:
        step()
        fsync(descriptor)

    def exchanged(one: Path, other: Path) -> bool:
        step()
        return exchange(one, other)

    def heard(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            step()

    os.write, os.fsync, publish._exchanged = half_written, synced, exchanged
    sys.addaudithook(heard)


@pytest.mark.parametrize("target", ["step-30", "step-20", "step-20 where names cannot be exchanged"])
def test_killed_before_any_step_on_the_file_system_latest_loads(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new checkpoint, and one that replaces another of its step; every place in the save at which a kill can come."""
    name, _, otherwise = target.partition(" ")
    if otherwise:
        monkeypatch.setattr(publish, "_exchanged", lambda one, other: False)
    before, results = tmp_path / "before", []
    for step in (5, 10, 20):
        save(before / f"step-{step}")
    assert {path.name for path in checkpoints_in(before)} == {"step-10", "step-20"}
    for at in range(1, 200):
        run = tmp_path / str(at)
        shutil.copytree(before, run)
        killed = in_child(lambda run=run: save(run / name, 0.5), at)
        results.append(latest(run))
        assert results[-1] in ((20, 20), (int(name[5:]), 0.5))
        assert len(checkpoints_in(run)) >= 2, "what a damaged newest one would be replaced by"
        save(run / "step-40")
        assert leftovers(run) == []
        assert latest(run) == (40, 40)
        if not killed:
            break
    assert not killed
    assert len(results) > 20, "steps on the file system"
    assert results[0] == (20, 20)
    assert results[-1][1] == 0.5
    assert results == sorted(results, key=lambda result: result[1] == 0.5), "once it is the latest it stays so"


def save_for_ever(run: Path, side: int) -> None:
    """Saves as fast as it can, in the thread that a training would use."""
    writer, memory, step = Writer(), HostMemory(), newest_step(run)
    while True:
        step += 1
        net, optimizer = made(float(step), side)
        snapshot = Snapshot(views_of(net, optimizer), {"step": step, "value": float(step)}, memory)
        target = run / f"step-{step}"
        writer.begin(
            lambda snapshot=snapshot, target=target: checkpoint.write(
                snapshot, target, Group(1), lambda newest: remove_old(newest, Keeping(2))
            )
        )
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(-7.0)  # the training goes on; the copy must not
        writer.finish()


def newest_step(run: Path) -> int:
    found = newest_good(run).checkpoint
    return 0 if found is None else int(found.name.removeprefix("step-"))


def kill_at_random(run: Path, count: int, seed: int) -> int:
    """Kills so many savers, each at another time; the number of those that were inside a save.

    Returns:
        How many left a part of a checkpoint behind.
    """
    draw, inside, before = random.Random(seed), 0, 0
    for _ in range(count):
        child = os.fork()
        if child == 0:
            save_for_ever(run, side=300)
            os._exit(1)
        start = time.monotonic()
        while newest_step(run) < before + 2 and time.monotonic() < start + 20:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        inside += bool(leftovers(run))
        step, _ = latest(run)
        assert step >= before + 2
        before = step
        assert len(checkpoints_in(run)) >= 2
    return inside


def test_killed_at_any_time_latest_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "made", _large(made))
    print(f"MEASURED {kill_at_random(tmp_path, 6, seed=0)} of 6 kills were inside a save")


@pytest.mark.slow
def test_a_hundred_kills_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "made", _large(made))
    inside = kill_at_random(tmp_path, 100, seed=1)
    print(f"MEASURED {inside} of 100 kills were inside a save")
    assert inside >= 30


def _large(make: Callable[..., tuple[nn.Module, torch.optim.Optimizer]]) -> Callable[..., object]:
    return lambda value, side=300: make(value, 300)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a file system of its own: `small_disk("size=12M")`."""
    mounted = []

    def make(options: str) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        try:
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True
            )
        except FileNotFoundError:
            pytest.skip("no mount here")
        if done.returncode:
            pytest.skip(f"may not mount a tmpfs: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


SIDE = 1000
"""A network of 4 MB."""


def test_a_full_disk_is_seen_before_the_save(
    small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_disk("size=12M") / "checkpoints"
    monkeypatch.setattr(sys.modules[__name__], "made", lambda value, side=SIDE, make=made: make(value, SIDE))
    save(run / "step-1")
    save(run / "step-2")
    with pytest.raises(OutputError) as error:
        save(run / "step-3")
    assert "a checkpoint needs 4.0 MB, " in str(error.value)
    assert "are free; free " in str(error.value)
    assert "(older checkpoints of this run: step-1 4.0 MB), or name another place with runs_dir=DIR" in str(error.value)
    assert leftovers(run) == []
    assert latest(run) == (2, 2)
    assert len(checkpoints_in(run)) == 2


@pytest.mark.parametrize("room_mb", [0.5, 2.0, 3.99])
def test_a_disk_that_fills_in_the_middle_of_a_save(
    small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, room_mb: float
) -> None:
    place = small_disk("size=12M")
    run = place / "checkpoints"
    monkeypatch.setattr(sys.modules[__name__], "made", lambda value, side=SIDE, make=made: make(value, SIDE))
    save(run / "step-1")
    monkeypatch.setattr(saving, "check_space", lambda *_: None)  # somebody else fills it only now
    disk = os.statvfs(place)
    with (place / "other").open("wb") as other:
        other.write(bytes(int(disk.f_bavail * disk.f_frsize - room_mb * 1e6)))
    for _ in range(2):  # what the first has left would show at the second
        with pytest.raises(OutputError, match=r"step-2: the disk is full; free space there, or name another place"):
            save(run / "step-2")
        assert leftovers(run) == []
    assert latest(run) == (1, 1)
    (place / "other").unlink()
    save(run / "step-2")
    assert latest(run) == (2, 2)


def test_a_disk_without_room_for_names(small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_disk("size=12M,nr_inodes=12") / "checkpoints"
    save(run / "step-1")
    save(run / "step-2")
    with pytest.raises(OutputError, match=r"a checkpoint needs 5 files, the file system has room for \d more"):
        save(run / "step-3")
    monkeypatch.setattr(saving, "check_space", lambda *_: None)
    with pytest.raises(OutputError, match="the disk is full; free space there"):
        save(run / "step-3")
    assert leftovers(run) == []
    assert latest(run) == (2, 2)


def test_nothing_is_written_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary folder that is full, or on another file system, plays no part."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    opened: list[str] = []
    real = os.open

    def seen(path: object, *arguments: int) -> int:
        opened.append(str(path))
        return real(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(saving.os, "open", seen)
    save(tmp_path / "run" / "step-1")
    assert opened
    assert all(path.startswith(str(tmp_path / "run")) for path in opened)


def test_an_error_of_the_thread_is_raised_where_the_training_looks(tmp_path: Path) -> None:
    writer = Writer()

    def fails() -> checkpoint.Published:
        raise OSError(errno.EIO, "Input/output error")

    writer.begin(fails)
    with pytest.raises(OSError, match="Input/output error"):
        writer.finish()
    assert not writer.is_busy
    assert writer.finish() is None, "it is told once"
    writer.begin(lambda: checkpoint.Published(tmp_path, 1))
    done = writer.finish()
    assert done is not None
    assert done[0] == (tmp_path, 1)
