"""Rows of tables: every form gives the same rows, and what cannot be read names file and line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from lm_train.data.rows import cell, open_rows, read_rows
from lm_train.errors import DataError

ROWS = [
    {"text": 'a "quoted", word', "label": "x"},
    {"text": "two\tthings", "label": "y"},
    {"text": "äöü", "label": "x"},
]


def write(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    match file.name.removesuffix(".gz").rpartition(".")[2]:
        case "csv":
            content = "\n".join(["text,label", '"a ""quoted"", word",x', "two\tthings,y", "äöü,x", ""])
        case "tsv":
            content = "\n".join(["text\tlabel", 'a "quoted", word\tx', "two things\ty", "äöü\tx", ""])
        case "jsonl":
            content = "".join(json.dumps(row) + "\n" for row in ROWS)
        case "json":
            content = json.dumps(ROWS)
        case _:
            import datasets

            features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["x", "y"]))
            datasets.Dataset.from_list(ROWS, features=features).to_parquet(file)
            return file
    file.write_bytes(gzip.compress(content.encode()) if file.suffix == ".gz" else content.encode())
    return file


@pytest.mark.parametrize(
    "name", ["a.csv", "a.csv.gz", "a.tsv", "a.tsv.gz", "a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"]
)
def test_every_form_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    placed = list(read_rows(write(tmp_path / name)))
    rows = [row for row, _ in placed]
    assert rows[0] == ROWS[0]
    assert rows[2] == ROWS[2]
    assert rows[1] == (ROWS[1] if "tsv" not in name else {"text": "two things", "label": "y"})
    places = {"csv": ("line 2", "line 4"), "tsv": ("line 2", "line 4"), "jsonl": ("line 1", "line 3")}
    first, last = places.get(name.split(".")[1], ("row 1", "row 3"))
    assert [place for _, place in placed][::2] == [f"{tmp_path / name} {first}", f"{tmp_path / name} {last}"]


def test_cells_over_several_lines_count_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('text,label\n"one\ntwo",x\nthree,y\n')
    assert [place.split()[-1] for _, place in read_rows(file)] == ["2", "4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\na,b,c\n", "line 2: 3 cells, the header has 2"),
        ("a.csv", b'text,label\n"a,b\n', "line 2: not readable: unexpected end of data"),
        ("a.csv", b"text,text\na,b\n", "line 1: two columns have the same name"),
        ("a.csv", b"text,label\n", "no rows"),
        ("a.csv", b"text,label\n\xff,b\n", "not UTF-8"),
        ("a.csv", "text,label\na,b\n".encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
        ("a.csv", b"\n  \ntext;label\na;b\n", "line 3: only one column, 'text;label'; the separator of a .csv must be"),
        ("a.tsv.gz", b"not gzip", "cannot be read"),
        ("a.jsonl", b'{"text": 1}\n{"text"\n', "line 2: not JSON"),
        ("a.jsonl", b"[1]\n", "line 1: expected an object"),
        ("a.json", b"[1]", "row 1: expected an object"),
        ("a.parquet", b"PAR0", "not readable as parquet"),
        ("a.pdf", b"%PDF", "not a table"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_names_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as raised:
        list(read_rows(tmp_path / name))
    assert str(raised.value).startswith(str(tmp_path / name))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"\ntext,label\n   \na,b\n"),
        ("a.json", b'\xef\xbb\xbf[{"text": "a", "label": "b"}]'),
        ("a.json", b" " * 100_000 + b'[{"text": "a", "label": "b"}]'),
        ("a.json", b'\xef\xbb\xbf{"text": "a", "label": "b"}\n'),
    ],
)
def test_blanks_and_byte_order_marks_are_nothing(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert [row for row, _ in read_rows(tmp_path / name)] == [{"text": "a", "label": "b"}]


def test_a_missing_column_is_named_with_the_nearest() -> None:
    with pytest.raises(
        DataError, match=r"a.csv line 2: no column 'txt'; it has text, label; did you mean data.text_column=text"
    ):
        cell({"text": "a", "label": "b"}, "txt", "a.csv line 2", "data.text_column")


def test_splits_of_a_folder(tmp_path: Path, cache: Path) -> None:
    for name in ("train-0.csv", "train-1.jsonl", "dev.tsv", "test.parquet", "other.csv"):
        write(tmp_path / name)
    (tmp_path / "README.md").write_text("words")
    source = open_rows(str(tmp_path))
    assert {split: len(list(rows())) for split, rows in source.splits.items()} == {"train": 6, "val": 3, "test": 3}
    assert "other.csv" in source.note
    elsewhere = open_rows(str(tmp_path), test_path=str(write(tmp_path / "further" / "rows.csv")))
    assert elsewhere.fingerprint != source.fingerprint
    assert next(elsewhere.splits["test"]())[1].endswith("further/rows.csv line 2")


@pytest.mark.parametrize("split", ["", "train/"])
def test_a_folder_for_each_class(tmp_path: Path, cache: Path, split: str) -> None:
    for place in (
        f"{split}sport/1.txt",
        f"{split}sport/test2.txt",
        f"{split}arts/1.txt",
        "test/arts/9.txt",
        "notes.txt",
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(f"about {place}")
    source = open_rows(str(tmp_path))
    os.utime(tmp_path / "test/arts/9.txt", (1, 1))
    assert open_rows(str(tmp_path)).fingerprint == source.fingerprint, "a copy is the same"
    assert source.columns == ("text", "label")
    assert [row["label"] for row, _ in source.splits["train"]()] == ["arts", "sport", "sport"]
    ((row, where),) = source.splits["test"]()
    assert row == {"text": "about test/arts/9.txt", "label": "arts"}
    assert where == str(tmp_path / "test/arts/9.txt")


def test_a_folder_without_rows(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"1")
    with pytest.raises(DataError, match="neither tables"):
        open_rows(str(tmp_path))
