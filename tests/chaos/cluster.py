"""Jobs of a real Slurm on this machine: requeued again and again, preempted, their node lost; then the same ledger."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lm_train import ledger
from lm_train.runs import RunFolder
from tests.chaos.bench import Bench, Failed

REQUEUES = 5
"""Of one job."""
LONG = ("trainer.max_steps=6000", "trainer.log_every_n_steps=20", "checkpoint.every_n_steps=200")
APART = 600
"""Steps from one requeue to the next, at the most."""


@contextlib.contextmanager
def _site(bench: Bench, name: str) -> Iterator[Any]:
    from tests import test_slurm

    if (why := test_slurm.missing()) is not None:
        raise _Absent(why)
    folder, work = tempfile.mkdtemp(prefix="slurm-"), bench.folder / name  # a short path: sockets lie in it
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    first = str(test_slurm.free_ports(test_slurm.NODES + 1))
    try:
        subprocess.Popen(
            [test_slurm.CLUSTER, "stop-after", folder, str(os.getpid())], start_new_session=True, **test_slurm.SILENT
        )
        started = subprocess.run(
            [test_slurm.CLUSTER, "start", folder, first, str(test_slurm.NODES), "2"], capture_output=True, text=True
        )
        if started.returncode:
            raise Failed(f"the cluster did not start: {started.stderr}")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        site = test_slurm.Site(work, inherited | {"SLURM_CONF": f"{folder}/slurm.conf"}, bench.text)
        yield site
        for job in site.jobs:
            site.run("scancel", "--quiet", job)
    finally:
        subprocess.run([test_slurm.CLUSTER, "stop", folder], check=False)
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(work)


class _Absent(Exception):
    """No Slurm here."""


def in_slurm(bench: Bench, case: int, draw: random.Random) -> dict[str, Any]:
    """Jobs that are requeued five times at seeded steps; the last case is preempted and loses its node as well."""
    try:
        with _site(bench, f"slurm-{case}") as site:
            facts = _requeued(bench, site, case, draw)
    except _Absent as absent:
        return {"points": 0, "skipped": str(absent)}
    except AssertionError as error:  # what the site waits for
        raise Failed(str(error)) from None
    return facts


def _requeued(bench: Bench, site: Any, case: int, draw: random.Random) -> dict[str, Any]:
    words = LONG
    straight = site.folder / "whole"
    ended = bench.start(
        ["train", *site.words(*words, "name=whole", f"runs_dir={site.folder}")], name=f"slurm-{case}/whole"
    ).wait()
    if ended.status != 0:
        raise Failed(f"the undisturbed run ended with {ended.status}:\n{ended.output[-1500:]}")
    job = site.submit("--partition=main", str(site.checkout / "slurm" / "train.sbatch"), *site.words(*words))
    run = RunFolder(site.folder / "runs" / f"gpt_debug-{job}")
    seconds: list[float] = []
    for number in range(REQUEUES):
        step = (ledger.last_step(run.ledger) or 0) + draw.randint(50, APART)
        _wait(
            site,
            f"step {step}",
            lambda step=step: run.outcome() is None and (ledger.last_step(run.ledger) or 0) >= step,
            job,
        )
        began = time.monotonic()
        if case == 0 and number == REQUEUES - 1:
            urgent = site.submit("--partition=urgent", "--nodes=4", "--exclusive", "--wrap=sleep 2")
            _wait(site, "preempted", lambda n=number: site.restarts(job) == n + 1, job)
            site.finish(urgent)
        else:
            site.call("scontrol", "requeue", job)
            _wait(site, f"requeue {number + 1}", lambda n=number: site.restarts(job) == n + 1, job)
        _wait(site, "its next start", lambda: site.state(job) == "RUNNING" and run.outcome() is None, job)
        seconds.append(round(time.monotonic() - began, 1))
    site.wait("end", lambda: site.state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), job, timeout=400)
    output = site.output(job)
    if site.state(job) != "COMPLETED" or "Traceback" in output:
        raise Failed(f"the job is {site.state(job)}:\n{output[-2000:]}")
    if run.ledger.read_bytes() != (straight / "ledger.jsonl").read_bytes():
        raise Failed(f"another ledger: {ledger.compare(run.ledger, straight / 'ledger.jsonl')}")
    return {"points": REQUEUES, "slowest_requeue_s": max(seconds)}


def _wait(site: Any, what: str, ready: Callable[[], object], job: str) -> None:
    def or_ended() -> bool:
        if ready():
            return True
        state = site.state(job)
        assert state not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), f"{state} before {what}"
        time.sleep(0.2)
        return False

    site.wait(what, or_ended, job, timeout=300)


def node_lost(bench: Bench, case: int, draw: random.Random) -> dict[str, Any]:
    """A job on two nodes, one of which ends at once with all that runs on it: requeued elsewhere, and the same ledger."""
    from tests import test_slurm

    try:
        with _site(bench, f"node-{case}") as site:
            words = LONG
            job = site.submit(
                "--nodes=2", "--exclude=n1", str(site.checkout / "slurm" / "train.sbatch"), *site.words(*words)
            )
            run = RunFolder(site.folder / "runs" / f"gpt_debug-{job}")
            step = draw.randint(250, 2000)
            _wait(site, f"step {step}", lambda: (ledger.last_step(run.ledger) or 0) >= step, job)
            folder = Path(site.environment["SLURM_CONF"]).parent
            subprocess.run([test_slurm.CLUSTER, "crash", str(folder), draw.choice(("n2", "n3"))], check=True)
            _wait(site, "requeued", lambda: site.restarts(job) == 1, job)
            site.wait("end", lambda: site.state(job) in ("COMPLETED", "FAILED", "CANCELLED"), job, timeout=400)
            output = site.output(job)
            if site.state(job) != "COMPLETED" or "resuming from" not in output:
                raise Failed(f"the job is {site.state(job)}:\n{output[-2000:]}")
            steps = [row.step for row in ledger.read(run.ledger)]
            if steps != list(range(1, 6001)):
                raise Failed(f"{len(steps)} steps in the ledger")
    except _Absent as absent:
        return {"points": 0, "skipped": str(absent)}
    except AssertionError as error:
        raise Failed(str(error)) from None
    return {"points": 1, "step": step}
