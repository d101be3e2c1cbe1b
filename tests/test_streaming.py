"""Training while the corpus is still being tokenised: real producer processes, killed ones, and files that grow."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lm_train.data import corpus as corpus_module
from lm_train.data.corpus import TokenFile, wait_for_tokens
from lm_train.data.order import SampleOrder
from lm_train.data.source import open_source
from lm_train.data.text import TrainBatches
from lm_train.errors import DataError, StopRequested
from lm_train.recipe import TextData
from tests.text_data import corpus_of, ids_of, plan_of, prepared, write_jsonl

BLOCK, WINDOW = 4, 8


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("lm_train.data.text.STREAM_WINDOW", WINDOW)


def growing(tmp_path: Path, steps: int = 30, micro: int = 2) -> tuple[TokenFile, TrainBatches]:
    tokens = TokenFile(tmp_path, "train", 1000)
    return tokens, TrainBatches(
        tokens, plan_of(micro=micro, steps=steps, block_size=BLOCK), 0, seed=3, start_step=0, streaming=True
    )


def append(tokens: TokenFile, ids: range) -> None:
    with tokens.file.open("ab") as out:
        out.write(np.array(ids, dtype=tokens.dtype).tobytes())


def complete(tokens: TokenFile) -> None:
    facts = {"tokens": tokens.available(), "text_bytes": 1, "documents": 1, "max_id": 1, "max_id_where": ""}
    tokens.info_file.write_text(json.dumps(facts))


def test_batches_of_a_growing_file_are_those_of_the_complete_one(tmp_path: Path) -> None:
    tokens, batches = growing(tmp_path)

    def write() -> None:
        for start in range(0, 250, 7):  # in pieces that end inside blocks
            time.sleep(0.01)
            append(tokens, range(start, min(start + 7, 250)))
        complete(tokens)

    writer = threading.Thread(target=write)
    writer.start()
    first = batches[0]
    assert tokens.info() is None, "the first batch waited for the whole corpus"
    found = [first] + [batches[i] for i in range(1, 30)]
    writer.join()

    _, again = growing(tmp_path)
    blocks = (250 - 1) // BLOCK
    assert blocks == 62, "the 60 samples span several windows of an epoch"
    _, samples = SampleOrder(3, blocks, WINDOW).samples(np.arange(60))
    for i in range(30):
        wanted = torch.from_numpy(samples[2 * i : 2 * i + 2] * BLOCK)[:, None] + torch.arange(BLOCK)
        assert torch.equal(found[i]["tokens"], again[i]["tokens"])
        assert torch.equal(found[i]["tokens"], wanted)
        assert torch.equal(found[i]["targets"], wanted + 1)


def test_the_last_incomplete_window_waits_for_the_end(tmp_path: Path) -> None:
    tokens, batches = growing(tmp_path)
    append(tokens, range(WINDOW * BLOCK + 1))
    assert len({int(batches[i]["tokens"][j, 0]) for i in range(4) for j in range(2)}) == WINDOW
    append(tokens, range(WINDOW * BLOCK + 1, 60))
    done = threading.Timer(0.2, complete, [tokens])
    done.start()
    started = time.monotonic()
    assert int(batches[4]["tokens"].min()) >= WINDOW * BLOCK
    assert time.monotonic() - started > 0.1


def test_a_file_that_starts_anew_is_waited_for(tmp_path: Path) -> None:
    """Another run's producer was killed; the next one begins at the start, with the same tokens."""
    tokens, batches = growing(tmp_path)
    append(tokens, range(100))
    before = batches[0]
    tokens.file.unlink()
    threading.Timer(0.2, append, [tokens, range(100)]).start()
    assert torch.equal(batches[0]["tokens"], before["tokens"])


def test_a_file_that_shrinks_between_a_look_and_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, _ = growing(tmp_path)
    append(tokens, range(3))
    looks = []

    def look(tokens: TokenFile, needed: int) -> int:
        looks.append(needed)
        if len(looks) == 2:
            append(tokens, range(3, 5))
        return 1000

    monkeypatch.setattr(corpus_module, "wait_for_tokens", look)
    assert tokens.rows(np.array([0]), 5).tolist() == [[0, 1, 2, 3, 4]]
    assert looks == [5, 5]


def test_a_torn_write_is_not_read(tmp_path: Path) -> None:
    tokens, _ = growing(tmp_path)
    tokens.file.write_bytes(b"\x01\x00\x02")
    assert tokens.available() == 1


