"""Prepared text: what it holds, that neither workers nor kills show in it, and what a wrong command is told."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from lm_train import signals
from lm_train.cli import main
from lm_train.data import source
from lm_train.data.hub import HubDataset
from lm_train.data.shards import UNFINISHED, read_index, read_manifest, read_tokenizer
from lm_train.prepare import units
from lm_train.prepare.work import Worker
from tests.text_data import write_jsonl

Prepare = Callable[..., int]
FEW = ["first text", "", "second  text", "First\nText", "third <|endoftext|> text"]


@pytest.fixture
def prepare(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """`lm-train prepare` in this process, with one worker unless words say otherwise."""
    monkeypatch.setattr(signals, "listen", lambda: None)
    monkeypatch.setenv("USE_TORCH", "0")

    def run(path: Path | str, out: Path, *words: str) -> int:
        given = [word.split("=")[0] for word in words]
        usual = ("data.tokenizer=bytes", "prepare.workers=1", "data.val_fraction=0.2")
        return main(
            [
                "prepare",
                "recipe=gpt_debug",
                f"data.path={path}",
                f"out={out}",
                *words,
                *(word for word in usual if word.split("=")[0] not in given),
            ]
        )

    return run


def corpus(file: Path, documents: int = 60) -> Path:
    """Documents of a few hundred words, some of them equal, some nearly, with lines that come again and again."""
    draw = np.random.default_rng(7)
    words = [f"word{i}" for i in range(400)]
    texts: list[str] = []
    for i in range(documents):
        chosen = [words[k] for k in draw.integers(0, len(words), 120)]
        lines = [" ".join(chosen[k : k + 12]) + "." for k in range(0, 120, 12)]
        texts.append("\n".join(["Home | About | Contact", *lines, f"Mail me@example{i}.org"]))
        if i % 10 == 3:
            texts.append(texts[i // 2].upper())
        if i % 10 == 6:
            texts.append(texts[i // 2].replace("word7 ", "another "))
    return write_jsonl(file, texts)


EVERYTHING = (
    "prepare.cleaning=[html,control,unicode,boilerplate,repeated_lines,gopher_repetition,emails,phones,cards,ips]",
    "prepare.dedup=near",
    "prepare.shard_tokens=9000",
    "data.tokenizer=bpe:300",
)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def texts_of(folder: Path, split: str) -> list[str]:
    """The documents that the shards and their indexes stand for."""
    manifest = read_manifest(folder)
    tokenizer = read_tokenizer(folder, manifest)
    texts = []
    for shard in manifest.splits[split].shards:  # type: ignore[index]
        ids = np.fromfile(folder / shard.name, dtype=manifest.ids).tolist()
        index = read_index(folder, shard).tolist()
        for start, end in pairwise(index):
            assert ids[end - 1] == manifest.tokenizer.end_of_text
            texts.append(tokenizer.decode(ids[start : end - 1], skip_special_tokens=False))
    return texts


def test_what_is_written(prepare: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write_jsonl(tmp_path / "few.jsonl", FEW), tmp_path / "out"
    validation = write_jsonl(tmp_path / "val.jsonl", ["other text", "second text", "last text"])
    assert prepare(file, out, f"data.val_path={validation}", "prepare.shard_tokens=30") == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert texts_of(out, "train") == ["first text", "second  text", "third <|endoftext|> text"]
    assert texts_of(out, "val") == ["other text", "last text"], "what trains does not validate"
    manifest = read_manifest(out)
    train = manifest.splits["train"]
    assert [shard.documents for shard in train.shards] == [3]
    assert train.text_bytes == 10 + 12 + 24
    assert train.tokens == train.text_bytes + 3
    assert train.max_id == manifest.tokenizer.end_of_text == 256
    removed = manifest.counts["removed"]
    assert removed["empty"] == {
        "documents": 1,
        "dropped": 1,
        "characters": 0,
        "reasons": {"nothing left": 1},
        "examples": [{"where": f"{file} at 2", "text": "", "reason": "nothing left"}],
    }
    assert removed["duplicates"]["examples"] == [
        {"where": f"{file} at 4", "equals": f"{file} at 1"},
        {"where": f"{validation} at 2", "equals": f"{file} at 3"},
    ]
    assert manifest.counts["read"] == {"documents": 8, "characters": sum(map(len, FEW)) + 30}
    assert not (out / UNFINISHED).exists()
    rows = pq.read_table(out / "documents.parquet").to_pylist()
    assert [(row["split"], row["shard"], row["first_token"], row["tokens"], row["row"]) for row in rows] == [
        ("train", 0, 0, 11, 1),
        ("train", 0, 11, 13, 3),
        ("train", 0, 24, 25, 5),
        ("val", 0, 0, 11, 1),
        ("val", 0, 11, 10, 3),
    ]
    assert {row["source"] for row in rows} == {str(file), str(validation)}


def test_neither_workers_nor_units_show(prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = corpus(tmp_path / "text.jsonl")
    assert prepare(file, tmp_path / "one", *EVERYTHING) == 0
    monkeypatch.setattr(units, "UNIT_CHARACTERS", 5000)
    expected = contents(tmp_path / "one")
    for workers in (2, 3):
        assert prepare(file, tmp_path / "more", *EVERYTHING, f"prepare.workers={workers}") == 0
        assert contents(tmp_path / "more") == expected
        (tmp_path / "more").rename(tmp_path / f"with{workers}")
    manifest = read_manifest(tmp_path / "one")
    assert len(manifest.splits["train"].shards) > 2
    removed = manifest.counts["removed"]
    assert removed["duplicates"]["dropped"] >= 5
    assert removed["near_duplicates"]["dropped"] >= 4
    assert removed["repeated_lines"]["examples"][0]["text"] == "Home | About | Contact"
    assert removed["emails"]["documents"] == manifest.counts["read"]["documents"]
    train = "\n".join(texts_of(tmp_path / "one", "train"))
    assert "Mail <EMAIL>" in train
    assert "@example" not in train
    assert "Home | About" not in train
    assert b"@example" not in b"".join(expected.values())


def test_characters_have_no_end_of_text(prepare: Prepare, tmp_path: Path) -> None:
    file, out = write_jsonl(tmp_path / "few.jsonl", ["abc", "cab", "bca", "acb"]), tmp_path / "out"
    validation = write_jsonl(tmp_path / "val.jsonl", ["abd"])
    assert prepare(file, out, "data.tokenizer=chars", f"data.val_path={validation}") == 0
    manifest = read_manifest(out)
    assert manifest.tokenizer.end_of_text is None
    train = manifest.splits["train"].shards[0]
    assert np.fromfile(out / train.name, dtype="<u2").tolist() == [0, 1, 2, 2, 0, 1, 1, 2, 0, 0, 2, 1]
    assert read_index(out, train).tolist() == [0, 3, 6, 9, 12]
    assert manifest.tokenizer.vocab_size == 4, "the validation text's characters count"


def test_the_table_tells_where_each_document_is(prepare: Prepare, tmp_path: Path) -> None:
    file, out = corpus(tmp_path / "text.jsonl"), tmp_path / "out"
    assert prepare(file, out, *EVERYTHING) == 0
    manifest = read_manifest(out)
    rows = pq.read_table(out / "documents.parquet").to_pylist()
    for split, shards in manifest.splits.items():
        found = iter([row for row in rows if row["split"] == split])
        for number, shard in enumerate(shards.shards):
            index = read_index(out, shard).tolist()
            for start, end in pairwise(index):
                row = next(found)
                assert (row["shard"], row["first_token"], row["tokens"]) == (number, start, end - start)
        assert next(found, None) is None
    lines = [row["row"] for row in rows if row["split"] == "train"]
    assert lines == sorted(lines)


def test_again_is_nothing_and_other_settings_are_refused(
    prepare: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write_jsonl(tmp_path / "few.jsonl", FEW), tmp_path / "out"
    assert prepare(file, out) == 0
    before = {name: (out / name).stat().st_mtime_ns for name in contents(out)}
    capsys.readouterr()
    assert prepare(file, out, "prepare.workers=2") == 0
    printed = capsys.readouterr()
    assert "has been prepared already" in printed.err
    assert printed.out.splitlines()[-1] == str(out)
    assert {name: (out / name).stat().st_mtime_ns for name in contents(out)} == before
    assert prepare(file, out, "prepare.dedup=none", "prepare.cleaning=[html]") == 73
    told = capsys.readouterr().err
    assert "cleaning=[control,unicode] (now [html]), dedup=exact (now none); give another out=DIR" in told
    write_jsonl(file, [*FEW, "more"])
    assert prepare(file, out) == 73
    assert "other settings: text=" in capsys.readouterr().err
    write_jsonl(file, FEW)
    (out / "train-00000.idx").unlink()
    assert prepare(file, out) == 66
    assert "train-00000.idx: missing" in capsys.readouterr().err


def test_what_cannot_be_prepared(prepare: Prepare, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 9)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n" * 100)
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with (tmp_path / "long.jsonl").open("wb") as out:
        out.write(b'{"text": "a"}\n')
        out.truncate(1 << 30)  # a sparse file: one line of a gigabyte
    good = write_jsonl(tmp_path / "good.jsonl", ["some text", "more text"])
    cases: list[tuple[int, str, Any, str, tuple[str, ...]]] = [
        (2, "no such file or folder", tmp_path / "absent.txt", "out", ()),
        (66, "not UTF-8 text at byte 3", tmp_path / "latin.txt", "out", ("data.val_path=" + str(good),)),
        (66, "empty.txt: empty file", tmp_path / "empty.txt", "out", ()),
        (66, "nothing is left of the training text", tmp_path / "blank.txt", "out2", ()),
        (66, "broken.jsonl line 2: not JSON", tmp_path / "broken.jsonl", "out3", ()),
        (66, "long.jsonl line 2: longer than 64 MiB", tmp_path / "long.jsonl", "out4", ()),
        (73, "file: a file; give a folder", good, "file", ()),
        (73, "has thesis.tex in it", good, "foreign", ()),
        (73, "a link to nothing", good, "dangling", ()),
        (2, "for running text; give data=embedded", good, "out5", ("model={kind: mlp}", "data={kind: table}")),
        (2, "did you mean prepare.cleaning?", good, "out5", ("prepare.cleaning_rules=[html]",)),
        (2, "expected a list of html, control", good, "out5", ("prepare.cleaning=[htlm]",)),
        (2, "put whitespace after it", good, "out5", ("prepare.cleaning=[whitespace,c4]",)),
        (2, "names html twice", good, "out5", ("prepare.cleaning=[html,html]",)),
    ]
    for code, message, path, out_name, words in cases:
        given = ("recipe=gpt_debug", *words, f"out={tmp_path / out_name}", "prepare.workers=1")
        found = main(["prepare", *given]) if "table" in str(words) else prepare(path, tmp_path / out_name, *words)
        told = capfd.readouterr().err
        assert (found, message in told) == (code, True), f"{path}: {found}: {told}"
        assert len([line for line in told.splitlines() if line.startswith("lm-train:")]) == 1, told
        assert "Traceback" not in told


def start(path: Path, out: Path, *words: str, program: str = "") -> subprocess.Popen[str]:
    """A preparation in a process of its own, in small units."""
    code = (
        "import sys; from lm_train.cli import main; from lm_train.prepare import units; units.UNIT_CHARACTERS = 5000\n"
        f"{program}\nif __name__ == '__main__': code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    usual = ["recipe=gpt_debug", "data.val_fraction=0.2", f"data.path={path}", f"out={out}"]
    if not any(word.startswith("prepare.workers=") for word in words):
        usual.append("prepare.workers=1")
    command = [sys.executable, "-c", code, "prepare", *usual, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=60)
    return process.returncode, err


KILLED_AT = """
import os, signal
from pathlib import Path
whole, count = Path.replace, 0
def replace(self, target):
    global count
    count += 1
    if count == {at} and {before}: os.kill(os.getpid(), signal.SIGKILL)
    result = whole(self, target)
    if count == {at}: os.kill(os.getpid(), signal.SIGKILL)
    return result
