"""A checkpoint's table of contents, and whether its files are what was written.

step-N/shard-R.safetensors   1-D tensors named `parameter|key|start`: what rank R holds of each parameter (key `param`),
                             optimizer state (its own keys) and buffer (`buffer`), as a range of the flattened tensor;
                             the rank's random-number states in the header
step-N/state.json            counters and positions
step-N/manifest.json         sealed: shapes, types and keys of all tensors; size and BLAKE2b of every other file
"""

from __future__ import annotations

import hashlib
import math
import re
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lm_train.errors import CheckpointError
from lm_train.saved.sealed import parse, read_sealed, read_small

FORMAT = 2
MANIFEST, STATE = "manifest.json", "state.json"
_OURS = re.compile(r"shard-(0|[1-9][0-9]{0,6})\.safetensors|state\.json")
Count = Annotated[int, Field(ge=0, lt=1 << 60)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class StoredFile(_Strict):
    bytes: Count
    blake2b: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StoredTensor(_Strict):
    shape: Annotated[tuple[Count, ...], Field(strict=False, max_length=64)]
    keys: dict[str, str]
    """Type by key: `param` or `buffer`, and the optimizer's states."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Manifest(_Strict):
    format: int
    world_size: Annotated[int, Field(ge=1, lt=1 << 24)]
    optimizer: str
    """Class that the states belong to."""
    optimizer_step: int | None
    """Which drives bias correction."""
    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]

    @property
    def shards(self) -> list[str]:
        """Names of the shards, in the order of ranks."""
        return sorted((name for name in self.files if name != STATE), key=lambda name: int(name[6:-12]))

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    @property
    def n_parameters(self) -> int:
        return sum(tensor.numel for tensor in self.tensors.values() if "param" in tensor.keys)


def open_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint all of whose files are there, of their sizes; cheap: no tensor is read.

    Raises:
        CheckpointError: naming the file, what was expected and what was found.
    """
    file = folder / MANIFEST
    try:
        content = read_sealed(file)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{file}: missing; {folder.name} is not a checkpoint, or an incomplete one") from None
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{file}: expected format {FORMAT}, found {str(content.get('format'))[:80]}")
    content.pop("blake2b")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:200]
        raise CheckpointError(f"{file}: {where}: {first['msg']}, found {str(first['input'])[:80]!r}") from None
    for name in manifest.files:
        if not _OURS.fullmatch(name):
            raise CheckpointError(f"{file}: names {name[:200]!r}, which is not a file of the checkpoint")
    expected = {STATE, *(f"shard-{rank}.safetensors" for rank in range(manifest.world_size))}
    if manifest.files.keys() != expected:
        name = min(manifest.files.keys() ^ expected)
        raise CheckpointError(f"{file}: expected {STATE} and {manifest.world_size} shards, found another list ({name})")
    for name, stored in manifest.files.items():
        _check_size(folder / name, stored)
    return manifest


def read_state(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """`state.json`, after its checksum.

    Raises:
        CheckpointError: if it is damaged.
    """
    file = folder / STATE
    try:
        content = read_small(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; the checkpoint is not usable") from None
    _compare(file, manifest.files[STATE], len(content), hashlib.blake2b(content, digest_size=32).hexdigest())
    return parse(file, content)


def verify(folder: Path, manifest: Manifest, names: Iterable[str] | None = None, threads: int = 1) -> None:
    """Reads files whole and compares their checksums.

    Args:
        folder: of the checkpoint.
        manifest: its own.
        names: some of its files; None: all of them.
        threads: files that are read at the same time.

    Raises:
        CheckpointError: naming the first file that is not what was written.
    """

    def check(name: str) -> None:
        file, stored = folder / name, manifest.files[name]
        _check_size(file, stored)
        try:
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
        _compare(file, stored, stored.bytes, digest)

    chosen = sorted(manifest.files if names is None else names)
    if threads == 1:
        for name in chosen:
            check(name)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(check, chosen))


def _check_size(file: Path, stored: StoredFile) -> None:
    try:
        status = file.lstat()
    except OSError:
        raise CheckpointError(f"{file}: missing; the checkpoint is not usable") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file}: expected a plain file, found a link, a folder or a device")
    if status.st_size != stored.bytes:
        raise CheckpointError(f"{file}: damaged: expected {stored.bytes:,} bytes, found {status.st_size:,}")


def _compare(file: Path, stored: StoredFile, size: int, digest: str) -> None:
    if (size, digest) != (stored.bytes, stored.blake2b):
        raise CheckpointError(
            f"{file}: damaged: expected {stored.bytes:,} bytes with checksum {stored.blake2b[:12]}..., found {size:,} bytes "
            f"with {digest[:12]}..."
        )
