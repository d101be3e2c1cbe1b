"""Text in, documents out: every format, the splits, the cache, and one line for whatever is wrong with a file."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import datasets
import pytest

from lm_train.data import source
from lm_train.data.corpus import Corpus
from lm_train.data.readers import text_pieces
from lm_train.errors import DataError, OutputError
from tests.text_data import corpus_of, documents_of, ids_of, write_jsonl

TEXTS = [f"text number {i}, with an é and a\nsecond line" for i in range(30)]
AWKWARD = ["NA", "null", "12", "1e5", "2020-01-01", 'say "hi", he said', "", " spaces ", "True"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(file: Path, texts: list[str], column: str = "text") -> Path:
    """The texts as a table of the format that the file's name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": i, column: text} for i, text in enumerate(texts)]
    match "".join(file.suffixes):
        case ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".jsonl.gz":
            file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        case ".json":
            file.write_text(json.dumps(rows))
        case ".csv":
            with file.open("w", newline="") as opened:
                writer = csv.writer(opened)
                writer.writerows([["id", column], *([row["id"], row[column]] for row in rows)])
        case ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(str(file))
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "odd [1] *name?.csv"])
@pytest.mark.parametrize("texts", [TEXTS, AWKWARD], ids=["plain", "awkward"])
def test_tables_give_their_rows_in_order(name: str, texts: list[str], tmp_path: Path) -> None:
    train = write(tmp_path / "data" / name, texts, column="body")
    val = write(tmp_path / name.replace("a.", "b."), texts[:3], column="body")
    corpus = corpus_of(train, val_path=str(val), text_column="body")
    assert documents_of(corpus, "train") == texts
    assert documents_of(corpus, "val") == texts[:3]
    info = corpus.tokens("train").info()
    assert info is not None
    assert (info.documents, info.text_bytes) == (len(texts), sum(len(text.encode()) for text in texts))


def test_rows_of_jsonl_may_differ_in_their_other_columns(tmp_path: Path) -> None:
    rows = [{"text": "x" * 100, "meta": i} for i in range(500)]
    rows += [{"text": "y" * 100, "meta": {"a": 1}, "more": 1}, {"meta": "z", "text": "y"}]
    file = tmp_path / "a.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in rows))
    corpus = corpus_of(file)
    assert len(documents_of(corpus, "train")) + len(documents_of(corpus, "val")) == 502


