"""A run that goes on from a checkpoint writes the ledger of one that was never interrupted, byte by byte."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lm_train import ledger
from lm_train.checkpoint import seed_random
from lm_train.errors import ExitCode
from lm_train.runs import RunFolder, read_jsonl
from lm_train.train import train
from tests.conftest import Ranks
from tests.small_runs import small_run
from tests.test_strategies import LOSS_BOUND, NORM_BOUND

NewRun = Callable[..., RunFolder]
WORDS = (
    "trainer.max_steps=9",
    "checkpoint.every_n_steps=4",
    "checkpoint.keep_last=9",
    "trainer.log_every_n_steps=3",
    "data.global_batch_size=24",
    "trainer.limit_val_batches=0",
    "model={kind: gpt, n_layer: 2, n_head: 2, n_embd: 32, block_size: 16, dropout: 0.1}",
)


def ledgers(ranks: Ranks, new_run: NewRun, strategy: str, size: int, *words: str) -> tuple[Path, Path]:
    """Of an undisturbed run, and of one that begins at its checkpoint of step 4."""
    words = (*WORDS, f"trainer.devices={size}", f"trainer.strategy={strategy}", *words)
    straight, resumed = new_run(*words, name="straight"), new_run(*words, name="resumed")
    processes = ranks(strategy, size=size)
    assert {answer["code"] for answer in processes.run("run", folder=str(straight.root))} == {0}
    checkpoint = str(straight.checkpoints / "step-4")
    assert {answer["code"] for answer in processes.run("run", folder=str(resumed.root), resume_from=checkpoint)} == {0}
    return straight.ledger, resumed.ledger


def cases() -> list:
    kept = {("single", 1, ()), ("ddp", 3, ()), ("zero2", 2, ())}
    found = []
    for strategy in ("single", "ddp", "fsdp", "zero1", "zero2", "zero3"):
        for size in (1,) if strategy == "single" else (2, 3):
            for words in (
                (),
                ("trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=null"),
                ("trainer.precision=bf16-mixed",),
                ("trainer.precision=bf16-true", "trainer.gradient_clip_val=null"),
            ):
                marks = [] if (strategy, size, words) in kept else [pytest.mark.slow]
                name = f"{strategy}-{size}" + "".join(
                    f"-{word.partition('=')[0].partition('.')[2][:9]}" for word in words[:1]
                )
                found.append(pytest.param(strategy, size, words, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("strategy", "size", "words"), cases())
def test_a_resumed_run_writes_the_same_lines(
    ranks: Ranks, new_run: NewRun, strategy: str, size: int, words: tuple[str, ...]
) -> None:
    straight, resumed = ledgers(ranks, new_run, strategy, size, *words)
    assert [row.step for row in ledger.read(straight)] == list(range(1, 10))
    assert [row.step for row in ledger.read(resumed)] == list(range(5, 10))
    assert ledger.compare(straight, resumed, first=5) is None


KINDS = {
    "lstm": ("gpt_debug", "model={kind: recurrent, cell: lstm, n_layer: 2, n_embd: 16, hidden_size: 32, block_size: 16}",
             "model.dropout=0.1", "data.tokenizer=bytes"),
    "bert": ("bert_debug", "model={kind: bert, n_layer: 1, n_head: 2, n_embd: 32, block_size: 16, dropout: 0.1}",
             "data.tokenizer=bytes"),
    "workers": ("gpt_debug", "model={kind: gpt, n_layer: 1, n_head: 2, n_embd: 32, block_size: 16, dropout: 0.1}",
                "data.tokenizer=bytes", "data.num_workers=2"),
    "images": ("cnn_digits", "model={kind: resnet, stem: 4, channels: [4, 8], blocks: [1, 0]}",
               "data={kind: images, global_batch_size: 16, crop: 1}"),
    "pairs": ("seq2seq_debug", "data.global_batch_size=16"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_on_exactly(ranks: Ranks, tmp_path: Path, cache: Path, text_file: Path, kind: str) -> None:
    """Batch norm's buffers, what was drawn for a sample, masks, lengths, and loaders with processes of their own."""
    recipe, *words = KINDS[kind]
    words += ["checkpoint.every_n_steps=4", "checkpoint.keep_last=9", "trainer.max_steps=9", "trainer.devices=2"]
    words += ["trainer.log_every_n_steps=3", "trainer.sample_tokens=0", "trainer.limit_val_batches=2"]
    words += ["trainer.val_check_interval=4", "trainer.limit_test_batches=0"]
    words += [f"data.path={text_file}"] if recipe in ("gpt_debug", "bert_debug") else []
    straight, resumed = (small_run(tmp_path, recipe, *words, name=name) for name in ("straight", "resumed"))
    pair = ranks("ddp")
    pair.run("run", folder=str(straight.root))
    pair.run("run", folder=str(resumed.root), resume_from=str(straight.checkpoints / "step-4"))
    assert [row.step for row in ledger.read(straight.ledger)] == list(range(1, 10))
    assert ledger.last_step(resumed.ledger) == 9
    assert ledger.compare(straight.ledger, resumed.ledger, first=5) is None
    evaluations = [[r for r in read_jsonl(f.metrics) if "val/loss" in r and r["step"] > 4] for f in (straight, resumed)]
    assert evaluations[0] == evaluations[1] != []


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_another_number_of_ranks_takes_the_same_samples(ranks: Ranks, new_run: NewRun, before: int, after: int) -> None:
    """Sums come in another order, so the last digits of losses differ; which samples a step holds does not."""
    words = (*WORDS, "model.dropout=0")
    first = new_run(*words, f"trainer.devices={before}", name="first")
    second = new_run(*words, f"trainer.devices={after}", name="second")
    ranks("ddp", size=before).run("run", folder=str(first.root))
    ranks("ddp", size=after).run("run", folder=str(second.root), resume_from=str(first.checkpoints / "step-4"))
    expected, found = list(ledger.read(first.ledger))[4:], list(ledger.read(second.ledger))
    assert [row.step for row in found] == list(range(5, 10))
    for a, b in zip(expected, found, strict=True):
        assert (a.samples, a.learning_rate) == (b.samples, b.learning_rate)
        assert float.fromhex(b.loss) == pytest.approx(float.fromhex(a.loss), rel=LOSS_BOUND)
        assert float.fromhex(b.grad_norm) == pytest.approx(float.fromhex(a.grad_norm), rel=NORM_BOUND)


