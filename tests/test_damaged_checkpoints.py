"""A checkpoint is trusted only as far as its checksums go: damage is found, named, and stepped back from."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lm_train import checkpoint
from lm_train.checkpoint import CheckpointReader, open_agreed, views_of
from lm_train.errors import CheckpointError
from lm_train.saved import BEST, LATEST, checkpoints_in, newest_good, point, pointed
from lm_train.saved.sealed import sealed
from lm_train.saved.tensors import header_bytes
from tests.ranks_as_threads import on_ranks


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(4, 7)).square().mean().backward()
    optimizer.step()
    return net, optimizer


def save(folder: Path, world: int = 2) -> None:
    """One of `world` ranks' making, with values that belong to its step."""
    step = int(folder.name.removeprefix("step-"))
    net, optimizer = trained(step)
    state = {"step": step, "seed": 1}
    done = on_ranks(
        world, lambda rank, group: checkpoint.save(folder, views_of(net, optimizer, rank, world), state, group)
    )
    assert all(getattr(answer, "folder", None) == folder for answer in done), done


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The `checkpoints` folder of a run that has saved at steps 10, 20 and 30."""
    for step in (10, 20, 30):
        save(tmp_path / f"step-{step}")
    point(tmp_path, BEST, tmp_path / "step-20", value=0.5)
    return tmp_path


def files_of(run: Path) -> list[Path]:
    """Every file by which the newest checkpoint is found and read."""
    return [run / LATEST, run / BEST, *sorted((run / "step-30").iterdir())]


def look(run: Path) -> list[str]:
    """What is found wrong, by the supervisor first and then by two ranks, each of which reads its share."""
    said: list[str] = []
    try:
        pointed(run, BEST)
    except CheckpointError as error:
        said.append(str(error))
    found = newest_good(run)
    assert found.checkpoint is not None
    said += found.skipped
    chosen = found.checkpoint
    readers = on_ranks(2, lambda rank, group: open_agreed(chosen, rank, group, strict=False, say=said.append))
    steps = {reader.state["step"] for reader in readers}
    assert len(steps) == 1
    if said and "best" not in said[0] and "latest" not in said[0]:
        assert steps == {20}
        assert any("going on from step-20; 10 steps are lost and done again" in line for line in said)
    return said


def flips(run: Path, count: int, seed: int) -> Iterator[tuple[Path, int]]:
    """One flipped bit at a time, at random places of all files; the larger a file, the more of them, and some in each."""
    draw = random.Random(seed)
    files = files_of(run)
    sizes = [file.stat().st_size + 200 for file in files]
    for number in range(count):
        file = files[number % len(files)] if number < 3 * len(files) else draw.choices(files, sizes)[0]
        content = file.read_bytes()
        at = draw.randrange(len(content) * 8)
        damaged = bytearray(content)
        damaged[at // 8] ^= 1 << at % 8
        file.write_bytes(damaged)
        yield file, at
        file.write_bytes(content)


def check_flips(run: Path, count: int, seed: int) -> int:
    """The number found, of flips each of which must be named with its file."""
    found = 0
    for file, at in flips(run, count, seed):
        said = look(run)
        assert said, f"bit {at} of {file} went unseen"
        assert str(file) in said[0], said
        found += 1
    assert look(run) == [], "a false alarm"
    return found


def test_every_flipped_bit_is_found_and_the_one_before_is_used(run: Path) -> None:
    assert check_flips(run, 60, seed=0) == 60


@pytest.mark.slow
def test_a_thousand_flips_are_found_and_a_thousand_loads_are_clean(run: Path) -> None:
    assert check_flips(run, 1000, seed=1) == 1000
    for _ in range(1000):
        assert look(run) == []


def test_every_cut_and_every_missing_file_is_found(run: Path) -> None:
    for file in files_of(run):
        content = file.read_bytes()
        for cut in (len(content) - 1, len(content) * 9 // 10, 0):
            file.write_bytes(content[:cut])
            assert str(file) in look(run)[0], f"{file} cut to {cut}"
        file.unlink()
        said = look(run)
        assert file.name == BEST or str(file) in said[0], "no best is no damage"
        file.write_bytes(content)
    assert look(run) == []


@pytest.mark.parametrize("shard", [0, 1])
def test_a_rank_finds_what_another_reads(run: Path, shard: int) -> None:
    """Each rank compares its share only; all of them step back."""
    file = run / "step-30" / f"shard-{shard}.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said: list[str] = []

    def opened(strict: bool) -> list[Any]:
        return on_ranks(
            3, lambda rank, group: open_agreed(run / "step-30", rank, group, strict=strict, say=said.append)
        )

    assert [reader.folder.name for reader in opened(strict=False)] == ["step-20"] * 3
    assert f"{file}: damaged: expected " in said[0]
    assert "found" in said[0]
    assert all(isinstance(error, CheckpointError) and str(file) in str(error) for error in opened(strict=True))


def test_where_none_is_good_the_run_ends(run: Path) -> None:
    for step in (10, 20, 30):
        (run / f"step-{step}" / "state.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"step-30/state.json: damaged.*no good checkpoint is left in .*resume=PATH"
    ):
        newest_good(run)
    shutil.rmtree(run / "step-30")
    shutil.rmtree(run / "step-20")
    shutil.rmtree(run / "step-10")
    with pytest.raises(CheckpointError, match="step-30: missing, but the newest according to"):
        newest_good(run)
    (run / LATEST).unlink()
    assert newest_good(run) == (None, []), "a run that has not saved yet"


def test_latest_decides_and_without_it_the_newest(run: Path) -> None:
    point(run, LATEST, run / "step-20")
    assert newest_good(run) == (run / "step-20", []), "killed before it became the latest, or left by going back"
    shutil.rmtree(run / "step-20")
    found = newest_good(run)
    assert found.checkpoint == run / "step-10"
    assert "10 steps are lost" in found.skipped[-1]
    (run / LATEST).unlink()
    found = newest_good(run)
    assert found.checkpoint == run / "step-30"
    assert found.skipped == [f"{run / LATEST}: missing; the newest checkpoint beside it counts"]


def reseal(file: Path, change: dict[str, Any]) -> None:
    content = json.loads(file.read_text())
    content.pop("blake2b")
    file.write_text(sealed(content | change))


def with_shard(folder: Path, content: bytes) -> None:
    """Puts a shard of someone else's making in place, with the checksum that it needs."""
    file = folder / "shard-0.safetensors"
    file.write_bytes(content)
    digest = checkpoint.saving.hashlib.blake2b(content, digest_size=32).hexdigest()
    files = json.loads((folder / "manifest.json").read_text())["files"]
    reseal(folder / "manifest.json", {"files": files | {file.name: {"bytes": len(content), "blake2b": digest}}})


