"""How fast text becomes shards, beside the tokenizer alone: `python benchmarks/prepare.py [--rounds N] [--threads 1 2]`.

The baseline is `tokenizers`' `encode_batch` with its ids taken out, `[encoding.ids for encoding in ...]`, over the same texts
in the same batches. Beside it, in turns, with as many threads: `tokenise_and_pack`, from texts to shards on the disk; `prepare`,
all that `lm-train prepare` does to a unit by default (cleaning, keys of duplicates, checksums) and packing; `near`, that with
signatures of near duplicates. Above 1 is faster than the baseline. One thread is measured in CPU time, which what else the
machine does changes little; two by the clock. Besides: recall and precision of near duplicates against exact similarity. What
is not measured again stays in the file of results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from report import RESULTS, write_results
from tokenizers import Tokenizer

from lm_train.data.shards import write_shard
from lm_train.data.source import open_source
from lm_train.data.tokenizer import train_bpe
from lm_train.prepare.duplicates import bands_of, nearly_equal, signature
from lm_train.prepare.pool import Pool
from lm_train.prepare.units import Unit, documents_of, units_of
from lm_train.prepare.work import ShardTask, Task, Worker, _batches
from lm_train.recipe import EmbeddedData


def baseline(tokenizer: Tokenizer, units: Sequence[Unit]) -> int:
    tokens = 0
    for unit in units:
        for batch in _batches([document.text for document in unit.documents]):
            ids = [encoding.ids for encoding in tokenizer.encode_batch(batch)]
            tokens += sum(map(len, ids))
    return tokens


def tokenise_and_pack(worker: Worker, units: Sequence[Unit]) -> None:
    for unit in units:
        lengths, ids = worker.tokenise([document.text for document in unit.documents])
        ends = np.cumsum(lengths)
        documents = (ids[end - length : end] for end, length in zip(ends, lengths, strict=True))
        write_shard(worker.task.out, f"train-{unit.number:05}.bin", documents, worker.dtype)


def pack_of(unit: Unit) -> ShardTask:
    return ShardTask(unit.split, unit.number, ((unit.number, tuple(range(len(unit.documents)))),))


def whole(worker: Worker, units: Sequence[Unit]) -> None:
    for unit in units:
        worker.work(unit)
        worker.pack(pack_of(unit))


def ratios(
    first: Callable[[], object], others: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """For each of the others, its share of the first's speed, in each round."""
    found: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(rounds):
        for name, other in others.items():
            seconds = []
            for call in (first, other, first):
                started = clock()
                call()
                seconds.append(clock() - started)
            found[name].append((seconds[0] + seconds[2]) / 2 / seconds[1])
    return found


def near_duplicates(pairs: int, seed: int) -> dict[str, float]:
    """Random texts and copies with up to 6% of the words changed, by exact Jaccard similarity of their five-word sets."""
    draw = np.random.default_rng(seed)
    texts, exact = [], []
    for _ in range(pairs):
        words = draw.integers(0, 20_000, int(draw.integers(80, 600)))
        changed = draw.random(len(words)) < draw.uniform(0, 0.06)
        copy = np.where(changed, draw.integers(0, 20_000, len(words)), words)
        sets = [{tuple(part[i : i + 5].tolist()) for i in range(len(part) - 4)} for part in (words, copy)]
        exact.append(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
        texts += [" ".join(f"w{i}" for i in part) for part in (words, copy)]
    similar = np.array(exact)
    signatures = np.stack([signature(text) for text in texts])
    bands = bands_of(signatures)
    found = nearly_equal(lambda i: bands[:, i], lambda i: signatures[i], np.ones(len(texts), dtype=bool), 0.8)
    dropped = np.isin(np.arange(pairs), [number // 2 for number, first in found if first == number - 1])

    def share(of: np.ndarray, inside: np.ndarray) -> float:
        return round(float((of & inside).sum() / max(1, inside.sum())), 4)

    return {
        "pairs": pairs,
        "threshold": 0.8,
        "recall": share(dropped, similar >= 0.8),
        "precision": share(similar >= 0.8, dropped),
        "recall_from_0.85": share(dropped, similar >= 0.85),
        "recall_from_0.9": share(dropped, similar >= 0.9),
        "precision_to_0.75": share(similar >= 0.75, dropped),
        "wrong_partner": sum(first != number - 1 for number, first in found),
        "share_of_pairs_from_0.75_to_0.85": share((similar >= 0.75) & (similar <= 0.85), np.ones(pairs, dtype=bool)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--units", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=3000)
    arguments = parser.parse_args()
    source = open_source(EmbeddedData())
    units = [
        u
        for u, _ in zip(
            units_of("train", documents_of(source.pieces("train"))), range(max(2, arguments.units)), strict=False
        )
    ]
    tokenizer = train_bpe((document.text for unit in units for document in unit.documents), 2048)
    earlier = RESULTS / "prepare.json"
    result: dict[str, object] = json.loads(earlier.read_text())["result"] if earlier.exists() else {}
    result |= {"text": source.label, "tokenizer": "bpe:2048", "rounds": arguments.rounds}
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        for part in ("units", "shards", "lines"):
            (here / part).mkdir()
        (here / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        task = Task(here, here, ("control", "unicode"), near=False, tokenizer=here / "tokenizer.json")
        near = Task(here, here, ("control", "unicode"), near=True, tokenizer=here / "tokenizer.json")
        if 1 in arguments.threads:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            some = units[: arguments.units]
            plain, with_near = Worker(task), Worker(near)
            others = {
                "tokenise_and_pack": lambda: tokenise_and_pack(plain, some),
                "prepare": lambda: whole(plain, some),
                "near": lambda: whole(with_near, some),
            }
            found = ratios(lambda: baseline(tokenizer, some), others, arguments.rounds, time.process_time)
            result["one_thread_cpu_time"] = {name: summary(values) for name, values in found.items()}
        if 2 in arguments.threads:
            os.environ["TOKENIZERS_PARALLELISM"] = "true"
            os.environ["RAYON_NUM_THREADS"] = "2"
            with Pool(2) as pool:

                def both() -> None:
                    pool.run(task, "work", units[:2], lambda unit: None)
                    pool.run(task, "pack", [pack_of(unit) for unit in units[:2]], lambda shard: None)

                both()
                found = ratios(
                    lambda: baseline(tokenizer, units[:2]), {"prepare": both}, arguments.rounds, time.monotonic
                )
            result["two_threads_by_the_clock"] = {name: summary(values) for name, values in found.items()}
    if arguments.pairs:
        result["near_duplicates"] = near_duplicates(arguments.pairs, seed=1)
    print(result)
    write_results("prepare", result)


def summary(values: Sequence[float]) -> dict[str, object]:
    return {"median": round(statistics.median(values), 3), "rounds": [round(value, 3) for value in sorted(values)]}


if __name__ == "__main__":
    main()
