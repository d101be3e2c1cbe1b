"""Shards over a network: fetched through fsspec piece by piece, kept in a bounded cache that the processes of a machine share.

A piece is some neighbouring blocks of a shard, compared with their checksums as it arrives. What will be needed soon is fetched
by a thread beside the training. A cached piece that no process has looked at for longest goes when room is needed.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from lm_train import heartbeat, signals
from lm_train.data.cache import cache_folder, locked, locked_if_free, writing
from lm_train.data.shard_files import DamagedShard, ShardFile, damage
from lm_train.data.shards import BLOCK_BYTES, BLOCK_DIGEST_BYTES, MANIFEST, Shard, block_digest, parse_sums
from lm_train.errors import DataError, OutputError

PIECE_BYTES = 8 * BLOCK_BYTES
_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Between the tries of one request."""
_ANSWER_S = 60.0
"""So long one request may take."""
_OPEN_PIECES = 64
_LOCKS = 64
_GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""What another try does not change."""

T = TypeVar("T")


def without_secrets(url: str) -> str:
    """A URL without a user's name and password, and without what follows a question mark."""
    return re.sub(r"://[^/@]*@", "://", url).partition("?")[0]


class RemoteFolder:
    """A prepared folder behind a URL.

    Args:
        url: as fsspec takes it, such as s3://bucket/folder.
        cache_gb: room for pieces on this machine, of all sources together.
        verifies: compare what arrives with its checksums.

    Raises:
        DataError: if the URL is of a kind that nothing here can read.
    """

    def __init__(self, url: str, cache_gb: float, verifies: bool = True) -> None:
        self.url = url
        self.label, self.verifies = without_secrets(url).rstrip("/"), verifies
        self.identity = hashlib.blake2b(self.label.encode(), digest_size=16).hexdigest()
        """Of the content: what was cached under another one is another folder's."""
        self.cache = PieceCache(cache_folder() / "pieces", round(cache_gb * 1e9))
        self._process = 0
        try:
            self._connect()
        except (ImportError, ValueError, OSError) as error:
            raise DataError(f"{self.label}: cannot be read: {' '.join(str(error).split())[:200]}") from None

    @property
    def fs(self) -> Any:
        """The file system, made anew in a forked process, where the threads of the old one are not."""
        if self._process != os.getpid():
            self._connect()
        return self._fs

    def _connect(self) -> None:
        self._fs, self.root = fsspec.core.url_to_fs(self.url, skip_instance_cache=self._process != 0)
        self._process = os.getpid()

    def read(self, name: str) -> bytes:
        return self.ask(name, lambda: self.fs.cat_file(f"{self.root}/{name}"))

    def read_range(self, name: str, begin: int, end: int) -> bytes:
        """The bytes from `begin` up to `end` of a file."""
        return self.ask(name, lambda: self.fs.cat_file(f"{self.root}/{name}", start=begin, end=end))

    def shard_files(self, shards: Sequence[Shard], width: int) -> list[ShardFile]:
        listed = self.ask(MANIFEST, self._sizes)
        for shard in shards:
            found = listed.get(shard.name)
            if found is None and listed:
                raise DamagedShard(f"{self.label}/{shard.name}: missing, and the manifest names it; copy it there")
            if found is not None and found != shard.bytes:
                raise DamagedShard(
                    f"{self.label}/{shard.name}: {found:,} bytes, expected {shard.bytes:,}; copy it there again"
                )
        return [RemoteShard(self, shard) for shard in shards]

    def _sizes(self) -> dict[str, int]:
        """Of the files there; nothing where a server lists none, or does not say how large they are."""
        try:
            rows = self.fs.ls(self.root, detail=True)
        except (NotImplementedError, FileNotFoundError, PermissionError):
            return {}
        sizes = {row["name"].rstrip("/").rpartition("/")[2]: row.get("size") for row in rows}
        return {} if any(size is None for size in sizes.values()) else sizes

    def ask(self, name: str, call: Callable[[], T]) -> T:
        """What a request gives, tried again with growing pauses.

        Raises:
            DataError: if it gives nothing.
            StopRequested: if a signal asked for a stop meanwhile.
        """
        where, began = f"{self.label}/{name}", time.monotonic()
        for pause in (*_PAUSES_S, None):
            try:
                return _answered(call)
            except _GONE as error:
                raise DataError(f"{where}: cannot be read ({type(error).__name__}); is the path right?") from None
            except Exception as error:
                if pause is None:
                    said = " ".join(str(error).split())[:200]
                    raise DataError(
                        f"{where}: out of reach after {len(_PAUSES_S) + 1} tries in {time.monotonic() - began:.0f} s "
                        f"({type(error).__name__}: {said}); start again when it answers, the run goes on from its last "
                        "checkpoint"
                    ) from None
            _wait(pause)
        raise AssertionError


