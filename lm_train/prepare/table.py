"""documents.parquet: where each document came from and where its tokens are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lm_train import signals
from lm_train.data.cache import writing
from lm_train.data.readers import Split
from lm_train.data.shards import DOCUMENTS, Shard, removed_on_failure
from lm_train.prepare.deciding import Decided
from lm_train.prepare.units import DoneFile

_ROWS = 1 << 17
"""Of a row group."""
_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("shard", pa.int32()),
        ("first_token", pa.int64()),
        ("tokens", pa.int64()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("blake2b", pa.binary(16)),
    ]
)
"""`shard` by its number in the split, `first_token` in the shard; `tokens` with the closing one; `row` as units.Document has
it; `blake2b` of the cleaned text in UTF-8."""


def write_documents(folder: Path, decided: Decided, shards: dict[Split, Sequence[Shard]]) -> str:
    """Writes the table whole or not at all.

    Returns:
        Its BLAKE2b.

    Raises:
        OutputError: if it cannot be written.
    """
    file = folder / DOCUMENTS
    partial = file.with_name(f".{file.name}.partial")
    with writing(file), removed_on_failure(partial):
        with pq.ParquetWriter(partial, _SCHEMA) as out:
            _write(out, decided, shards)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
            found = hashlib.file_digest(written, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        partial.replace(file)
    return found


def _write(out: Any, decided: Decided, shards: dict[Split, Sequence[Shard]]) -> None:
    held: list[pa.RecordBatch] = []
    for split, made in shards.items():
        ends = np.cumsum([shard.documents for shard in made])
        first_documents = ends - [shard.documents for shard in made]
        seen = tokens_before = 0
        token_starts = np.cumsum([0, *(shard.tokens for shard in made)])
        for number, first, end in decided.ranges(split):
            signals.check()
            chosen = np.flatnonzero(decided.stays[first:end])
            if not len(chosen):
                continue
            facts, rows, digests = DoneFile(decided.task.file_of(split, number)).read("facts", "rows", "digests")
            numbers = seen + np.arange(len(chosen))
            tokens = decided.tokens[first:end][chosen]
            begins = tokens_before + np.cumsum(tokens) - tokens
            shard = np.searchsorted(ends, numbers, side="right")
            assert (numbers >= first_documents[shard]).all()
            source = np.array(facts["source"])[chosen]
            columns = [
                pa.array([split] * len(chosen), pa.string()),
                pa.array(shard.astype(np.int32)),
                pa.array(begins - token_starts[shard]),
                pa.array(tokens),
                pa.array([facts["sources"][i] for i in source], pa.string()),
                pa.array(rows[chosen]),
                pa.array([row.tobytes() for row in digests[chosen]], pa.binary(16)),
            ]
            held.append(pa.record_batch(columns, schema=_SCHEMA))
            seen += len(chosen)
            tokens_before += int(tokens.sum())
            if sum(batch.num_rows for batch in held) >= _ROWS:
                _flush(out, held)
    _flush(out, held)


def _flush(out: Any, held: list[pa.RecordBatch]) -> None:
    if held:
        out.write_table(pa.Table.from_batches(held), row_group_size=sum(batch.num_rows for batch in held))
        held.clear()
