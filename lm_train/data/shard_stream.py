"""The tokens of prepared folders, one source after another, as a language model's batches read them."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from lm_train.data.batches import Integers, Split
from lm_train.data.corpus import SplitInfo
from lm_train.data.documents import DocumentStarts
from lm_train.data.mixing import Part
from lm_train.data.remote import RemoteFolder
from lm_train.data.shard_files import Folder, LocalFolder, ShardFile
from lm_train.data.shards import MANIFEST, Manifest, Shard, digest, parse_manifest, read_manifest
from lm_train.errors import DataError
from lm_train.recipe import ShardData

_CHUNK_BYTES = 1 << 23
"""Neighbouring blocks that stay together when shards are fetched over a network: as much as is fetched at a time."""


@dataclass(frozen=True)
class ShardSource:
    """One prepared folder, opened."""

    folder: Folder
    manifest: Manifest
    weight: float | None
    """Share of the mixture; None: by its tokens."""
    window_bytes: int | None
    """Bytes that are shuffled together; None: all."""


class ShardTokens:
    """One split of the sources, as if all its tokens lay in one row.

    Args:
        sources: of the same tokenizer; those without the split have no tokens in it.
        split: which.
        block_size: tokens that a sample predicts.
        skips: a damaged sample is replaced by another one.
        boundaries: where documents begin is wanted.
    """

    def __init__(
        self, sources: Sequence[ShardSource], split: Split, block_size: int, skips: bool, boundaries: bool
    ) -> None:
        self.sources = [source for source in sources if split in source.manifest.splits]
        self.split, self.block_size, self.skips = split, block_size, skips
        self.dtype = self.sources[0].manifest.ids
        width = self.dtype.itemsize
        self._width = width
        self.shards: list[tuple[Folder, Shard]] = []
        self._files: list[ShardFile] = []
        for source in self.sources:
            shards = source.manifest.splits[split].shards
            self.shards += [(source.folder, shard) for shard in shards]
            self._files += source.folder.shard_files(shards, width)
        self._sizes = [shard.bytes for _, shard in self.shards]
        counts = [shard.tokens for _, shard in self.shards]
        self._firsts = np.concatenate(([0], np.cumsum(counts)))[:-1].astype(np.int64).tolist()
        self.documents = DocumentStarts(self.shards, self._firsts) if boundaries else None

    def info(self) -> SplitInfo:
        """Facts of the whole split."""
        splits = [source.manifest.splits[self.split] for source in self.sources]
        largest = max(range(len(splits)), key=lambda i: splits[i].max_id)
        return SplitInfo(
            tokens=sum(split.tokens for split in splits),
            text_bytes=sum(split.text_bytes for split in splits),
            documents=sum(split.documents for split in splits),
            max_id=splits[largest].max_id,
            max_id_where=f"{self.sources[largest].folder.label}: {self.split}",
        )

    def available(self) -> int:
        return self.info().tokens

    def parts(self) -> list[Part]:
        """What the mixture is made of; each source has one block at least.

        Raises:
            DataError: naming a source that has fewer tokens.
        """
        parts = []
        for source in self.sources:
            tokens = source.manifest.splits[self.split].tokens
            if tokens < 2 * self.block_size:
                raise DataError(
                    f"{source.folder.label}: {tokens:,} training tokens make no sample of model.block_size="
                    f"{self.block_size}; lower it, or leave this source out"
                )
            sample_bytes = self.block_size * self._width
            chunk = None if source.window_bytes is None else max(1, _CHUNK_BYTES // sample_bytes)
            chunks = 1 if chunk is None else max(1, (source.window_bytes or 0) // (chunk * sample_bytes))
            weight = float(tokens) if source.weight is None else source.weight
            parts.append(Part(tokens, weight, chunk, chunks))
        return parts

    def rows(self, starts: Integers, length: int) -> npt.NDArray[np.unsignedinteger]:
        """`length` tokens from each start, (len(starts), length), as they lie on disk.

        Raises:
            DamagedShard: if some of them are not what was written.
            DataError: if they are out of reach.
        """
        firsts, sizes, files, width = self._firsts, self._sizes, self._files, self._width
        size = length * width
        pieces: list[memoryview | bytes] = []
        for start in starts.tolist():
            number = bisect_right(firsts, start) - 1
            begin = (start - firsts[number]) * width
            if begin + size <= sizes[number]:
                pieces.append(files[number].read(begin, begin + size))
            else:
                pieces += self._across(number, begin, size)
        return np.frombuffer(b"".join(pieces), dtype=self.dtype).reshape(len(starts), length)

    def _across(self, number: int, begin: int, size: int) -> list[memoryview | bytes]:
        """A row that begins in one shard and ends in a later one."""
        pieces: list[memoryview | bytes] = []
        while size:
            end = min(begin + size, self._sizes[number])
            if end > begin:
                pieces.append(self._files[number].read(begin, end))
            size -= end - begin
            number, begin = number + 1, 0
        return pieces

    def places(self, starts: Integers, length: int) -> list[tuple[int, int, int]]:
        """Shard, first and last byte + 1 of what `rows` reads; for whoever fetches it beforehand."""
        found, size = [], length * self._width
        for start in starts.tolist():
            number = bisect_right(self._firsts, start) - 1
            begin, left = (start - self._firsts[number]) * self._width, size
            while left:
                end = min(begin + left, self._sizes[number])
                if end > begin:
                    found.append((number, begin, end))
                left -= end - begin
                number, begin = number + 1, 0
        return found

    @property
    def is_remote(self) -> bool:
        return any(isinstance(source.folder, RemoteFolder) for source in self.sources)

    @property
    def prefetch_bytes(self) -> int:
        """What may be fetched ahead: half of the cache, the other half holds what is in use."""
        return min(s.folder.cache.limit // 2 for s in self.sources if isinstance(s.folder, RemoteFolder))

    def file(self, number: int) -> ShardFile:
        return self._files[number]


class ShardCorpus:
    """Prepared folders: their tokenizer, their splits, and a fingerprint of what they hold and how they are mixed.

    Args:
        section: the recipe's data section.
        block_size: tokens that a sample predicts.

    Raises:
        DataError: if a folder is missing, wrong, out of reach, or was made with another tokenizer than the others.
    """

    def __init__(self, section: ShardData, block_size: int) -> None:
        self.section, self.block_size = section, block_size
        self.skips = section.on_damage == "skip"
        self.sources = _opened(section)
        first = self.sources[0]
        for other in self.sources[1:]:
            if other.manifest.tokenizer.blake2b != first.manifest.tokenizer.blake2b:
                raise DataError(
                    f"{other.folder.label}: its tokenizer is not that of {first.folder.label}; prepare both with the same "
                    f"data.tokenizer (BLAKE2b {other.manifest.tokenizer.blake2b[:8]} and "
                    f"{first.manifest.tokenizer.blake2b[:8]})"
                )
        self.tokenizer = _tokenizer(first.folder, first.manifest)
        self.label = ", ".join(source.folder.label for source in self.sources)
        if "train" not in first.manifest.splits:
            raise DataError(f"{first.folder.label}: no training split; prepare the text again")
        names: tuple[Split, ...] = ("train", "val", "test")
        self.splits = tuple(
            name
            for name in names
            if any(name in s.manifest.splits and s.manifest.splits[name].tokens for s in self.sources)
        )
        parts = [(s.manifest.fingerprint, s.weight, s.window_bytes) for s in self.sources]
        self.fingerprint = hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
        self._tokens: dict[Split, ShardTokens] = {}

    @property
    def is_remote(self) -> bool:
        return any(isinstance(source.folder, RemoteFolder) for source in self.sources)

    def tokens(self, split: Split) -> ShardTokens:
        if split not in self._tokens:
            self._tokens[split] = ShardTokens(
                self.sources, split, self.block_size, self.skips, self.section.document_boundaries
            )
        return self._tokens[split]


def _opened(section: ShardData) -> list[ShardSource]:
    opened = []
    wanted = section.wanted
    for path, weight in wanted:
        folder: Folder
        if "://" in path:
            remote = RemoteFolder(path, section.cache_gb, section.verify != "none")
            manifest = parse_manifest(remote.read(MANIFEST), f"{remote.label}/{MANIFEST}")
            remote.identity = manifest.fingerprint
            folder = remote
        else:
            local = Path(path).expanduser()
            manifest = read_manifest(local)
            folder = LocalFolder(local, section.verify, section.on_damage == "skip")
        megabytes = section.shuffle_mb
        if megabytes == "auto":
            megabytes = "all" if isinstance(folder, LocalFolder) else 256
        window = None if isinstance(megabytes, str) else (megabytes << 20) // len(wanted)
        opened.append(ShardSource(folder, manifest, weight, window))
    return opened


def _tokenizer(folder: Folder, manifest: Manifest) -> Tokenizer:
    content = folder.read(manifest.tokenizer.file)
    if digest(content) != manifest.tokenizer.blake2b:
        raise DataError(
            f"{folder.label}/{manifest.tokenizer.file}: its BLAKE2b is {digest(content)}, expected "
            f"{manifest.tokenizer.blake2b}: another tokenizer, or damaged"
        )
    return Tokenizer.from_buffer(content)
