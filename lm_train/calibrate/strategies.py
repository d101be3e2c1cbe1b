"""What each strategy's own code costs: real trainings of two tiny networks on two processes, less what is foretold of them.
Free of torch."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from lm_train.clusters import Cluster
from lm_train.hardware import Machine
from lm_train.interpreter import python
from lm_train.plan import Layout, known_facts, make_plan, parameter_shapes
from lm_train.plan.duration import own_passes, time_of
from lm_train.plan.rates import Calibration, MeasuredRates
from lm_train.plan.work import work_of
from lm_train.recipe import Recipe, load, task_of
from lm_train.runs import RunFolder, read_jsonl
from lm_train.supervisor import say

STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
DEPTHS = (2, 8)
"""Blocks of the two networks: what grows with them is each parameter's or unit's, the rest the step's."""
STEPS, ROWS = 120, 40
WORDS = (
    "recipe=gpt_debug",
    "data={kind: embedded, tokenizer: bytes, global_batch_size: 4}",
    "optim={kind: adamw}",
    f"trainer.max_steps={STEPS}",
    f"trainer.log_every_n_steps={ROWS}",
    "trainer.val_check_interval=null",
    "trainer.limit_val_batches=0",
    "trainer.sample_tokens=0",
    "checkpoint.every_n_steps=null",
    "tracking.wandb=disabled",
    "trainer.devices=2",
    "trainer.accumulate_grad_batches=1",
)


def strategy_costs(calibration: Calibration, cluster: Cluster, folder: Path, until: float) -> Calibration:
    """The calibration with each strategy's cost; without those for which no time is left.

    Args:
        until: when, by the monotonic clock, to stop.
    """
    free = calibration.training.model_copy(update={"strategies": dict.fromkeys(STRATEGIES, (0.0, 0.0))})
    bare = calibration.model_copy(update={"training": free})
    costs: dict[str, tuple[float, float]] = {}
    longest = 0.0
    for strategy in STRATEGIES:
        began = time.monotonic()
        if began + longest > until:
            break
        points = []
        for depth in DEPTHS:
            words = [*WORDS, f"trainer.strategy={strategy}", f"runs_dir={folder}", f"name={strategy}-{depth}"]
            words.append(f"model={{kind: gpt, n_layer: {depth}, n_head: 2, n_embd: 32, block_size: 16}}")
            measured = _measured(words, folder / f"{strategy}-{depth}")
            if measured is None:
                say(f"lm-train: warning: {strategy} did not train here; its cost is an estimate")
                break
            foretold, passes = _foretold(load(words), bare, cluster)
            points.append((passes, max(0.0, measured - foretold)))
        else:
            (few, less), (many, more) = points
            each = max(0.0, more - less) / (many - few)
            costs[strategy] = (max(0.0, less - few * each), each)
        longest = max(longest, time.monotonic() - began)
    return calibration.model_copy(update={"training": calibration.training.model_copy(update={"strategies": costs})})


def _measured(words: list[str], root: Path) -> float | None:
    """Seconds of a step of a real training, the quickest of its stretches; None if it failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*python(), "-m", "lm_train", "train", *words]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    rows = [row for row in read_jsonl(RunFolder(root).metrics) if row.get("step", 0) > ROWS]
    seconds = [row["perf/step_seconds"] for row in rows if "perf/step_seconds" in row]
    return min(seconds) if done.returncode == 0 and seconds else None


def _foretold(recipe: Recipe, calibration: Calibration, cluster: Cluster) -> tuple[float, int]:
    """The same without the strategy's own cost, and how often that counts."""
    plan = make_plan(recipe, Machine(cpu_cores=2, gpus=()))
    layout = Layout(
        nodes=1,
        devices=2,
        strategy=plan.strategy,
        precision=plan.precision,
        micro_batch_size=plan.micro_batch_size,
        accumulate_grad_batches=plan.accumulate_grad_batches,
        activation_checkpointing=plan.activation_checkpointing,
        cross_entropy_chunks=plan.cross_entropy_chunks,
        num_workers=plan.num_workers,
        compile=False,
        threads_per_rank=1,
        accelerator="cpu",
    )
    task, facts = task_of(recipe), known_facts(recipe)
    shapes, work = parameter_shapes(recipe.model, task, facts), work_of(recipe.model, task, facts, layout)
    assert shapes is not None
    assert work is not None
    named = list(shapes)
    rates = MeasuredRates(calibration, cluster, layout)
    found = time_of(named, work, layout, recipe.optim, rates, log_every=ROWS)
    return found.seconds, own_passes(layout, len(named), len(work.stages))
