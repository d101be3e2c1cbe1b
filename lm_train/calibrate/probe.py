"""Three real steps of a planned configuration, so that its plan can be corrected before the run begins. Free of torch."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lm_train.clusters import Cluster
from lm_train.errors import LMTrainError, UsageError
from lm_train.interpreter import python
from lm_train.plan import Plan, TimePrediction
from lm_train.plan.given import made_for
from lm_train.recipe import Recipe, dump, load
from lm_train.runs import RunFolder, read_jsonl
from lm_train.slurm import Allocation

WARM_UP, STEPS = 3, 3
"""Optimizer steps before and while it is measured: the first ones choose kernels and fill the allocator."""
WORDS = (
    f"trainer.max_steps={WARM_UP + STEPS}",
    "trainer.max_tokens=null",
    "trainer.max_epochs=null",
    "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=null",
    "trainer.limit_val_batches=0",
    "trainer.limit_test_batches=0",
    "trainer.sample_tokens=0",
    "trainer.early_stopping_patience=null",
    "checkpoint.every_n_steps=null",
    "tracking.wandb=disabled",
    "name=probe",
    "resume=never",
    "plan=null",
    "debug=false",
)
ROW_ERROR = 0.03
"""What logging each step adds to one, and three steps leave open: the least that a corrected time is still off by."""


@dataclass(frozen=True)
class Probe:
    """What a few real steps took."""

    step_seconds: float
    """Median of the measured steps."""
    spread: float
    """Of the measured steps, relative to the median."""
    peak_bytes: int
    """Of rank 0: allocated on its GPU, else resident."""


class ProbeFailed(LMTrainError):
    """The planned configuration does not train here; the message says why."""


def probe_step(recipe: Recipe, plan: Plan, cluster: Cluster, allocation: Allocation | None = None) -> Probe:
    """Trains a few steps exactly as planned, by the normal supervisor, in a run folder that goes away.

    Args:
        recipe: what was asked.
        plan: which layout is tried.
        cluster: which the plan is for.
        allocation: the Slurm step around this process, if there is one.

    Raises:
        UsageError: if the plan is for another machine, or for several nodes.
        ProbeFailed: with the run's last line, if it cannot train.
    """
    if not cluster.here:
        raise UsageError(
            f"probe: {cluster.name} is a description, and a probe runs on the machine itself; leave probe=true out, or plan with "
            "cluster=auto where it will run"
        )
    if plan.nodes > 1 or (allocation is not None and allocation.tasks > 1):
        raise UsageError(
            "probe: a probe starts its ranks from one process, on one node; try srun --nodes=1 --ntasks=1, or calibrate in the "
            "step: srun lm-train calibrate"
        )
    with tempfile.TemporaryDirectory(prefix="lm-train-probe-") as temporary:
        folder = Path(temporary)
        file = folder / "recipe.yaml"
        file.write_text(dump(recipe), encoding="utf-8")
        allowed = [f"plugins={','.join(recipe.plugins)}"] if recipe.plugins else []
        words = [f"recipe={file}", *allowed, *WORDS, f"runs_dir={folder / 'runs'}", *_fixed(plan)]
        tried = load(words)
        frozen = plan.model_copy(update={"max_steps": WARM_UP + STEPS, "limits": {}, "made_for": made_for(tried)})
        plan_file = folder / "plan.json"
        plan_file.write_text(frozen.model_dump_json(), encoding="utf-8")
        words = [*(word for word in words if word != "plan=null"), f"plan={plan_file}"]
        done = subprocess.run(
            [*python(), "-m", "lm_train", "train", *words],
            capture_output=True,
            text=True,
            check=False,
        )
        rows = [row for row in read_jsonl(RunFolder(folder / "runs" / "probe").metrics) if "perf/step_seconds" in row]
        if done.returncode != 0 or len(rows) < WARM_UP + STEPS:
            last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:] or ["it said nothing"]
            raise ProbeFailed(f"probe: the planned configuration did not train here: {last[0]}")
    seconds = [row["perf/step_seconds"] for row in rows[-STEPS:]]
    median = statistics.median(seconds)
    return Probe(median, (max(seconds) - min(seconds)) / median, int(rows[-1]["memory/peak_bytes"]))


def _fixed(plan: Plan) -> list[str]:
    """The plan's decisions as words, so that the recipe leaves nothing open."""
    return [
        f"trainer.strategy={plan.strategy}",
        f"trainer.precision={plan.precision}",
        f"trainer.devices={plan.devices}",
        f"trainer.accumulate_grad_batches={plan.accumulate_grad_batches}",
        f"trainer.activation_checkpointing={plan.activation_checkpointing}",
        f"trainer.cross_entropy_chunks={plan.cross_entropy_chunks}",
        f"data.global_batch_size={plan.global_batch_size}",
        f"data.micro_batch_size={plan.micro_batch_size}",
        f"data.num_workers={plan.num_workers}",
        "budget={}",
    ]


def corrected(prediction: TimePrediction, measured: Probe) -> TimePrediction:
    """The prediction, every part scaled so that the step takes what it took; its interval is what the probe leaves open."""
    factor = measured.step_seconds / prediction.seconds
    error = max(ROW_ERROR, measured.spread)
    return prediction.model_copy(
        update={
            **{
                part: getattr(prediction, part) * factor
                for part in ("compute", "communication", "optimizer", "data", "host")
            },
            "relative_error": (min(0.9, error), error),
            "source": f"a probe of {STEPS} steps; parts by {prediction.source}",
        }
    )
