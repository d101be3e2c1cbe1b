"""BERT and the encoder-decoder on two processes under every strategy, against one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lm_train.runs import RunFolder, read_jsonl
from lm_train.train import train
from tests.conftest import Ranks
from tests.test_strategies import LOSS_BOUND, NORM_BOUND, curve, difference

NewRun = Callable[..., RunFolder]
MASKED = (
    "model={kind: bert, n_layer: 2, n_head: 2, n_embd: 32, block_size: 16, dropout: 0.0}",
    "optim={kind: adamw, learning_rate: 1e-3}",
    "data.global_batch_size=16",
    "trainer.accumulate_grad_batches=2",
    "trainer.gradient_clip_val=0.5",
    "trainer.max_steps=12",
    "data.val_fraction=0.02",
)
SHARED = MASKED[1:-1]
CLASSES = (
    "model={kind: bert, n_layer: 2, n_head: 2, n_embd: 32, block_size: 16, dropout: 0.0}",
    *SHARED,
    "data={kind: text_classes, tokenizer: bytes, max_length: 16}",
)
PAIRS = (
    "model={kind: seq2seq, n_layer: 2, n_head: 2, n_embd: 32, block_size: 24, dropout: 0.0}",
    *SHARED,
    # With AdamW at 1e-3 rounding moves a value across ReLU's kink at step 9: losses equal to the last bit, norms 6e-4 apart.
    # With GELU instead of ReLU they stay within 1e-7, and in float64 with ReLU all twelve steps are equal in every digit
    # logged. Smaller steps keep clear of the kink.
    "optim={kind: sgd, learning_rate: 0.01}",
    "data={kind: pairs, tokenizer: chars}",
)
TASKS = {"masked_lm": MASKED, "classification": CLASSES, "seq2seq": PAIRS}
STRATEGIES = ("ddp", "fsdp", *(pytest.param(s, marks=pytest.mark.slow) for s in ("zero1", "zero2", "zero3")))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[str, Path]:
    """Data of each task, made of the sentences."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = text_file.read_text(encoding="utf-8").splitlines()[:300]
    classes, pairs = folder / "classes.tsv", folder / "pairs.tsv"
    classes.write_text(
        "text\tlabel\n" + "".join(f"{line[:30]}\t{'long' if len(line) > 45 else 'short'}\n" for line in lines),
        encoding="utf-8",
    )
    words = [line[: 5 + i % 17].replace(" ", "") for i, line in enumerate(lines)]
    pairs.write_text("source\ttarget\n" + "".join(f"{w}\t{w[::-1]}\n" for w in words), encoding="utf-8")
    return {"masked_lm": text_file, "classification": classes, "seq2seq": pairs}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("task", TASKS)
def test_two_processes_compute_what_one_computes(
    ranks: Ranks, new_run: NewRun, files: dict[str, Path], task: str, strategy: str
) -> None:
    words = (*TASKS[task], f"data.path={files[task]}", "trainer.sample_tokens=10")
    one = new_run(*words, name="alone")
    assert train(one) == 0
    both = new_run(*words, "trainer.devices=2", f"trainer.strategy={strategy}", name="both")
    answers = ranks(strategy).run("run", folder=str(both.root))
    assert [answer["code"] for answer in answers] == [0, 0]
    largest = difference(curve(one), curve(both))
    print(f"MEASURED {task} {strategy} {largest}")
    assert len(curve(both)) == 12
    assert largest.loss <= LOSS_BOUND
    assert largest.norm <= NORM_BOUND
    rows = [[row for row in read_jsonl(folder.metrics) if "val/loss" in row] for folder in (one, both)]
    assert len(rows[0]) == len(rows[1]) > 0
    for expected, found in zip(*rows, strict=True):
        scores = [name for name in expected if name.startswith("val/")]
        assert scores == [name for name in found if name.startswith("val/")]
        for name in scores:
            assert found[name] == pytest.approx(expected[name], rel=NORM_BOUND), name
