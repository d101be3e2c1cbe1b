"""How fast batches come from prepared shards, and what a fetch costs.

    python benchmarks/stream.py [megatokens]

Ten shards of random 16-bit ids are written to a temporary folder (128 million tokens by default), and micro batches of 1024-token
samples are taken from them as a training takes them: shuffled order, inputs and targets as int64 tensors, every block compared
with its checksum once before. One process, one thread; times are CPU times of the process, so that what else runs on the
machine counts little, and the pages are in memory.

* tokens a second: inputs of the batches over CPU time, for micro batches of several sizes; beside it, in turns of the same
  length, a contiguous copy of as many 16-bit ids into int64, and the ratio of each pair.
* a fetch: one micro batch of each of 8 ranks in turn, all walked by one process, so that it meets every position; median and
  99th percentile.
* first batch: seconds from opening the folder to the first batch, with the checksums of its blocks, by the wall clock.
* first touch: what comparing costs, in MB/s.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from report import write_results

from lm_train.data import TextDataModule
from lm_train.data.shards import digest, ids_dtype, make_manifest, shard_name, write_manifest, write_shard
from lm_train.data.tokenizer import load_tokenizer
from lm_train.hardware import Machine
from lm_train.plan import Plan, make_plan
from lm_train.recipe import GPT, ShardData, load
from lm_train.runs import RunFolder

T = 1024
SHARDS = 10
ROUNDS = 15


def write_folder(folder: Path, tokens: int) -> None:
    """Ten shards of random ids, in documents of 1000 tokens."""
    folder.mkdir()
    tokenizer = load_tokenizer("bytes")
    assert tokenizer is not None
    content = tokenizer.to_str().encode()
    (folder / "tokenizer.json").write_bytes(content)
    draw = np.random.default_rng(0)
    made = []
    for number in range(SHARDS):
        documents = draw.integers(0, 257, (tokens // SHARDS // 1000, 1000), dtype=np.uint16)
        made.append(write_shard(folder, shard_name("train", number), documents, ids_dtype(257)))
    manifest = make_manifest(
        dtype="uint16",
        tokenizer={"blake2b": digest(content), "vocab_size": tokenizer.get_vocab_size(), "end_of_text": 256},
        settings={},
        splits={
            "train": {
                "tokens": sum(shard.tokens for shard, _ in made),
                "documents": sum(shard.documents for shard, _ in made),
                "text_bytes": sum(shard.tokens for shard, _ in made),
                "max_id": 256,
                "shards": [shard for shard, _ in made],
            }
        },
        documents="0" * 32,
        counts={},
    )
    write_manifest(folder, manifest)


def plan_of(folder: Path, world: int, micro: int) -> Plan:
    words = [
        "recipe=gpt_debug",
        f"model={{kind: gpt, n_layer: 1, n_head: 1, n_embd: 16, block_size: {T}}}",
        f"data={{kind: shards, path: '{folder}', global_batch_size: {world * micro}, num_workers: 0}}",
        "trainer.strategy=single",
        "trainer.devices=1",
        "trainer.max_steps=100000000",
    ]
    plan = make_plan(load(words), Machine(cpu_cores=1, gpus=()))
    return plan.model_copy(update={"devices": world, "micro_batch_size": micro, "accumulate_grad_batches": 1})


def module_of(folder: Path, world: int, micro: int) -> TextDataModule:
    section = ShardData(path=(str(folder),), global_batch_size=world * micro)
    module = TextDataModule(section, plan_of(folder, world, micro), 1, RunFolder(folder / "run"))
    module.prepare(GPT())
    return module


def rates(folder: Path, micro: int) -> dict[str, float]:
    """Megatokens a CPU second of batches, of a contiguous copy, and the median of their paired ratios."""
    batches = module_of(folder, 1, micro).train_batches(0)
    count = max(1, 4096 // micro)
    source = np.fromfile(folder / shard_name("train", 0), dtype="<u2")[: count * micro * T]
    first = 0
    ours, plain = [], []
    for round_ in range(ROUNDS + 1):
        began = time.process_time()
        for index in range(first, first + count):
            batches[index]
        middle = time.process_time()
        for start in range(0, len(source), micro * T):
            source[start : start + micro * T].astype(np.int64)
        ended = time.process_time()
        first += count
        if round_:  # the first one warms up
            ours.append(count * micro * T / (middle - began) / 1e6)
            plain.append(len(source) / (ended - middle) / 1e6)
    return {
        "megatokens_per_second": statistics.median(ours),
        "contiguous_copy_megatokens_per_second": statistics.median(plain),
        "ratio_to_copy": statistics.median(a / b for a, b in zip(ours, plain, strict=True)),
    }


def fetches(folder: Path, micro: int) -> dict[str, float]:
    """CPU microseconds of one micro batch, over the ranks of a run of 8."""
    module = module_of(folder, 8, micro)
    ranks = [module.train_batches(rank) for rank in range(8)]
    for rank in ranks:
        rank._order = ranks[0]._order_at(0)  # type: ignore[attr-defined]
    times = []
    for index in range(2500):
        for rank in ranks:
            began = time.process_time_ns()
            rank[index]
            times.append((time.process_time_ns() - began) / 1e3)
    return {
        "median_us": float(np.median(times)),
        "p99_us": float(np.percentile(times, 99)),
        "mean_us": float(np.mean(times)),
        "fetches": len(times),
    }


def main(megatokens: int) -> None:
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="lm-train-stream-"))
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    try:
        folder = root / "prepared"
        write_folder(folder, megatokens * 1_000_000)
        began = time.perf_counter()
        module = module_of(folder, 1, 16)
        module.train_batches(0)[0]
        first_batch = time.perf_counter() - began

        tokens = module.corpus.tokens("train")
        began, total = time.process_time(), 0
        for start in range(0, tokens.available() - T, (1 << 19)):  # each block once
            tokens.rows(np.array([start]), T)
            total += 1 << 20
        first_touch = total / (time.process_time() - began) / 1e6
        results = {
            "megatokens": megatokens,
            "first_batch_seconds": first_batch,
            "first_touch_megabytes_per_second": first_touch,
            "rates": {str(micro): rates(folder, micro) for micro in (1, 4, 8, 16, 32)},
            "fetch": {str(micro): fetches(folder, micro) for micro in (1, 4, 8, 16)},
        }
        write_results("stream", results)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 128)
