"""What runs in forks of the server, where torch is: looks into checkpoints."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lm_train import runs, saved
from lm_train.checkpoint import CheckpointReader
from lm_train.errors import CheckpointError
from lm_train.runs import RunFolder


def digest(run: str, answer: str) -> None:
    """Of the tensors, and the generators, of a run's newest checkpoint."""
    checkpoint = runs.latest_checkpoint(RunFolder(run))
    assert checkpoint is not None, f"{run} has no checkpoint"
    Path(answer).write_text(json.dumps({"step": int(checkpoint.name.split("-")[1]), "digest": digest_of(checkpoint)}))


def digest_of(checkpoint: Path) -> str:
    """Of all tensors, whichever rank wrote which part, and of torch's generators."""
    reader = CheckpointReader(checkpoint)
    found = hashlib.blake2b(digest_size=16)
    for name, entry in sorted(reader.manifest.tensors.items()):
        for key in sorted(entry.keys):
            tensor = reader.read(name, key, 0, int(np.prod(entry.shape)))
            found.update(f"{name}|{key}|{entry.shape}".encode())
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    for state in reader.random_states:
        found.update(json.loads(state)["torch"].encode())
    return found.hexdigest()


def _files(root: Path) -> list[Path]:
    """Those of the newest checkpoint, and the pointers."""
    checkpoint = runs.latest_checkpoint(RunFolder(root))
    assert checkpoint is not None
    pointers = [checkpoint.parent / name for name in ("latest", "best")]
    return [*sorted(checkpoint.iterdir()), *(file for file in pointers if file.exists())]


def _is_found(root: Path, file: Path) -> str | None:
    """Whether a start would say that this file is damaged; else what it does instead."""
    checkpoints = RunFolder(root).checkpoints
    try:
        if file.name == "best":
            saved.pointed(checkpoints, saved.BEST)
            return "best was read as if it were whole"
        choice = saved.newest_good(checkpoints)
        if any(str(file) in text for text in choice.skipped):
            return None
        assert choice.checkpoint is not None
        if choice.checkpoint != file.parent:
            return f"{choice.checkpoint} was taken in silence"
        CheckpointReader(choice.checkpoint)
    except CheckpointError as error:
        return None if file.name in str(error) else f"named another file: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not found"


def flips(run: str, seed: int, count: int, answer: str) -> None:
    """Flips single bits, half of them in any file alike, half in any byte alike."""
    _damages(run, seed, count, answer, _flip)


def cuts(run: str, seed: int, count: int, answer: str) -> None:
    """Cuts, empties, removes or lengthens files."""
    _damages(run, seed, count, answer, _cut)


def _damages(run: str, seed: int, count: int, answer: str, damage: Any) -> None:
    draw, root = random.Random(seed), Path(answer).with_suffix(".run")
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(run, root)
    files = _files(root)
    sizes = [file.stat().st_size for file in files]
    failures: list[str] = []
    hit: dict[str, int] = {}
    for number in range(count):
        file = draw.choice(files) if number % 2 else draw.choices(files, sizes)[0]
        whole = file.read_bytes()
        done = damage(draw, file, whole)
        found = _is_found(root, file)
        if found is not None and not (done == "removed" and file.name == "best"):
            failures.append(f"{file.name}, {done}: {found}")
        file.write_bytes(whole)
        hit[file.name] = hit.get(file.name, 0) + 1
    shutil.rmtree(root)
    Path(answer).write_text(json.dumps({"good": count - len(failures), "failures": failures, "files": hit}))


def _flip(draw: random.Random, file: Path, whole: bytes) -> str:
    content, bit = bytearray(whole), draw.randrange(8 * len(whole))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    return f"bit {bit}"


def _cut(draw: random.Random, file: Path, whole: bytes) -> str:
    how = draw.choice(("cut", "cut", "emptied", "removed", "longer"))
    if how == "removed":
        file.unlink()
        return how
    length = {"cut": draw.randrange(len(whole)), "emptied": 0, "longer": len(whole)}[how]
    file.write_bytes(whole[:length] + (draw.randbytes(draw.randint(1, 64)) if how == "longer" else b""))
    return f"{how} to {length}"


def clean_loads(run: str, seed: int, count: int, answer: str) -> None:
    """Reads a whole checkpoint again and again, as a start does and every tensor."""
    failures, first = [], None
    for number in range(count):
        try:
            choice = saved.newest_good(RunFolder(run).checkpoints)
            assert choice.checkpoint is not None
            found = digest_of(choice.checkpoint)
            first = first or found
            if choice.skipped or found != first:
                failures.append(f"load {number}: {choice.skipped}, {found}")
        except Exception as error:
            failures.append(f"load {number}: {type(error).__name__}: {error}")
    Path(answer).write_text(json.dumps({"good": count - len(failures), "failures": failures}))
