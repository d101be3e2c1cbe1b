"""Shared fixtures: a small text, a cache of its own, and one pair of rank processes for all two-process cases."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

# before torch is imported anywhere: two threads that wait for each other on a busy core are many times slower than one
os.environ["OMP_NUM_THREADS"] = "1"

from lm_train import runs
from lm_train.hardware import Machine
from lm_train.plan import make_plan
from lm_train.recipe import load
from lm_train.runs import RunFolder
from tests.pair import Pair
from tests.sentences import sentences

os.environ.setdefault("WANDB_MODE", "offline")

TINY = (
    "recipe=gpt_debug",
    "data.tokenizer=bytes",
    "model={kind: gpt, n_layer: 2, n_head: 2, n_embd: 64, block_size: 16}",
    "optim={kind: adamw, learning_rate: 1e-3, schedule: constant}",
    "data.global_batch_size=16",
    "trainer.max_steps=50",
    "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=null",
    "trainer.limit_val_batches=null",
    "trainer.sample_tokens=0",
    "checkpoint.every_n_steps=null",
    "tracking.wandb=disabled",
)
"""Words of a run that takes about a second: two narrow blocks on bytes."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A token cache that all tests of the session share, and that is not the user's."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield folder
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """40 kB of made-up sentences, so that a model has something to learn."""
    file = tmp_path_factory.mktemp("text") / "sentences.txt"
    file.write_text("".join(islice(sentences(), 1000)), encoding="utf-8")
    return file


@pytest.fixture
def new_run(tmp_path: Path, text_file: Path) -> Callable[..., RunFolder]:
    """Makes the folder of a tiny run as the supervisor would: `new_run("trainer.devices=2", ...)`."""

    def make(*words: str, name: str = "run") -> RunFolder:
        given = dict(word.split("=", 1) for word in (*TINY, f"data.path={text_file}", *words))
        recipe = load([f"{key}={value}" for key, value in given.items()] + [f"name={name}", f"runs_dir={tmp_path}"])
        return runs.create(recipe, make_plan(recipe, Machine(cpu_cores=2, gpus=())))

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> RunFolder:
    """A finished run of four steps with checkpoints at 2 and 4, for tests that copy it."""
    from lm_train.train import train

    words = dict(word.split("=", 1) for word in (*TINY, f"data.path={text_file}"))
    words |= {"trainer.max_steps": "4", "checkpoint.every_n_steps": "2", "checkpoint.keep_last": "9", "name": "run"}
    words |= {"runs_dir": str(tmp_path_factory.mktemp("trained"))}
    recipe = load([f"{key}={value}" for key, value in words.items()])
    run = runs.create(recipe, make_plan(recipe, Machine(cpu_cores=2, gpus=())))
    train(run)
    return run


Ranks = Callable[..., Pair]


@pytest.fixture(scope="session")
def ranks(cache: Path) -> Iterator[Ranks]:
    """`ranks("zero2")`: processes with one gloo group for all cases of that strategy; `size=1` for a single one.

    torch's own strategies share processes, and DeepSpeed's do. What a failed case has ended is started anew.
    """
    started: dict[tuple[bool, int], Pair] = {}

    def of(strategy: str, size: int = 2) -> Pair:
        key = (strategy.startswith("zero"), size)
        if key not in started or started[key].ended:
            started[key] = Pair(size).__enter__()
        return started[key]

    yield of
    for pair in started.values():
        pair.end()
