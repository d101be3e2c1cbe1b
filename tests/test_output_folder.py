"""A place that cannot be written to is refused in one line before torch is loaded, and nothing is left behind."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lm_train import cli, runs
from lm_train.runs import RunFolder
from tests.pair import ROOT

MODEL = "model={kind: gpt, n_layer: 1, n_head: 1, n_embd: 8, block_size: 8}"
TINY = ("recipe=gpt_debug", "tracking.wandb=disabled", "data.tokenizer=bytes", MODEL)
Command = Callable[..., tuple[int | str, list[str]]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """A training's exit code, or `ranks` where its ranks would have been started; and what it says."""

    class Started(BaseException):
        pass

    def start(*args: object) -> None:
        raise Started

    monkeypatch.setattr("lm_train.launch.Supervisor.run", start)

    def go(*words: str) -> tuple[int | str, list[str]]:
        capsys.readouterr()
        try:
            code: int | str = cli.main(["train", *TINY, *words])
        except Started:
            code = "ranks"
        return code, [line for line in capsys.readouterr().err.splitlines() if line.startswith("lm-train")]

    return go


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    mounted: list[Path] = []

    def make(options: str) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("may not mount here")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_missing_parents_are_made(command: Command, tmp_path: Path) -> None:
    assert command(f"runs_dir={tmp_path}/a/b/c", "name=r")[0] == "ranks"
    assert (tmp_path / "a/b/c/r/recipe.yaml").exists()


def test_what_is_in_the_way(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "nowhere").symlink_to("/nowhere/at/all")
    (tmp_path / "loop").symlink_to("loop")
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "file").write_text("x")
    (folder / "nowhere").symlink_to("/nowhere/at/all")
    before = sorted(tmp_path.rglob("*"))
    for words, expected, says in (
        ([f"runs_dir={tmp_path}/file"], 2, "is a file; name a folder"),
        ([f"runs_dir={tmp_path}/file/sub"], 73, "in its way is a file"),
        ([f"runs_dir={tmp_path}/nowhere"], 73, "a link that leads nowhere"),
        ([f"runs_dir={tmp_path}/loop"], 73, "link"),
        ([f"runs_dir={tmp_path}/{'x' * 300}"], 73, "File name too long"),
        ([f"runs_dir={tmp_path}/a\0b"], 2, "runs_dir: expected the path of a folder"),
        ([f"runs_dir={tmp_path}/a\nb"], 2, "runs_dir: expected the path of a folder"),
        ([f"runs_dir={folder}", "name=file"], 73, "in its way is a file"),
        ([f"runs_dir={folder}", "name=nowhere"], 73, "a link that leads nowhere"),
        (["runs_dir=/proc/self"], 73, "/proc/self"),
        (["runs_dir=/dev/null/x"], 73, "/dev/null"),
    ):
        code, said = command(*words)
        assert (code, len(said)) == (expected, 1), (words, code, said)
        assert says in said[0], (words, said)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["recipe.yaml", "plan.json", "metrics.jsonl", "budget.jsonl", "exit_code", ".owner"])
def test_a_folder_in_place_of_a_file(name: str, command: Command, tmp_path: Path) -> None:
    (tmp_path / "r" / name).mkdir(parents=True)
    code, said = command(f"runs_dir={tmp_path}", "name=r")
    assert (code, len(said)) == (73, 1), said
    assert f"r/{name}" in said[0]


@pytest.mark.parametrize("name", ["checkpoints", "errors", ".start"])
def test_a_file_in_place_of_a_folder(name: str, command: Command, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / name).write_text("x")
    code, said = command(f"runs_dir={tmp_path}", "name=r")
    assert (code, len(said)) == (73, 1), said
    assert f"r/{name}" in said[0]


def test_read_only_and_full(command: Command, tmpfs: Callable[[str], Path]) -> None:
    code, said = command(f"runs_dir={tmpfs('ro,size=64m')}", "name=r")
    assert (code, len(said)) == (73, 1), said
    assert "Read-only file system" in said[0]
    full = tmpfs("size=64k")
    (full / "other").write_bytes(b"x" * 60_000)
    code, said = command(f"runs_dir={full}", "name=r")
    assert (code, len(said)) == (73, 1), said
    assert "free" in said[0]
    inodes = tmpfs("size=64m,nr_inodes=3")
    code, said = command(f"runs_dir={inodes}", "name=r")
    assert (code, len(said)) == (73, 1), said


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_folder_of_somebody_else(command: Command, tmp_path: Path) -> None:
    command(f"runs_dir={tmp_path}", "name=other")  # what is imported late may lie where others cannot read
    os.seteuid(65534)
    try:
        code, said = command(f"runs_dir={tmp_path}", "name=r")
        taken, also_said = command(f"runs_dir={tmp_path}", "name=other")
    finally:
        os.seteuid(0)
    assert (code, len(said)) == (73, 1), said
    assert (taken, len(also_said)) == (73, 1), also_said
    assert "Permission denied" in said[0]
    assert "Permission denied" in also_said[0]


def test_as_a_real_command_without_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "lm_train", "train", *TINY, "runs_dir=/proc/runs", "name=r"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    modules = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert (done.returncode, len(said)) == (73, 1), said
    assert "pydantic" in modules
    assert not modules & {"torch", "lightning"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_metrics_that_were_cut_or_spoilt_go_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    good = [b'{"step": %d, "train/loss": 1.5}' % step for step in range(1, 9)]
    for spoilt in (
        b'{"step": 6, "tra',
        b"\xff\xfe\0",
        b"[" * 100_000,
        b"null",
        b'{"step": null}',
        b'{"step": "7"}',
        b"{}",
        b"",
    ):
        folder.metrics.write_bytes(b"\n".join([*good[:3], spoilt, *good[3:], spoilt]))
        runs.cut_jsonl(folder.metrics, 5)
        steps = [row.get("step") for row in runs.read_jsonl(folder.metrics)]
        assert [step for step in steps if isinstance(step, int)] == [1, 2, 3, 4, 5], spoilt
        assert folder.metrics.read_bytes().endswith(b"\n")
