"""What the tests of data share: a plan, a data module over a section, and the text that a split stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lm_train.data import TextDataModule, build
from lm_train.data.corpus import Corpus, prepare_corpus
from lm_train.data.source import Split
from lm_train.plan import Plan
from lm_train.recipe import TextData

SHARED = Path(__file__).parents[2] / "shared"
"""Real data beside the checkout, where there are any."""


def plan_of(world: int = 1, micro: int = 2, accumulate: int = 1, steps: int = 10, workers: int = 0) -> Plan:
    return Plan(
        accelerator="cpu",
        device_name="test",
        nodes=1,
        devices=world,
        strategy="ddp" if world > 1 else "single",
        precision="32-true",
        global_batch_size=world * micro * accumulate,
        micro_batch_size=micro,
        accumulate_grad_batches=accumulate,
        num_workers=workers,
        max_steps=steps,
        activation_checkpointing="none",
        cross_entropy_chunks=1,
        compile=False,
        threads_per_rank=1,
        vocab_size=None,
        n_parameters=None,
        flops_per_token=None,
        parameter_bytes=None,
        gradient_bytes=None,
        optimizer_bytes=None,
        tokens_per_step=1,
        peak_flops_per_device=None,
        reasons={},
    )


def prepared(
    path: Path, plan: Plan, block_size: int = 4, seed: int = 1, vocab_size: int | None = None, **section: Any
) -> TextDataModule:
    options = {"tokenizer": "bytes"} | section
    module = build(TextData(path=str(path), **options), plan, block_size, seed, path.with_name("run-tokenizer.json"))
    module.prepare(vocab_size)
    return module


def corpus_of(path: Path | str, **section: Any) -> Corpus:
    data = TextData(path=str(path), **({"tokenizer": "bytes"} | section))
    return prepare_corpus(data, data.streaming)


def ids_of(corpus: Corpus, split: Split) -> list[int]:
    file = corpus.tokens(split)
    return np.fromfile(file.file, dtype=file.dtype).tolist()


def documents_of(corpus: Corpus, split: Split) -> list[str]:
    """The split's documents, from its tokens."""
    text = corpus.tokenizer.decode(ids_of(corpus, split), skip_special_tokens=False)
    return text.split("<|endoftext|>")


def write_jsonl(file: Path, texts: list[Any], column: str = "text") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)))
    return file