Path.replace = replace
"""


def kill_and_go_on(prepare: Prepare, tmp_path: Path, kills: int, seed: int) -> None:
    """Kills at seeded points, before or after a file gets its name, until the preparation ends; compares every byte."""
    file = corpus(tmp_path / "text.jsonl")
    assert prepare(file, tmp_path / "whole", *EVERYTHING) == 0
    draw = np.random.default_rng(seed)
    killed = 0
    for _ in range(kills):
        program = KILLED_AT.format(at=int(draw.integers(1, 12)), before=bool(draw.integers(2)))
        code, err = ended(start(file, tmp_path / "killed", *EVERYTHING, program=program))
        assert code in (0, -signal.SIGKILL), err
        killed += code != 0
    assert killed >= kills // 2
    assert ended(start(file, tmp_path / "killed", *EVERYTHING))[0] == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_goes_on_where_it_was_killed(prepare: Prepare, tmp_path: Path) -> None:
    kill_and_go_on(prepare, tmp_path, kills=4, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_goes_on_where_it_was_killed_many_times(prepare: Prepare, tmp_path: Path, seed: int) -> None:
    kill_and_go_on(prepare, tmp_path, kills=10, seed=seed)


SLOW_UNITS = "import time\nfrom lm_train.prepare.work import Worker\nwork = Worker.work\n" + (
    "def slowly(self, unit):\n    work(self, unit)\n    time.sleep(0.05)\nWorker.work = slowly\n"
)


def wait_for_units(process: subprocess.Popen[str], out: Path, wanted: int) -> None:
    while len(list((out / UNFINISHED / "units").glob("*.npz"))) < wanted:
        assert process.poll() is None, process.communicate()
        os.sched_yield()


def test_ctrl_c_and_a_second_one_at_work(prepare: Prepare, tmp_path: Path) -> None:
    file, out = corpus(tmp_path / "text.jsonl"), tmp_path / "out"
    assert prepare(file, tmp_path / "whole", "data.tokenizer=bpe:300") == 0
    first = start(file, out, "data.tokenizer=bpe:300", program=SLOW_UNITS)
    wait_for_units(first, out, 2)
    assert prepare(file, out, "data.tokenizer=bpe:300") == 73
    first.send_signal(signal.SIGINT)
    code, err = ended(first)
    assert (code, "lm-train: stopped; the same command goes on from here" in err) == (130, True), err
    done = {name for name in contents(out) if "units" in name}
    assert 2 <= len(done) < 12
    code, err = ended(start(file, out, "data.tokenizer=bpe:300", "prepare.workers=2"))
    assert code == 0, err
    assert contents(out) == contents(tmp_path / "whole")


def test_a_lost_worker_is_named(tmp_path: Path, cache: Path) -> None:
    file, out = corpus(tmp_path / "text.jsonl"), tmp_path / "out"
    process = start(file, out, "data.tokenizer=bytes", "prepare.workers=2")
    while not (workers := workers_of(process.pid)):
        assert process.poll() is None, process.communicate()
        os.sched_yield()
    os.kill(workers[0], signal.SIGKILL)
    code, err = ended(process)
    assert code == 75, err
    assert "lm-train: a worker process was ended from outside" in err
    assert "prepare.workers=1" in err


def workers_of(pid: int) -> list[int]:
    """Worker processes that are children of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_tables_are_read_without_torch(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text("id,text\n" + "".join(f'{i},"text number {i}, with a comma"\n' for i in range(30)))
    code, err = ended(start(file, tmp_path / "out", "data.tokenizer=bytes"))
    assert code == 0, err
    assert "text number 0, with a comma" in texts_of(tmp_path / "out", "train")


class Hub:
    """Stands for the `datasets` package: one data set of three hundred rows; its connection may break."""

    def __init__(self, rows: int) -> None:
        self.rows, self.asked = rows, []  # type: ignore[var-annotated]

    def load_dataset(self, path: str, subset: str | None, *, split: str, streaming: bool) -> Hub:
        self.asked.append((path, subset, split, streaming))
        self.size = 300 if split == "train" else 20
        return self

    def iter(self, batch_size: int) -> Iterator[dict[str, list[str]]]:
        for i in range(0, self.size, 10):
            if self.size > 20 and i >= self.rows:
                raise ConnectionError("the line is dead")
            yield {"text": [f"row {self.size} {i + k} " + "of the set " * 20 for k in range(10)]}


def test_a_stream_of_the_hub_goes_on_after_its_line_was_dead(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(source, "find_dataset", lambda path, subset: HubDataset("rev", ["train", "validation"]))
    monkeypatch.setattr(units, "UNIT_CHARACTERS", 5000)
    hub = Hub(rows=300)
    monkeypatch.setattr(source, "quiet_datasets", lambda: hub)
    assert prepare("someone/texts", tmp_path / "whole") == 0
    assert hub.asked == [("someone/texts", None, "train", True), ("someone/texts", None, "validation", True)]
    assert len(texts_of(tmp_path / "whole", "train")) == 300
    hub.rows = 170
    assert prepare("someone/texts", tmp_path / "broken") == 66
    assert "someone/texts train after row 170" in capsys.readouterr().err
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "broken" / UNFINISHED / "units").iterdir()}
    assert len(done) > 5
    hub.rows = 300
    assert prepare("someone/texts", tmp_path / "broken", "prepare.workers=2") == 0
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_what_has_been_done_is_not_done_again(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = corpus(tmp_path / "text.jsonl"), tmp_path / "out"
    monkeypatch.setattr(units, "UNIT_CHARACTERS", 5000)
    assert ended(start(file, out, program=KILLED_AT.format(at=12, before=False)))[0] == -signal.SIGKILL
    before = {name for name in contents(out) if name.endswith(".npz")}
    worked: list[str] = []
    whole = Worker.work
    monkeypatch.setattr(Worker, "work", lambda self, unit: (worked.append(unit.name), whole(self, unit)))
    assert prepare(file, out, "data.tokenizer=bpe:2048") == 0
    assert worked
    assert not before & {f"{UNFINISHED}/units/{name}" for name in worked}
    assert len(before) > 3


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk(prepare: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("cannot mount")
    try:
        file = corpus(tmp_path / "text.jsonl", documents=200)
        assert prepare(file, small / "out") == 73
        told = capsys.readouterr().err
        assert "the disk is full; make room, and the same command goes on" in told
        assert subprocess.run(["mount", "-o", "remount,size=20m", small]).returncode == 0
        assert prepare(file, small / "out") == 0
        assert prepare(file, tmp_path / "whole") == 0
        assert contents(small / "out") == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", small], check=True)


def test_embedded_is_the_default(
    prepare: Prepare, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any word but the recipe's: the standard library (a part of it here), into prepared/RECIPE here."""
    monkeypatch.setattr(
        source, "sysconfig", SimpleNamespace(get_paths=lambda: {"stdlib": str(Path(asyncio.__file__).parent)})
    )
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "recipe=gpt_debug", "data.tokenizer=bpe:300", "prepare.workers=1"]) == 0
    manifest = read_manifest(tmp_path / "prepared" / "gpt_debug")
    assert set(manifest.splits) == {"train", "val"}
    assert manifest.settings["data"] == "the Python standard library"
    assert any("class Task(" in text for text in texts_of(tmp_path / "prepared" / "gpt_debug", "train"))
