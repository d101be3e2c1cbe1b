"""Shards that are damaged, short, missing or swapped: named with file and place; or passed over, the same way everywhere."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm_train.data.shard_files import DamagedShard
from lm_train.errors import DataError, ExitCode
from tests.test_shard_stream import T, batches_of, counting_folder, firsts, module_of, own_cache  # noqa: F401
from tests.text_data import plan_of

BLOCK = 1 << 10


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 1 KiB, so that a small folder has many."""
    for name in ("lm_train.data.shards", "lm_train.data.shard_files"):
        monkeypatch.setattr(f"{name}.BLOCK_BYTES", BLOCK)
    monkeypatch.setattr("lm_train.data.shard_files._BLOCK_BITS", 10)


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 4
    file.write_bytes(content)


def read_all(folder: Path, **options: Any) -> list[int]:
    plan = plan_of(micro=8, steps=150)
    return firsts(list(batches_of(module_of(folder, plan, **options), 0)))


@pytest.mark.parametrize("verify", ["once", "always"])
def test_a_flipped_bit_is_named_with_its_place(verify: str, tmp_path: Path) -> None:
    folder = counting_folder(tmp_path / "a", [1500, 1500, 1700])
    assert len(read_all(folder, verify=verify)) == 1200
    draw = random.Random(1)
    for _ in range(10):
        shard = draw.randrange(3)
        file = folder / f"train-0000{shard}.bin"
        offset = draw.randrange(file.stat().st_size)
        flip(file, offset)
        start = offset // BLOCK * BLOCK
        stop = min(start + BLOCK, file.stat().st_size)
        with pytest.raises(
            DamagedShard, match=rf"{file.name}: bytes {start:,} to {stop:,} have the checksum"
        ) as caught:
            read_all(folder, verify=verify)
        assert caught.value.exit_code == ExitCode.BAD_DATA
        assert "\n" not in str(caught.value)
        flip(file, offset)
    assert len(read_all(folder, verify=verify)) == 1200, "whole again, and no false alarm"


def test_without_verification_sizes_alone_are_looked_at(tmp_path: Path) -> None:
    folder = counting_folder(tmp_path / "a", [1500, 1500])
    flip(folder / "train-00000.bin", 700)
    assert len(read_all(folder, verify="none")) == 1200
    (folder / "train-00001.bin").write_bytes(b"1234")
    with pytest.raises(DamagedShard, match=r"train-00001.bin: 4 bytes, expected 3,000"):
        read_all(folder, verify="none")


def test_swapped_shards_of_one_size_are_found(tmp_path: Path) -> None:
    folder = counting_folder(tmp_path / "a", [1500, 1500])
    one, other = folder / "train-00000.bin", folder / "train-00001.bin"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    with pytest.raises(DamagedShard, match=r"bytes .* have the checksum"):
        read_all(folder)


def test_missing_and_damaged_files_are_named_at_the_start(tmp_path: Path) -> None:
    folder = counting_folder(tmp_path / "a", [1500, 1500])
    (folder / "train-00001.bin").rename(folder / "gone")
    with pytest.raises(DamagedShard, match=r"train-00001.bin: missing, and the manifest names it"):
        module_of(folder, plan_of()).corpus.tokens("train")
    (folder / "gone").rename(folder / "train-00001.bin")
    flip(folder / "train-00001.sum", 3)
    with pytest.raises(DataError, match=r"train-00001.sum: its BLAKE2b is"):
        read_all(folder)
    flip(folder / "tokenizer.json", 30)
    with pytest.raises(DataError, match=r"tokenizer.json: its BLAKE2b is"):
        module_of(folder, plan_of())


@pytest.mark.parametrize("damage", ["flip", "missing", "short"])
def test_damage_is_passed_over_the_same_way_in_every_layout_and_after_a_resume(damage: str, tmp_path: Path) -> None:
    folder = counting_folder(tmp_path / "a", [1500, 1500, 1700])
    file = folder / "train-00001.bin"
    match damage:
        case "flip":
            flip(file, 1500)
            damaged = range(1500 + 512, 1500 + 1024)
        case "missing":
            file.unlink()
            damaged = range(1500, 3000)
        case "short":
            file.write_bytes(file.read_bytes()[:1100])
            damaged = range(1500 + 512, 3000)
    steps = 180
    straight = list(batches_of(module_of(folder, plan_of(1, 12, 1, steps), on_damage="skip"), 0))
    seen = firsts(straight)
    assert not {s for first in seen for s in range(first, first + T + 1)} & set(damaged)
    replaced = sum(batch.get("replaced", 0) for batch in straight)
    assert replaced > 0
    assert all(batch["total"] == 12 * T for batch in straight)
    healthy = [s for s in seen[: 4700 // T - 1] if s % T == 0]
    assert len(set(healthy)) >= len(healthy) - replaced
    for world, micro, accumulate in ((2, 6, 1), (3, 2, 2)):
        module = module_of(folder, plan_of(world, micro, accumulate, steps), on_damage="skip", verify="always")
        ranks = [list(batches_of(module, rank, 40)) for rank in range(world)]
        order = [
            ranks[r][s * accumulate + m] for s in range(steps - 40) for m in range(accumulate) for r in range(world)
        ]
        assert firsts(order) == seen[40 * 12 :]
    with pytest.raises(DamagedShard):
        read_all(folder)


def test_an_evaluation_leaves_damaged_samples_out(tmp_path: Path) -> None:
    folder = counting_folder(tmp_path / "a", [1500])
    module = module_of(folder, plan_of(micro=5), on_damage="skip")
    whole = [module.evaluation_batches("train", 0)[i] for i in range(module.count_batches("train", 0))]
    assert sum(int((batch["targets"] >= 0).sum()) for batch in whole) == 1499
    flip(folder / "train-00000.bin", 100)
    module = module_of(folder, plan_of(micro=5), on_damage="skip")
    rest = [module.evaluation_batches("train", 0)[i] for i in range(module.count_batches("train", 0))]
    assert sum(int((batch["targets"] >= 0).sum()) for batch in rest) == 1499 - 512
    assert len(rest) == len(whole)


def test_nothing_whole_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = counting_folder(tmp_path / "a", [1500])
    (folder / "train-00000.bin").write_bytes(np.zeros(1500, "<u2").tobytes())
    monkeypatch.setattr("lm_train.data.text._ATTEMPTS", 5)
    with pytest.raises(DataError, match=r"train-00000.bin: bytes .* 5 samples in a row are damaged"):
        read_all(folder, on_damage="skip")


def test_what_was_checked_once_is_not_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = counting_folder(tmp_path / "a", [1500, 1500])
    looked: list[int] = []
    inner = __import__("lm_train.data.shard_files", fromlist=["x"]).block_digest
    monkeypatch.setattr("lm_train.data.shard_files.block_digest", lambda view: looked.append(len(view)) or inner(view))
    read_all(folder)
    blocks = 2 * -(-3000 // BLOCK)
    assert len(looked) == blocks, "each block once, however often it is read"
    read_all(folder)
    assert len(looked) == blocks
    (folder / "train-00001.bin").touch()
    read_all(folder)
    assert len(looked) > blocks, "a file that was written to is looked at anew"