def test_waiting_ends_with_the_producers_message_or_a_signal_or_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, batches = growing(tmp_path)
    append(tokens, range(5))
    monkeypatch.setattr(corpus_module, "_PATIENCE_S", 0.2)
    with pytest.raises(DataError, match=r"train.bin: no new tokens for 0.2 s"):
        wait_for_tokens(tokens, 6)
    monkeypatch.setattr(corpus_module, "_START_S", 0.1)
    with pytest.raises(DataError, match=r"train.bin: the process that tokenised it is gone"):
        wait_for_tokens(tokens, 6)
    with monkeypatch.context() as patched:
        patched.setattr("lm_train.signals._requested", 75)
        with pytest.raises(StopRequested):
            wait_for_tokens(tokens, 6)
    tokens.fault.write_text("a.jsonl line 7: not JSON")
    assert wait_for_tokens(tokens, 5) == 5, "what is there can still be used"
    with pytest.raises(DataError, match=r"^a.jsonl line 7: not JSON$"):
        batches[0]


def test_a_stream_shorter_than_a_batch(tmp_path: Path) -> None:
    for n in (1, 4, 12):
        (tmp_path / str(n)).mkdir()
        tokens, batches = growing(tmp_path / str(n), micro=3)
        append(tokens, range(n))
        complete(tokens)
        with pytest.raises(DataError, match=rf"{n} training tokens make {(n - 1) // 4} samples"):
            batches[0]


TEXTS = [f"document {i} says something of its own\n" for i in range(3000)]


def test_producers_stream_fail_die_and_start_again(tmp_path: Path) -> None:
    """One test, since each start of a producer takes seconds."""
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    plan = plan_of(micro=2, steps=40)
    options = {"streaming": True, "val_tokens": 50}

    # what a killed producer and a failed one left behind
    children = set(multiprocessing.active_children())
    streamed = prepared(file, plan, BLOCK, **options)
    (producer,) = set(multiprocessing.active_children()) - children
    producer.kill()
    producer.join()
    tokens = streamed.corpus.tokens("train")
    assert tokens.info() is None
    append(tokens, range(1000))
    tokens.fault.write_text("yesterday's failure")

    # another start completes
    children = set(multiprocessing.active_children())
    streamed = prepared(file, plan, BLOCK, **options)
    (producer,) = set(multiprocessing.active_children()) - children
    os.kill(producer.pid, signal.SIGINT)  # Ctrl-C reaches it too; its parent decides
    found = list(streamed.train_dataloader())
    producer.join(timeout=60)
    assert producer.exitcode == 0
    info = tokens.info()
    assert info is not None
    validation = "".join(streamed.corpus.tokenizer.decode(ids_of(streamed.corpus, "val"), skip_special_tokens=False))
    assert 200 <= len(validation.replace("<|endoftext|>", "")) < 250, "four characters a token"
    assert info.documents == len(TEXTS) - validation.count("\n")

    # a second one reads the cache: no process, no new file, the same batches
    children, stamp = set(multiprocessing.active_children()), tokens.file.stat().st_mtime_ns
    cached = prepared(file, plan, BLOCK, **options)
    assert set(multiprocessing.active_children()) == children
    assert tokens.file.stat().st_mtime_ns == stamp
    for a, b in zip(found, cached.train_dataloader(), strict=True):
        assert torch.equal(a["tokens"], b["tokens"])

    # its parent can end one that is at work
    long = write_jsonl(tmp_path / "long.jsonl", TEXTS * 300)
    children = set(multiprocessing.active_children())
    wait_for_tokens(prepared(long, plan, BLOCK, **options).corpus.tokens("train"), 1000)
    (producer,) = set(multiprocessing.active_children()) - children
    producer.terminate()
    producer.join(timeout=10)
    assert producer.exitcode == -signal.SIGTERM

    # a fault of the data reaches the reader as its one line
    broken = write_jsonl(tmp_path / "b.jsonl", [*TEXTS, None])
    with pytest.raises(DataError, match=rf"^{broken} line 3001: text is None, expected text$"):
        wait_for_tokens(prepared(broken, plan, BLOCK, **options).corpus.tokens("train"), 10**9)


def test_only_the_first_rank_of_a_machine_starts_a_producer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    children = set(multiprocessing.active_children())
    corpus_of(write_jsonl(tmp_path / "a.jsonl", TEXTS), streaming=True, val_tokens=50)
    assert set(multiprocessing.active_children()) == children


def test_everything_would_validate(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS[:9])
    module = corpus_of(file, streaming=True, val_path=str(write_jsonl(tmp_path / "v.jsonl", ["v"])))
    assert module.splits == ("train", "val")
    pieces = open_source(TextData(path=str(file), streaming=True)).pieces("train")
    with pytest.raises(
        DataError, match=r"its 9 documents are fewer than data.val_tokens=1000000.*lower data.val_tokens"
    ):
        list(pieces)
