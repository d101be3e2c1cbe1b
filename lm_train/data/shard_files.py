"""Shards on this machine: read through a memory map, each block compared with its checksum when it is first touched."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from lm_train.data.cache import cache_folder
from lm_train.data.shards import BLOCK_BYTES, BLOCK_DIGEST_BYTES, Shard, block_digest, parse_sums
from lm_train.errors import DataError

Verify = Literal["once", "always", "none"]
_UNKNOWN, _GOOD, _DAMAGED = 0, 1, 2
_BLOCK_BITS = BLOCK_BYTES.bit_length() - 1


class DamagedShard(DataError):
    """A part of a shard that is not what was written."""


class ShardFile(Protocol):
    """One shard to be read from."""

    where: str
    """Its name for a person."""

    def read(self, begin: int, end: int) -> memoryview | bytes:
        """The bytes from `begin` up to `end`, which lie inside the shard.

        Raises:
            DamagedShard: if they are not what was written.
            DataError: if they cannot be had.
        """


class Folder(Protocol):
    """Where the files of one prepared folder come from."""

    label: str
    """What a person calls it; no secrets."""

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            DataError: if it cannot be had.
        """

    def shard_files(self, shards: Sequence[Shard], width: int) -> list[ShardFile]:
        """The shards of a split, each of ids of `width` bytes; presence and sizes are checked.

        Raises:
            DataError: naming the first one that is missing or of another size.
        """


class LocalFolder:
    """A prepared folder on a file system.

    Args:
        path: of the folder.
        verify: when a block is compared with its checksum: once on this machine (until its file changes), once in every
            process, or never.
        skips: a missing or short shard is damaged, not an error.
    """

    def __init__(self, path: Path, verify: Verify, skips: bool = False) -> None:
        self.path, self.verify, self.skips = path, verify, skips
        self.label = str(path)

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise DataError(f"{self.path / name}: cannot be read: {error.strerror}") from None

    def shard_files(self, shards: Sequence[Shard], width: int) -> list[ShardFile]:
        found = [self._stat(shard) for shard in shards]
        blocks = [-(-shard.bytes // BLOCK_BYTES) for shard in shards]
        checked = self._checked(shards, found, sum(blocks))
        files: list[ShardFile] = []
        first = 0
        for shard, stat, count in zip(shards, found, blocks, strict=True):
            mine = None if checked is None else checked[first : first + count]
            files.append(LocalShard(self.path / shard.name, shard, stat.st_size if stat else 0, self.read, mine))
            first += count
        return files

    def _stat(self, shard: Shard) -> os.stat_result | None:
        file = self.path / shard.name
        try:
            stat = file.stat()
        except OSError:
            if self.skips:
                return None
            raise DamagedShard(
                f"{file}: missing, and the manifest names it; prepare the text again, or copy it; data.on_damage=skip "
                "trains on the rest"
            ) from None
        if stat.st_size != shard.bytes and not self.skips:
            raise DamagedShard(
                f"{file}: {stat.st_size:,} bytes, expected {shard.bytes:,}; prepare the text again, or copy it again; "
                "data.on_damage=skip trains on the rest"
            )
        return stat

    def _checked(
        self, shards: Sequence[Shard], found: Sequence[os.stat_result | None], blocks: int
    ) -> memoryview | None:
        """What is known of each block, one byte each; shared by the processes of this machine where it may be remembered."""
        if self.verify == "none":
            # nothing is compared, yet what is not there cannot be read
            return (
                None
                if all(s and s.st_size == shard.bytes for s, shard in zip(found, shards, strict=True))
                else (memoryview(bytearray(blocks)))
            )
        if self.verify == "always" or not blocks:
            return memoryview(bytearray(blocks))
        identity = hashlib.blake2b(str(self.path.resolve()).encode(), digest_size=16)
        for shard, stat in zip(shards, found, strict=True):
            facts = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) if stat else ()
            identity.update(f"\0{shard.name}\0{shard.blake2b}\0{facts}".encode())
        file = cache_folder() / "verified" / identity.hexdigest()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if os.fstat(descriptor).st_size != blocks:
                    os.ftruncate(descriptor, blocks)
                return memoryview(mmap.mmap(descriptor, blocks))
            finally:
                os.close(descriptor)
        except OSError:  # a cache that cannot be written costs each process a look of its own
            return memoryview(bytearray(blocks))


class LocalShard:
    """One shard through a memory map.

    Args:
        file: the .bin.
        shard: what the manifest says of it.
        size: bytes that are there.
        read_file: reads the checksums by their name, once they are needed.
        checked: what is known of each block; None: nothing is compared.
    """

    def __init__(
        self, file: Path, shard: Shard, size: int, read_file: Callable[[str], bytes], checked: memoryview | None
    ) -> None:
        self.where, self.shard, self.size = str(file), shard, size
        self._file, self._read_file, self._checked = file, read_file, checked
        self._view: memoryview | None = None
        self._sums: bytes | None = None

    def read(self, begin: int, end: int) -> memoryview:
        checked = self._checked
        if checked is not None and not (
            checked[begin >> _BLOCK_BITS] == _GOOD and checked[(end - 1) >> _BLOCK_BITS] == _GOOD
        ):
            self._check(begin, end)
        if self._view is None:
            self._view = self._mapped()
        return self._view[begin:end]

    def _mapped(self) -> memoryview:
        if not self.size:
            return memoryview(b"")
        try:
            with self._file.open("rb") as opened:
                mapped = mmap.mmap(opened.fileno(), self.size, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise DamagedShard(f"{self.where}: cannot be read: {error}") from None
        return memoryview(mapped)

    def _check(self, begin: int, end: int) -> None:
        assert self._checked is not None
        if self._view is None:
            self._view = self._mapped()
        for block in range(begin >> _BLOCK_BITS, ((end - 1) >> _BLOCK_BITS) + 1):
            if self._checked[block] == _UNKNOWN:
                self._checked[block] = _GOOD if self._is_good(block) else _DAMAGED
            if self._checked[block] == _DAMAGED:
                raise DamagedShard(self._damage(block))

    def _is_good(self, block: int) -> bool:
        assert self._view is not None
        start, stop = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self.shard.bytes)
        if stop > self.size:
            return False
        return block_digest(self._view[start:stop]) == self._expected(block)

    def _expected(self, block: int) -> bytes:
        if self._sums is None:
            name = self.shard.sums_name
            self._sums = parse_sums(self._read_file(name), self.shard, str(self._file.with_name(name))).tobytes()
        return self._sums[block * BLOCK_DIGEST_BYTES : (block + 1) * BLOCK_DIGEST_BYTES]

    def _damage(self, block: int) -> str:
        start, stop = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self.shard.bytes)
        if stop > self.size:
            what = "are not there"
        else:
            assert self._view is not None
            found = block_digest(self._view[start:stop]).hex()
            what = f"have the checksum {found}, expected {self._expected(block).hex()}"
        return damage(self.where, start, stop, what)


def damage(where: str, start: int, stop: int, what: str) -> str:
    return (
        f"{where}: bytes {start:,} to {stop:,} {what}: damaged, or another shard's; copy the file again, or train on the "
        "rest with data.on_damage=skip"
    )
