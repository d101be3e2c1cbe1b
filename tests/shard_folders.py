"""Small prepared folders: ids that say where they stand, written with the package's own writer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from lm_train.data.shards import (
    Ids,
    Manifest,
    digest,
    ids_dtype,
    make_manifest,
    shard_name,
    write_manifest,
    write_shard,
)
from lm_train.data.tokenizer import load_tokenizer

END = 256
"""The end-of-text id of the byte tokenizer."""


def byte_tokenizer() -> Tokenizer:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer is not None
    return tokenizer


def documents_of(count: int, seed: int = 0, longest: int = 40) -> list[Ids]:
    """Documents of made-up bytes, each closed by the end-of-text id."""
    draw = random.Random(seed)
    return [
        np.array([draw.randrange(97, 123) for _ in range(draw.randint(1, longest))] + [END], dtype="<u2")
        for _ in range(count)
    ]


def write_folder(
    folder: Path, splits: dict[str, Sequence[Sequence[Ids]]], tokenizer: Tokenizer | None = None
) -> Manifest:
    """A prepared folder of these documents: split -> shard -> document."""
    folder.mkdir(parents=True, exist_ok=True)
    written = (tokenizer or byte_tokenizer()).to_str().encode()
    (folder / "tokenizer.json").write_bytes(written)
    size = (tokenizer or byte_tokenizer()).get_vocab_size()
    facts = {}
    for split, shards in splits.items():
        made = [
            write_shard(folder, shard_name(split, i), documents, ids_dtype(size)) for i, documents in enumerate(shards)
        ]
        facts[split] = {
            "tokens": sum(shard.tokens for shard, _ in made),
            "documents": sum(shard.documents for shard, _ in made),
            "text_bytes": sum(shard.tokens for shard, _ in made),
            "max_id": max(largest for _, largest in made),
            "shards": [shard for shard, _ in made],
        }
    manifest = make_manifest(
        dtype=ids_dtype(size).name,
        tokenizer={"blake2b": digest(written), "vocab_size": size, "end_of_text": END},
        settings={},
        splits=facts,
        documents="0" * 32,
        counts={},
    )
    write_manifest(folder, manifest)
    return manifest


def make_folder(folder: Path, n_shards: int = 3, documents: int = 40, seed: int = 0, longest: int = 40) -> Manifest:
    """`n_shards` training shards of so many documents each, and one to validate."""
    train = [documents_of(documents, 100 * seed + i, longest) for i in range(n_shards)]
    return write_folder(folder, {"train": train, "val": [documents_of(10, 100 * seed + 99, longest)]})
