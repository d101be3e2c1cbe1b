"""What others say about the rows of benchmarks/memory.py, and how long they take to say it.

    python benchmarks/baselines.py [--only NAME ...] [--resume FILE] [--finder] [--out baselines]

Needs benchmarks/results/memory_cpu.json for what was measured, and beside lm_train's own packages `accelerate` (a row without
it is left empty). The predictors, all of them asked for memory above the bare process:

* deepspeed: estimate_zero2_model_states_mem_needs and estimate_zero3_model_states_mem_needs of DeepSpeed, without offload. It has
  none for stage 1; there (4 + 12 / ranks) bytes a parameter, as Rajbhandari et al. 2020 (arXiv:1910.02054, section 5) say. Model
  states alone, of a training in 16 bits, is all that they claim.
* accelerate: what `accelerate estimate-memory` prints for training with Adam, its own functions on our network.
* mem_tracker: torch.distributed._tools.mem_tracker.MemTracker on fake tensors, two whole steps of one process; it knows no
  strategy, and is asked for every row all the same.
* traced: lm_train's own tracer in the place of its formulas.
* formulas: lm_train's prediction, as in memory_cpu.json.

`--finder` runs Lightning's BatchSizeFinder on the first row's model with 1 GiB of address space above the process that is ready
to train, and says what it found and how long that took, beside the largest micro batch that the formulas let into 1 GiB.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import BatchSizeFinder
from memory import ALLOCATOR, CLASSES, PIXELS, _cluster, layout_of, predict, words_of
from memory_list import GPT_A, ROWS, Row
from report import RESULTS, errors, write_results
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.data import DataLoader, TensorDataset

from lm_train import models
from lm_train.optim import build_optimizer
from lm_train.plan import DataFacts, Layout, known_facts, parameter_shapes
from lm_train.plan.footprint import BARE_PROCESS, memory_of
from lm_train.recipe import Recipe, load, task_of
from lm_train.trace import trace
from lm_train.trace.batches import tensors_of, training_batch
from lm_train.trace.corrections import as_with_values
from lm_train.trace.network import autocast, fake_network, plan_of, training_module

NAMES = ("deepspeed", "accelerate", "mem_tracker", "traced", "formulas")
FINDER_BYTES = 1 << 30
"""Above the process that is ready to train."""


def facts_of(row: Row, recipe: Recipe) -> DataFacts:
    """As benchmarks/memory.py has them."""
    facts = known_facts(recipe)
    if row.data == "images":
        facts = DataFacts(input_shape=(3, PIXELS, PIXELS), n_outputs=CLASSES)
    asked = getattr(recipe.model, "vocab_size", "auto")
    return facts if asked == "auto" else replace(facts, vocab_size=asked)


def deepspeed(recipe: Recipe, facts: DataFacts, layout: Layout) -> int | None:
    """Bytes of model states on each rank; None for a strategy that it has no estimator for."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage3 import model_to_params as with_largest
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    if not layout.strategy.startswith("zero"):
        return None
    with torch.device("meta"):
        net = models.build(recipe.model, plan_of(layout, task_of(recipe)), facts)
    # on the meta device all addresses are 0, by which DeepSpeed tells shared parameters apart
    total, largest = sum(p.numel() for p in net.parameters()), with_largest(net)[1]
    match layout.strategy:
        case "zero1":
            return round((4 + 12 / layout.ranks) * total)
        case "zero2":
            return estimate_zero2_model_states_mem_needs(total, layout.devices, layout.nodes, cpu_offload=False)[1]
    return estimate_zero3_model_states_mem_needs(
        total, largest, layout.devices, layout.nodes, cpu_offload=False, cpu_offload_params=False
    )[1]


def accelerate(recipe: Recipe, facts: DataFacts, layout: Layout) -> int | None:
    """The largest of the figures that it prints as "Training using Adam"; None where it is not installed."""
    try:
        from accelerate.commands.estimate import estimate_training_usage
        from accelerate.utils import calculate_maximum_sizes
    except ImportError:
        return None
    with torch.device("meta"):
        net = models.build(recipe.model, plan_of(layout, task_of(recipe)), facts)
    total, _ = calculate_maximum_sizes(net)
    return int(max(estimate_training_usage(total, "float32" if layout.precision == "32-true" else "bfloat16").values()))