def test_what_had_stopped_early_does_not_train_on(new_run: NewRun) -> None:
    """As a run that is killed after its last save, while it evaluates its test split."""
    words = ("optim={kind: sgd, learning_rate: 3.0, momentum: 0.0}", "trainer.gradient_clip_val=null")
    words += ("trainer.val_check_interval=2", "trainer.early_stopping_patience=1", "trainer.limit_val_batches=4")
    run = new_run(*words)
    assert train(run) == ExitCode.DONE
    before = run.ledger.read_bytes()
    steps = ledger.last_step(run.ledger)
    assert steps is not None
    assert 4 <= steps < 50
    assert train(run, run.checkpoints / f"step-{steps}") == ExitCode.DONE
    assert run.ledger.read_bytes() == before


def test_lines_beyond_the_checkpoint_vanish(new_run: NewRun) -> None:
    """As after a kill between a ledger's writing and the next save, with a line half written."""
    run = new_run(*WORDS)
    assert train(run) == ExitCode.DONE
    whole = run.ledger.read_bytes()
    lines = whole.splitlines(keepends=True)
    run.ledger.write_bytes(b"".join(lines[:6]) + lines[6][:30])
    assert train(run, run.checkpoints / "step-4") == ExitCode.DONE
    assert run.ledger.read_bytes() == whole


def test_generators_of_a_rank_that_no_checkpoint_knows_are_keyed() -> None:
    """Another number of ranks, or a first start: what Python and NumPy draw is a function of seed, step and rank."""

    def drawn(*key: int) -> tuple[float, float]:
        seed_random(*key)
        return random.random(), float(np.random.random())

    assert drawn(1, 0, 2) == drawn(1, 0, 2)
    assert len({value for rank in range(4) for step in (0, 10) for value in drawn(1, step, rank)}) == 16
