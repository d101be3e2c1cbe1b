"""The format of prepared text: written and read back, and every way in which a folder is not what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm_train.data.shards import (
    BLOCK_BYTES,
    MANIFEST,
    TOKENIZER,
    UNFINISHED,
    Manifest,
    Shard,
    block_digest,
    check_files,
    digest,
    ids_dtype,
    make_manifest,
    read_index,
    read_manifest,
    read_sums,
    read_tokenizer,
    shard_name,
    write_manifest,
    write_shard,
)
from lm_train.data.tokenizer import load_tokenizer
from lm_train.errors import DataError


def prepared(folder: Path, lengths: tuple[int, ...] = (5, 0, 700_000, 3), shards: int = 2) -> Manifest:
    """A folder with the same documents in each of its shards."""
    tokenizer = load_tokenizer("bytes")
    assert tokenizer is not None
    text = tokenizer.to_str()
    (folder / TOKENIZER).write_text(text, encoding="utf-8")
    draw = np.random.default_rng(1)
    dtype = ids_dtype(257)
    documents = [draw.integers(0, 256, n).astype(dtype) for n in lengths]
    written = [write_shard(folder, shard_name("train", i), documents, dtype) for i in range(shards)]
    train = {
        "tokens": sum(shard.tokens for shard, _ in written),
        "documents": sum(shard.documents for shard, _ in written),
        "text_bytes": 9,
        "max_id": max(max_id for _, max_id in written),
        "shards": [shard for shard, _ in written],
    }
    manifest = make_manifest(
        dtype="uint16",
        tokenizer={"blake2b": digest(text.encode()), "vocab_size": 257, "end_of_text": 256},
        settings={"cleaning": ["unicode"]},
        splits={"train": train},
        documents=digest(b""),
        counts={"read": {"documents": 4}},
    )
    write_manifest(folder, manifest)
    return manifest


def test_what_was_written_is_read(tmp_path: Path) -> None:
    written = prepared(tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest == written
    check_files(tmp_path, manifest)
    shard = manifest.splits["train"].shards[1]
    assert read_index(tmp_path, shard).tolist() == [0, 5, 5, 700_005, 700_008]
    content = (tmp_path / shard.name).read_bytes()
    assert len(content) == 2 * 700_008
    assert digest(content) == shard.blake2b
    blocks = [content[i : i + BLOCK_BYTES] for i in range(0, len(content), BLOCK_BYTES)]
    assert read_sums(tmp_path, shard).tobytes() == b"".join(map(block_digest, blocks))
    assert read_tokenizer(tmp_path, manifest).encode("a b").ids == load_tokenizer("bytes").encode("a b").ids  # type: ignore[union-attr]
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_an_empty_shard(tmp_path: Path) -> None:
    manifest = prepared(tmp_path, lengths=(), shards=1)
    check_files(tmp_path, manifest)
    assert read_index(tmp_path, manifest.splits["train"].shards[0]).tolist() == [0]


def test_what_is_no_manifest(tmp_path: Path) -> None:
    for folder, content, message in (
        ("absent", None, "no such folder"),
        ("empty", None, "no manifest.json"),
        ("broken", "{", "not JSON"),
        ("deep", "[" * 100_000, "not JSON"),
        ("list", "[1]", "expected the manifest"),
        ("other", '{"format": 2}', "format 1; got 2"),
        ("short", '{"format": 1}', "dtype: Field required"),
    ):
        if folder != "absent":
            (tmp_path / folder).mkdir()
        if content is not None:
            (tmp_path / folder / MANIFEST).write_text(content)
        with pytest.raises(DataError, match=message) as caught:
            read_manifest(tmp_path / folder)
        assert folder in str(caught.value)
        assert "\n" not in str(caught.value)
    (tmp_path / "empty" / UNFINISHED).mkdir()
    with pytest.raises(DataError, match="the same lm-train prepare command goes on"):
        read_manifest(tmp_path / "empty")


def test_a_manifest_that_was_changed(tmp_path: Path) -> None:
    prepared(tmp_path)
    file = tmp_path / MANIFEST
    before = file.read_text()
    values: Any = json.loads(before)
    values["splits"]["train"]["shards"][0]["tokens"] += 1
    file.write_text(json.dumps(values))
    with pytest.raises(DataError, match="damaged or edited"):
        read_manifest(tmp_path)
    for bad in ("../../etc/passwd", "/etc/passwd", "train-1.bin", "train-00000.bin\n"):
        values = json.loads(before)
        values["splits"]["train"]["shards"][0]["name"] = bad
        file.write_text(json.dumps(values))
        with pytest.raises(DataError, match=r"splits\.train\.shards\.0\.name"):
            read_manifest(tmp_path)


def test_sums_that_do_not_add_up(tmp_path: Path) -> None:
    manifest = prepared(tmp_path).model_dump(exclude={"fingerprint"})
    for change, message in (
        ({"tokens": 1}, "do not add up"),
        ({"documents": 0}, "do not add up"),
        ({"shards": manifest["splits"]["train"]["shards"][::-1]}, "not numbered"),
    ):
        write_manifest(
            tmp_path, make_manifest(**{**manifest, "splits": {"train": manifest["splits"]["train"] | change}})
        )
        with pytest.raises(DataError, match=message):
            read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00000.idx", "train-00001.sum", "tokenizer.json"])
def test_files_that_are_missing_short_or_changed(tmp_path: Path, name: str) -> None:
    manifest = prepared(tmp_path)
    file = tmp_path / name
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match=name):
        check_files(tmp_path, manifest)
    file.unlink()
    with pytest.raises(DataError, match=name):
        check_files(tmp_path, manifest)
    file.write_bytes(bytes([content[0] ^ 4]) + content[1:])
    shards = manifest.splits["train"].shards
    if name.endswith(".bin"):
        return  # its blocks are checked when they are read
    with pytest.raises(DataError, match=f"{name}: its BLAKE2b"):
        _read_all(tmp_path, manifest, shards)


def _read_all(folder: Path, manifest: Manifest, shards: tuple[Shard, ...]) -> None:
    for shard in shards:
        read_index(folder, shard)
        read_sums(folder, shard)
    read_tokenizer(folder, manifest)