def _answered(call: Callable[[], T]) -> T:
    """The result of a call, by a thread that is left behind if it never returns."""
    found: list[T] = []
    fault: list[BaseException] = []

    def ask() -> None:
        try:
            found.append(call())
        except BaseException as error:
            fault.append(error)

    thread = threading.Thread(target=ask, name="request", daemon=True)
    with signals.blocked():
        thread.start()
    until = time.monotonic() + _ANSWER_S
    while thread.is_alive() and time.monotonic() < until:
        thread.join(timeout=0.5)
        signals.check()
        heartbeat.alive()
    if fault:
        raise fault[0]
    if not found:
        raise TimeoutError(f"no answer in {_ANSWER_S:g} s")
    return found[0]


def _wait(seconds: float) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        signals.check()
        heartbeat.alive()
        time.sleep(min(left, 0.2))


class RemoteShard:
    """One shard behind a URL."""

    def __init__(self, folder: RemoteFolder, shard: Shard) -> None:
        self.folder, self.shard = folder, shard
        self.where = f"{folder.label}/{shard.name}"
        self._sums: bytes | None = None
        self._good: set[int] = set()
        self._damaged: dict[int, str] = {}

    def read(self, begin: int, end: int) -> memoryview | bytes:
        first, last = begin // PIECE_BYTES, (end - 1) // PIECE_BYTES
        parts = []
        for piece in range(first, last + 1):
            start = piece * PIECE_BYTES
            view = self._piece(piece)
            parts.append(view[max(begin - start, 0) : min(end - start, PIECE_BYTES)])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def fetch(self, piece: int, waits: bool = True) -> None:
        """Sees to it that a piece is in the cache; without `waits` leaves it to a process that is already at it."""
        size = min(PIECE_BYTES, self.shard.bytes - piece * PIECE_BYTES)
        with self.folder.cache.filling(self._name(piece), size, waits) as put:
            if put is not None:
                begin = piece * PIECE_BYTES
                content = self.folder.read_range(self.shard.name, begin, begin + size)
                try:
                    self._check(piece, content)
                except DamagedShard as error:
                    self._damaged[piece] = str(error)
                    raise
                put(content)
                self._good.add(piece)

    def has(self, piece: int) -> bool:
        """Whether a piece is in the cache."""
        return self.folder.cache.has(self._name(piece), min(PIECE_BYTES, self.shard.bytes - piece * PIECE_BYTES))

    def _piece(self, piece: int) -> memoryview:
        if piece in self._damaged:
            raise DamagedShard(self._damaged[piece])
        name, size = self._name(piece), min(PIECE_BYTES, self.shard.bytes - piece * PIECE_BYTES)
        while True:
            view = self.folder.cache.open(name, size)
            if view is None:
                self.fetch(piece)
                continue
            if piece not in self._good:  # from an earlier start, or another process'
                try:
                    self._check(piece, view)
                except DamagedShard:
                    self.folder.cache.drop(name)
                    continue
                self._good.add(piece)
            return view

    def _check(self, piece: int, content: bytes | memoryview) -> None:
        size = min(PIECE_BYTES, self.shard.bytes - piece * PIECE_BYTES)
        if len(content) != size:
            raise DataError(
                f"{self.where}: {len(content):,} bytes came where {size:,} were asked for; is the file whole, and does the "
                "server know ranges?"
            )
        if not self.folder.verifies:
            return
        if self._sums is None:
            name = self.shard.sums_name
            self._sums = parse_sums(self.folder.read(name), self.shard, f"{self.folder.label}/{name}").tobytes()
        first = piece * (PIECE_BYTES // BLOCK_BYTES)
        for number in range(-(-size // BLOCK_BYTES)):
            begin = number * BLOCK_BYTES
            found = block_digest(memoryview(content)[begin : begin + BLOCK_BYTES])
            at = (first + number) * BLOCK_DIGEST_BYTES
            expected = self._sums[at : at + BLOCK_DIGEST_BYTES]
            if found != expected:
                start = piece * PIECE_BYTES + begin
                raise DamagedShard(
                    damage(
                        self.where,
                        start,
                        start + min(BLOCK_BYTES, size - begin),
                        f"have the checksum {found.hex()}, expected {expected.hex()}",
                    )
                )

    def _name(self, piece: int) -> str:
        return f"{self.folder.identity}-{self.shard.name}-{piece:06}"


class PieceCache:
    """Files in a folder, of a bounded number of bytes; any number of processes of a machine may use it at once.

    Args:
        folder: where.
        limit: bytes of all files together. What a process still reads when it is removed takes its room until it is closed.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._open: OrderedDict[str, memoryview] = OrderedDict()
        self._mutex = threading.Lock()

    def has(self, name: str, size: int) -> bool:
        try:
            return (self.folder / name).stat().st_size == size
        except OSError:
            return False

    def open(self, name: str, size: int) -> memoryview | None:
        """A file's content, or None if it is not there in its size."""
        with self._mutex:
            view = self._open.get(name)
            if view is not None:
                self._open.move_to_end(name)
                return view
        try:
            with (self.folder / name).open("rb") as opened:
                if os.fstat(opened.fileno()).st_size != size:
                    return None
                view = memoryview(mmap.mmap(opened.fileno(), size, prot=mmap.PROT_READ))
            os.utime(self.folder / name)  # looked at just now
        except OSError:
            return None
        with self._mutex:
            self._open[name] = view
            while len(self._open) > _OPEN_PIECES:
                self._open.popitem(last=False)
        return view

    def drop(self, name: str) -> None:
        with self._mutex:
            self._open.pop(name, None)
        with suppress(OSError):
            (self.folder / name).unlink()

    @contextmanager
    def filling(self, name: str, size: int, waits: bool) -> Iterator[Callable[[bytes], None] | None]:
        """A function that puts the content of a file there; None if it is there, or `waits` is false and another process is at
        it.

        Raises:
            OutputError: if it cannot be written.
        """
        number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=2).digest(), "little") % _LOCKS
        lock = self.folder / "locks" / f"{number}.lock"
        if waits:
            with locked(lock):
                yield None if self.has(name, size) else lambda content: self._put(name, content)
            return
        with locked_if_free(lock) as free:
            yield (lambda content: self._put(name, content)) if free and not self.has(name, size) else None

    def _put(self, name: str, content: bytes) -> None:
        if len(content) > self.limit:
            raise OutputError(
                f"{self.folder}: data.cache_gb={self.limit / 1e9:g} has no room for one piece of {len(content):,} bytes"
            )
        partial = self.folder / f".{uuid.uuid4().hex}"
        with writing(self.folder / name):
            try:
                with locked(self.folder / "locks" / "room.lock"):
                    self._make_room(len(content))
                    partial.write_bytes(content)
                    partial.replace(self.folder / name)
            finally:
                partial.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        files: list[tuple[float, int, str]] = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.is_file():
                        stat = entry.stat()
                        files.append((stat.st_mtime, stat.st_size, entry.path))
        total = sum(length for _, length, _ in files)
        for _, length, path in sorted(files):
            if total + size <= self.limit:
                return
            with suppress(FileNotFoundError):
                Path(path).unlink()
            total -= length


class Prefetcher:
    """Fetches what the positions ahead of the training need, in a thread of the process that reads.

    Args:
        places: shard, first and last byte + 1 of what stretches of positions read: places(first position, count).
        file: a shard by its number.
        budget: bytes that may be fetched ahead.
    """

    def __init__(
        self,
        places: Callable[[int, int], list[tuple[int, int, int]]],
        file: Callable[[int], Any],
        budget: int,
        stretch: int = 256,
    ) -> None:
        self.places, self.file, self.budget, self.stretch = places, file, budget, stretch
        self._at = 0
        self._process = 0
        self._wake = threading.Event()

    def follow(self, position: int) -> None:
        """The training is at this position."""
        self._at = position
        if self._process != os.getpid():  # a thread does not come along into a forked process
            self._process = os.getpid()
            self._wake = threading.Event()
            thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
            with signals.blocked():
                thread.start()
        self._wake.set()

    def _run(self) -> None:
        ahead: OrderedDict[int, set[tuple[int, int]]] = OrderedDict()  # what each stretch needs
        next_one = self._at // self.stretch
        while True:
            now = self._at // self.stretch
            for number in [n for n in ahead if n < now]:
                del ahead[number]
            next_one = max(next_one, now)
            needed: set[tuple[int, int]] = set().union(*ahead.values())
            if len(needed) * PIECE_BYTES >= self.budget or len(ahead) >= 4096:
                self._wake.clear()
                if self._at // self.stretch == now:
                    self._wake.wait(timeout=5.0)
                continue
            pieces: list[tuple[int, int]] = []
            for shard, begin, end in self.places(next_one * self.stretch, self.stretch):
                pieces += ((shard, piece) for piece in range(begin // PIECE_BYTES, (end - 1) // PIECE_BYTES + 1))
            ahead[next_one] = set(pieces)
            next_one += 1
            for shard, piece in dict.fromkeys(pieces):
                file = self.file(shard)
                if (shard, piece) not in needed and not file.has(piece):
                    with suppress(Exception):  # whoever reads it will see it for himself
                        file.fetch(piece, waits=False)
