"""What the tests of data share: a plan, a data module over a section, and the text that a split stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lm_train.data import TextDataModule, build
from lm_train.data.batches import Split
from lm_train.data.corpus import Corpus, prepare_corpus
from lm_train.plan import Plan
from lm_train.recipe import GPT, TextData
from lm_train.runs import RunFolder

SHARED = Path(__file__).parents[2] / "shared"
"""Real data beside the checkout, where there are any."""


def plan_of(
    world: int = 1, micro: int = 2, accumulate: int = 1, steps: int = 10, workers: int = 0, block_size: int = 4
) -> Plan:
    return Plan(
        task="causal_lm",
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
        flops_per_sample=None,
        parameter_bytes=None,
        gradient_bytes=None,
        optimizer_bytes=None,
        block_size=block_size,
        peak_flops_per_device=None,
        cluster="test",
        price_per_gpu_hour=None,
        currency="USD",
        power_watts=0.0,
        limits={},
        prediction=None,
        reasons={},
    )


def prepared(
    path: Path, plan: Plan, block_size: int = 4, seed: int = 1, vocab_size: int | None = None, **section: Any
) -> TextDataModule:
    options = {"tokenizer": "bytes"} | section
    plan = plan.model_copy(update={"block_size": block_size})
    module = build(TextData(path=str(path), **options), plan, seed, RunFolder(path.with_name("run")))
    assert isinstance(module, TextDataModule)
    module.prepare(GPT(vocab_size="auto" if vocab_size is None else vocab_size))
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