@pytest.mark.parametrize("text", ["ab cd\n" * 30, "é世👍" * 60, "x", "no newline at all " * 9])
@pytest.mark.parametrize("fraction", [0.1, 0.15, 0.5])
def test_one_text_file_splits_by_bytes_at_a_character(text: str, fraction: float, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(text)
    if text == "x":
        with pytest.raises(DataError, match="no text in the train split"):
            corpus_of(file, val_fraction=fraction)
        return
    corpus = corpus_of(file, val_fraction=fraction)
    (train,), (val,) = documents_of(corpus, "train"), documents_of(corpus, "val")
    assert train + val == text
    cut = int(len(text.encode()) * (1 - fraction))
    assert cut <= len(train.encode()) < cut + 4


def test_pieces_of_a_text_file_join_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_train.data.readers._PIECE_BYTES", 50)
    monkeypatch.setattr("lm_train.data.readers._LINE_BYTES", 30)
    text = "short\n" * 20 + "é世👍" * 200 + "\n" + "a line of some length, longer than thirty bytes\n" * 5
    file = tmp_path / "a.txt"
    file.write_text(text)
    size = len(text.encode())
    for start, end in [(0, None), (0, 120), (60, None)]:
        pieces = list(text_pieces(file, start, end))
        assert "".join(p.text for p in pieces).encode() == text.encode()[start:end]
        assert max(len(p.text.encode()) for p in pieces) <= 80, "a line without end would fill the memory"
        assert [p.ends_document for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert size > 1000


def test_long_rows_come_in_pieces_of_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_train.data.readers._LINE_BYTES", 7)
    corpus = corpus_of(write_jsonl(tmp_path / "a.jsonl", TEXTS), val_path=str(write_jsonl(tmp_path / "b.jsonl", TEXTS)))
    assert documents_of(corpus, "train") == TEXTS


@pytest.mark.parametrize("first", ["x" * 3_000_000, "x"], ids=["a batch of its own", "small"])
def test_documents_are_separated_wherever_batches_end(first: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [first, "b", "c"])
    corpus = corpus_of(file, val_path=str(write_jsonl(tmp_path / "b.jsonl", ["one"])))
    assert documents_of(corpus, "train") == [first, "b", "c"]
    assert documents_of(corpus, "val") == ["one"], "a single document needs no separator"


def test_documents_split_by_hash_without_overlap(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(1000)]
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    corpus = corpus_of(file, val_fraction=0.2)
    train, val = documents_of(corpus, "train"), documents_of(corpus, "val")
    assert sorted(train + val) == sorted(texts)
    assert 150 < len(val) < 250
    assert val != texts[: len(val)]
    assert val != texts[-len(val) :]
    assert set(documents_of(corpus_of(file, val_fraction=0.05), "val")) < set(val), "a smaller share is a part of it"
    two = corpus_of(write_jsonl(tmp_path / "b.jsonl", ["a", "b"]), val_fraction=0.01)
    assert (documents_of(two, "train"), documents_of(two, "val")) == (["a"], ["b"])


def folder_of(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"<{name}>")
    return root


@pytest.mark.parametrize(
    ("names", "train", "val", "test"),
    [
        (["train.txt", "val.txt", "test.txt"], ["train.txt"], ["val.txt"], ["test.txt"]),
        (["Train-0.txt", "train-1.txt", "dev.txt"], ["Train-0.txt", "train-1.txt"], ["dev.txt"], []),
        (["train/b.txt", "train/a.txt", "validation/c.txt"], ["train/a.txt", "train/b.txt"], ["validation/c.txt"], []),
        (["d/train-0.txt", "d/valid-0.txt", "d/test-0.txt"], ["d/train-0.txt"], ["d/valid-0.txt"], ["d/test-0.txt"]),
        (["testament.txt", "values.txt", "val.txt"], ["testament.txt", "values.txt"], ["val.txt"], []),
        (["a.txt", ".hidden.txt", ".git/config.txt", "val.txt"], ["a.txt"], ["val.txt"], []),
        (["train.txt", "notes.txt", "val.txt"], ["train.txt"], ["val.txt"], []),
    ],
)  # fmt: skip
def test_folders(
    names: list[str], train: list[str], val: list[str], test: list[str], tmp_path: Path, capfd: Any
) -> None:
    corpus = corpus_of(folder_of(tmp_path / "d", names))
    found = {split: documents_of(corpus, split) for split in corpus.splits}
    wanted = {"train": train, "val": val, "test": test}
    assert found == {split: [f"<{name}>" for name in files] for split, files in wanted.items() if files}
    assert ("1 files such as notes.txt are not used" in capfd.readouterr().err) == ("notes.txt" in names)


def test_linked_folders_are_read_once_and_loops_end(tmp_path: Path) -> None:
    folder_of(tmp_path / "elsewhere", ["a.txt"])
    root = folder_of(tmp_path / "d", ["b.txt", "val.txt"])
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(root)
    assert sorted(documents_of(corpus_of(root), "train")) == ["<a.txt>", "<b.txt>"]


def test_a_validation_path_is_taken_out_of_the_training_files(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "d", ["a.txt", "b.txt", "c/d.txt", "test.txt"])
    corpus = corpus_of(root, val_path=str(root / "b.txt"), test_path=str(root / "c"))
    found = {split: documents_of(corpus, split) for split in corpus.splits}
    assert found == {"train": ["<a.txt>"], "val": ["<b.txt>"], "test": ["<d.txt>"]} | {"test": ["<c/d.txt>"]}
    with pytest.raises(DataError, match="leave no file to train on"):
        corpus_of(root / "a.txt", val_path=str(root / "a.txt"))


def test_embedded_corpus_splits_without_overlap() -> None:
    corpus = source.open_source(source.EmbeddedData())
    train, val = ({p.where for p in corpus.pieces(split)} for split in ("train", "val"))
    assert len(train) > 100
    assert len(val) > 10
    assert not train & val


def stamps(corpus: Corpus) -> dict[str, int]:
    return {f.name: f.stat().st_mtime_ns for f in corpus.folder.iterdir() if f.suffix != ".lock"}


def test_tokens_are_cached_by_content(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first = corpus_of(file)
    before = stamps(first)
    time.sleep(0.01)
    again = corpus_of(file)
    copy = tmp_path / "elsewhere" / "copy.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(file.read_bytes())
    copied = corpus_of(copy)
    assert again.fingerprint == copied.fingerprint == first.fingerprint
    assert stamps(copied) == before

    others = {
        "tokenizer": corpus_of(file, tokenizer="chars"),
        "val_fraction": corpus_of(file, val_fraction=0.3),
        "val_path": corpus_of(file, val_path=str(write_jsonl(tmp_path / "v.jsonl", ["v"]))),
        "read as text": corpus_of(file.rename(tmp_path / "a.txt"), val_path=str(tmp_path / "v.jsonl")),
        "content": corpus_of(write_jsonl(tmp_path / "a.jsonl", [*TEXTS[:-1], "other"])),
    }
    assert len({first.fingerprint, *(c.fingerprint for c in others.values())}) == 6


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    corpus = corpus_of(file)
    whole = ids_of(corpus, "train")
    tokens = corpus.tokens("train")
    with tokens.file.open("r+b") as opened:
        opened.truncate(101)
    assert tokens.info() is None
    assert ids_of(corpus_of(file), "train") == whole
    tokens.file.unlink()
    assert ids_of(corpus_of(file), "train") == whole


def _prepare(path: Path, ready: Any, said: Any) -> None:
    ready.wait()
    with contextlib.redirect_stderr(io.StringIO()) as heard:
        corpus = corpus_of(path)
    said.put((corpus.fingerprint, len(ids_of(corpus, "train")), heard.getvalue().count("(train) into")))


def test_two_processes_at_once_build_once(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS * 500)
    context = multiprocessing.get_context("fork")
    ready, said = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_prepare, args=(file, ready, said)) for _ in range(2)]
    for process in processes:
        process.start()
    ready.wait()
    (a, n_a, built_a), (b, n_b, built_b) = said.get(timeout=60), said.get(timeout=60)
    for process in processes:
        process.join(timeout=60)
    assert (a, n_a) == (b, n_b)
    assert built_a + built_b == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blocked").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    with pytest.raises(OutputError, match=r"blocked.*set it to a place with room"):
        corpus_of(write_jsonl(tmp_path / "a.jsonl", TEXTS))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "a.jsonl line 1: no column 'text'; it has body, id; name one with"),
        ("a.csv", b"body,id\nx,1\n", "a.csv: no column 'text'; it has body, id; name one with"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', "a.jsonl line 2: text is None, expected text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 7}\n', "a.jsonl line 2: text is 7, expected text"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "a.jsonl line 3: not JSON: "),
        ("a.jsonl", b'"text"\n', "a.jsonl line 1: expected an object with the column 'text', got 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', "a.jsonl line 2: not JSON: 'utf-8' codec can't decode"),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', "a.jsonl line 1: text has half a character (\\ud800) at position 1"),
        ("a.jsonl", b"\n\n", "a.jsonl: no rows"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl line 1: not JSON: "),
        ("a.json", b'[{"text": "x"}, {"text": null}]', "a.json row 2: text is None, expected text"),
        ("a.json", b'[{"text": "x"', "a.json: not readable as json after row 0: "),
        ("a.csv", b"text\n" + b"a\n" * 9 + b"\xe9\n", "a.csv: not UTF-8 text at byte 23 (0xe9); convert it"),
        ("a.csv", b"text\na\n", None),
        ("a.parquet", b"PAR1 not really", "a.parquet: not readable as parquet after row 0: "),
        ("a.txt", b"good " * 50_000 + b"\xff\xfe", "a.txt: not UTF-8 text at byte 250000 (0xff); convert it"),
        ("a.txt", b"", "a.txt: empty file"),
        ("a.txt.gz", gzip.compress(b"text"), "a.txt.gz: compressed; unpack it first"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000)[:-20], "a.jsonl.gz: cannot be read: "),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz: cannot be read: Not a gzipped file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(
    name: str, content: bytes, said: str | None, tmp_path: Path, capfd: Any
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    wanted = "1 document is too few" if said is None else f"{tmp_path}/{said}"
    with pytest.raises(DataError) as caught:
        corpus_of(file)
    assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)
    others = [
        line for line in capfd.readouterr().err.splitlines() if "tokenising " not in line and " tokens, " not in line
    ]
    assert others == [], "a library spoke beside us"