def mem_tracker(recipe: Recipe, facts: DataFacts, layout: Layout) -> int:
    """The peak of two steps of one process with the row's micro batch."""
    task, fakes = task_of(recipe), FakeTensorMode(allow_non_fake_inputs=True)
    alone = replace(layout, strategy="single", nodes=1, devices=1)
    plan = plan_of(alone, task)
    net = fake_network(recipe, plan, facts, alone, fakes)
    with fakes, as_with_values():
        module = training_module(net, recipe, plan, facts)
        optimizer = build_optimizer(recipe.optim, net, fused=False)
        batch = training_batch(recipe, task, facts, layout.micro_batch_size)
        tracker = MemTracker()
        tracker.track_external(module, optimizer, *tensors_of(batch))
        with tracker:
            for _ in range(2):
                for micro in range(layout.accumulate_grad_batches):
                    with autocast(alone):
                        loss = module.training_step(batch, micro)
                    loss.backward()
                    tracker.reset_mod_stats()  # it refuses a second forward pass without
                optimizer.step()
                optimizer.zero_grad()
        peak = tracker.get_tracker_snapshot("peak")
    return int(peak[torch.device("cpu")]["Total"])


def traced(recipe: Recipe, facts: DataFacts, layout: Layout) -> int:
    """lm_train's prediction by a trace, the bare process left out."""
    found = trace(recipe, facts, layout, (16, 32))
    said = memory_of(
        list(found.shapes),
        found.work(layout),
        layout,
        recipe.optim,
        _cluster(),
        copies="never",
        validates=True,
    )
    return said.total - BARE_PROCESS


PREDICTORS: dict[str, Callable[[Recipe, DataFacts, Layout], int | None]] = {
    "deepspeed": deepspeed,
    "accelerate": accelerate,
    "mem_tracker": mem_tracker,
    "traced": traced,
}


def asked(row: Row) -> dict[str, Any]:
    """What each predictor says about a row, with the seconds it took; a failure as its message."""
    words = words_of(row, Path("FOLDER"))
    recipe, layout = load(words), layout_of(row, words)
    facts = facts_of(row, recipe)
    found: dict[str, Any] = {"name": row.name, "split": row.split, "strategy": row.strategy}
    for name, predictor in PREDICTORS.items():
        began = time.perf_counter()
        try:
            found[name] = {"says": predictor(recipe, facts, layout)}
        except Exception as error:
            found[name] = {
                "says": None,
                "error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
            }
        found[name]["seconds"] = round(time.perf_counter() - began, 3)
    began = time.perf_counter()
    found["formulas"] = {"says": predict(row, words)[0].total - BARE_PROCESS}
    found["formulas"]["seconds"] = round(time.perf_counter() - began, 3)
    return found