def test_what_is_made_to_harm_is_refused_in_a_line(tmp_path: Path) -> None:
    """Checkpoints whose checksums are right and whose content is not ours."""
    good = tmp_path / "good" / "step-1"
    save(good, world=1)
    files = json.loads((good / "manifest.json").read_text())["files"]
    tensors = json.loads((good / "manifest.json").read_text())["tensors"]
    row = tensors["0.bias"]
    outside = tmp_path / "outside"
    outside.write_text("{}")
    huge = header_bytes([("0.bias|param|0", "float32", (1 << 38,))], {})
    gap = good / "shard-0.safetensors"
    header_end = 8 + int.from_bytes(gap.read_bytes()[:8], "little")
    header = json.loads(gap.read_bytes()[8:header_end])
    two = [name for name in header if name != "__metadata__"][:2]
    overlapping = json.loads(json.dumps(header))
    overlapping[two[1]]["data_offsets"] = overlapping[two[0]]["data_offsets"]
    overlapping[two[1]]["shape"] = overlapping[two[0]]["shape"]

    def packed(content: dict[str, Any]) -> bytes:
        text = json.dumps(content).encode()
        return len(text).to_bytes(8, "little") + text + gap.read_bytes()[header_end:]

    manifests: list[tuple[dict[str, Any], str]] = [
        ({"files": files | {"../../outside": {"bytes": 2, "blake2b": "0" * 64}}}, "is not a file of the checkpoint"),
        ({"files": files | {"/etc/passwd": {"bytes": 2, "blake2b": "0" * 64}}}, "is not a file of the checkpoint"),
        ({"files": files | {"shard-1.safetensors\x00": {"bytes": 2, "blake2b": "0" * 64}}}, "is not a file of"),
        ({"files": {}}, "expected state.json and 1 shards"),
        ({"world_size": 10**9}, "world_size"),
        ({"world_size": 10**5}, "expected state.json and 100000 shards"),
        ({"format": "__import__('os')"}, "expected format 2"),
        ({"format": 1}, "expected format 2, found 1"),
        ({"tensors": {"0.bias": {**row, "shape": [1 << 70]}}}, "shape"),
        ({"tensors": {"0.bias": {**row, "shape": [-5]}}}, "shape"),
        ({"tensors": tensors | {"0.bias": {**row, "shape": [1 << 40]}}}, "found a gap or an overlap at 5"),
        (
            {"tensors": tensors | {"0.bias": {**row, "keys": {**row["keys"], "param": "int64"}}}},
            "expected a row of int64",
        ),
        ({"tensors": tensors | {"more": row}}, "more param: expected 5 elements, each once"),
        ({"tensors": {}}, "which its manifest does not know"),
        ({"extra": 1}, "extra"),
    ]
    shards: list[tuple[bytes, str]] = [
        (huge, "expected 1,0"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "expected a header within its 10 bytes"),
        (b"", "not a safetensors file"),
        (b"\x80\x04\x95 pickle", "not a safetensors file"),
        ((20000).to_bytes(8, "little") + b"[" * 20000, "header cannot be read"),
        (packed(overlapping), "from"),
        (packed(header | {"../../x|param|0": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), "does not know"),
        (packed(header | {"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), "does not know"),
        (packed({two[0]: {**header[two[0]], "data_offsets": [-4, 4]}}), "header cannot be read"),
        (packed({two[0]: {**header[two[0]], "dtype": "PICKLE"}}), "header cannot be read"),
        (packed({two[0]: {**header[two[0]], "shape": [1e3]}}), "header cannot be read"),
    ]
    for number, (change, said) in enumerate([*manifests, *shards]):
        bad = tmp_path / str(number) / "step-1"
        shutil.copytree(good, bad)
        if isinstance(change, dict):
            reseal(bad / "manifest.json", change)
        else:
            with_shard(bad, change)
        with pytest.raises(CheckpointError) as error:
            CheckpointReader(bad).load(views_of(*trained()))
        text = str(error.value)
        assert said in text, f"{said} is not in {text}"
        assert "\n" not in text
        assert len(text) < 700

    linked = tmp_path / "linked" / "step-1"
    shutil.copytree(good, linked)
    content = (linked / "state.json").read_bytes()
    (linked / "state.json").unlink()
    (tmp_path / "elsewhere.json").write_bytes(content)
    (linked / "state.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match=r"state.json: expected a plain file, found a link"):
        CheckpointReader(linked)


def test_huge_json_is_not_even_read(tmp_path: Path) -> None:
    save(tmp_path / "step-1", world=1)
    with (tmp_path / "step-1" / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(
        CheckpointError, match=r"manifest.json: expected at most 268,435,456 bytes, found 1,099,511,627,776"
    ):
        CheckpointReader(tmp_path / "step-1")
    (tmp_path / LATEST).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="latest: damaged"):
        pointed(tmp_path, LATEST)


def test_a_pointer_stays_inside_its_folder(tmp_path: Path) -> None:
    save(tmp_path / "step-1", world=1)
    for name in ("../step-1", "/step-1", "step-01", "step-1/../step-1", ".step-1.partial", ""):
        (tmp_path / LATEST).write_text(sealed({"checkpoint": name, "step": 1}))
        with pytest.raises(CheckpointError, match="expected the name of a checkpoint"):
            pointed(tmp_path, LATEST)
        assert newest_good(tmp_path).checkpoint == tmp_path / "step-1"
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-00").mkdir()
    assert checkpoints_in(tmp_path) == [tmp_path / "step-1"]