def test_folders_and_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: empty folder; expected text, jsonl, csv or parquet files"):
        corpus_of(tmp_path / "empty")
    with pytest.raises(DataError, match="only validation or test files"):
        corpus_of(folder_of(tmp_path / "d", ["test.txt", "dev.txt"]))
    with pytest.raises(DataError, match=r"gone.txt: No such file"):
        corpus_of(tmp_path / "gone.txt")
    folder_of(tmp_path / "e", ["a.txt", "b.txt"])
    (tmp_path / "e" / "b.txt").write_text("")
    with pytest.raises(DataError, match=r"b.txt: empty file"):
        corpus_of(tmp_path / "e")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("line\n" * 100_000)
    pieces = text_pieces(file)
    next(pieces)
    file.write_text("")
    with pytest.raises(DataError, match="changed while it was read"):
        list(pieces)


@pytest.mark.parametrize("what", ["data", "tokenizer"])
def test_a_hub_out_of_reach_is_told_soon(what: str, tmp_path: Path) -> None:
    options = (
        {"path": "owner/name"}
        if what == "data"
        else {"path": write_jsonl(tmp_path / "a.jsonl", TEXTS), "tokenizer": "gpt2"}
    )
    started = time.monotonic()
    try:
        corpus_of(**options)
    except DataError as error:
        message = str(error)
    else:
        pytest.skip("the hub is within reach here")
    assert time.monotonic() - started < 15
    assert "not to be had from the Hugging Face hub" in message
    assert "data.path=FILES data.tokenizer=DIR" in message
    assert "data=embedded" in message
    assert "\n" not in message