def held_against(row: dict[str, Any], measured: float | None) -> dict[str, Any]:
    """A row with what was measured, and the relative error of each answer."""
    row = row | {"measured": measured}
    for name in NAMES:
        if measured is not None and row[name]["says"] is not None:
            row[name] = row[name] | {"relative_error": row[name]["says"] / measured - 1}
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors of each predictor over the rows it has an answer for: all of them, and those of one process."""
    found: dict[str, Any] = {}
    for name in NAMES:
        some = [row for row in rows if row["measured"] and row[name]["says"] is not None]
        alone = [row for row in some if row["strategy"] == "single"]
        held_out = [row for row in some if row["split"] != "calibration"]
        found[name] = {
            of: errors((row[name]["says"], row["measured"]) for row in part)
            for of, part in (("all", some), ("one process", alone), ("held out", held_out))
        }
        found[name]["rows_without_an_answer"] = sum(row[name]["says"] is None for row in rows)
        found[name]["seconds_a_row"] = sum(row[name]["seconds"] for row in rows) / max(1, len(rows))
    return found


# ---- Lightning's BatchSizeFinder


class _Stock(L.LightningModule):
    """What one writes for it: the batch size is an attribute that the finder changes."""

    def __init__(self, net: torch.nn.Module, length: int) -> None:
        super().__init__()
        self.net, self.length, self.batch_size = net, length, 1

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.net(batch[0], batch[0]) / batch[0].numel()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.zeros(100_000, self.length, dtype=torch.int64)), self.batch_size)


def _finds(answers: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    recipe = load(["recipe=gpt_debug", GPT_A])
    layout = layout_of(ROWS[0], words_of(ROWS[0], Path("FOLDER")))
    net = models.build(recipe.model, plan_of(layout, "causal_lm"), known_facts(recipe))
    module = _Stock(net, recipe.model.block_size)  # type: ignore[union-attr]
    module.training_step([torch.zeros(1, module.length, dtype=torch.int64)], 0).backward()  # libraries are there now
    module.zero_grad()
    size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024  # type: ignore[union-attr]
    resource.setrlimit(resource.RLIMIT_AS, (size + FINDER_BYTES, resource.RLIM_INFINITY))
    finder = BatchSizeFinder(mode="binsearch", steps_per_trial=3, init_val=1)
    trainer = L.Trainer(
        default_root_dir=tempfile.mkdtemp(),  # where it leaves a checkpoint, if it breaks off
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[finder],
    )  # fmt: skip
    told = io.StringIO()
    logging.getLogger("lightning.pytorch").addHandler(logging.StreamHandler(told))
    found: dict[str, Any] = {"error": None}
    began = time.perf_counter()
    try:
        trainer.fit(module)
    except Exception as error:  # what it does not take for a lack of memory ends the search
        found["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    trials = re.findall(r"Batch size (\d+) (succeeded|failed)", told.getvalue())
    works = [int(size) for size, end in trials if end == "succeeded"]
    answers.put(found | {"says": max(works, default=None), "trials": trials, "seconds": time.perf_counter() - began})


def batch_size_finder() -> dict[str, Any]:
    """What it finds under a limit of address space, and what the formulas say."""
    os.environ.update(ALLOCATOR)  # read as the process starts; else freed memory still counts as taken
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_finds, args=(answers,))
    process.start()
    process.join(900)
    alive = process.is_alive()
    if alive:
        process.kill()
    found = {"says": None, "seconds": 900.0} if alive or answers.empty() else answers.get()
    began = time.perf_counter()
    words = words_of(ROWS[0], Path("FOLDER"))
    recipe = load(words)
    facts = facts_of(ROWS[0], recipe)
    shapes = parameter_shapes(recipe.model, "causal_lm", facts)
    assert shapes is not None
    # what is there already when the limit begins: parameters; all else counts
    held = 4 * sum(torch.Size(shape).numel() for _, shape in shapes)
    size = 1
    while True:
        row = ROWS[0]._replace(micro_batch_size=size + 1)
        said = predict(row, words_of(row, Path("FOLDER")))[0]
        if said.total - said.reserve - held > FINDER_BYTES:
            break
        size += 1
    formulas = {"says": size, "seconds": time.perf_counter() - began}
    return {"model": GPT_A, "limit_bytes": FINDER_BYTES, "batch_size_finder": found, "formulas": formulas}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of rows; writes no results")
    parser.add_argument("--finder", action="store_true", help="run Lightning's BatchSizeFinder as well (minutes)")
    parser.add_argument("--measured", type=Path, default=RESULTS / "memory_cpu.json")
    parser.add_argument(
        "--resume", type=Path, help="answers that were given before, and where new ones go; or earlier results"
    )
    parser.add_argument("--out", default="baselines")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    measured: dict[str, float] = {}
    if options.measured.exists():
        measured = {row["name"]: row["measured"] for row in json.loads(options.measured.read_text())["result"]["rows"]}
    kept = options.resume
    answers: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept and kept.exists() else {}
    finder = None
    if "result" in answers:  # results of before: only what was measured is read anew
        kept, finder = None, answers["result"].get("finder")
        answers = {row["name"]: row for row in answers["result"]["rows"]}
    for row in ROWS:
        if row.name not in answers and (not options.only or row.name in options.only):
            answers[row.name] = asked(row)
            print(json.dumps(answers[row.name]), flush=True)
            if kept:
                kept.write_text(json.dumps(answers))
    rows = [held_against(row, measured.get(name)) for name, row in answers.items()]
    result: dict[str, Any] = {"summary": summary(rows), "rows": rows}
    finder = batch_size_finder() if options.finder else finder
    if finder is not None:
        result["finder"] = finder
        print(json.dumps(finder))
    print(json.dumps(result["summary"], indent=1))
    if not options.only:
        write_results("baselines", result, options.out)


if __name__ == "__main__":
    main()
