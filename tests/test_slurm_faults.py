"""What a cluster does to a run in the end: preemption, lost nodes, time limits; in a real Slurm. All of it takes minutes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lm_train.runs import RunFolder
from tests import test_slurm
from tests.test_slurm import CLUSTER, ENDLESS, Site, pid_of_rank, steps

pytestmark = [pytest.mark.slow, test_slurm.pytestmark]
cluster, site = test_slurm.cluster, test_slurm.site
LONG = ("trainer.max_steps=700", "trainer.log_every_n_steps=20", "checkpoint.every_n_steps=50")


def submit(site: Site, *options: str, words: tuple[str, ...] = ENDLESS) -> tuple[str, RunFolder]:
    job = site.submit(*options, str(site.checkout / "slurm" / "train.sbatch"), *site.words(*words))
    return job, RunFolder(site.folder / "runs" / f"gpt_debug-{job}")


def came_on(run: RunFolder, after: int = 0) -> bool:
    return bool(steps(run)) and steps(run)[-1] > after


def ledger_of_the_undisturbed(site: Site, words: tuple[str, ...]) -> bytes:
    done = site.run(site.train, *site.words(*words, "name=whole"))
    assert done.returncode == 0, done.stderr
    return (site.folder / "runs" / "whole" / "ledger.jsonl").read_bytes()


def test_a_run_requeued_by_hand_and_preempted_by_another_partition_has_the_ledger_of_the_undisturbed(
    site: Site,
) -> None:
    whole = ledger_of_the_undisturbed(site, LONG)
    job, run = submit(site, "--partition=main", words=LONG)
    site.wait("steps", lambda: came_on(run, 80), job)
    site.call("scontrol", "requeue", job)
    site.wait("requeued", lambda: site.restarts(job) == 1, job)
    site.wait("steps", lambda: run.outcome() is None and came_on(run, 220), job)
    urgent = site.submit("--partition=urgent", "--nodes=4", "--exclusive", "--wrap=sleep 5")
    site.wait("preempted", lambda: site.restarts(job) == 2, job, timeout=180)
    assert run.outcome() == 75
    site.finish(urgent)
    output = site.finish(job)
    assert site.state(job) == "COMPLETED", output
    assert (run.root / "ledger.jsonl").read_bytes() == whole
    assert "Traceback" not in output


def test_a_lost_node_ends_the_step_and_the_job_goes_on_elsewhere(site: Site) -> None:
    words = LONG
    job, run = submit(site, "--nodes=2", "--exclude=n1", words=words)
    site.wait("a checkpoint", lambda: (run.checkpoints / "latest").exists(), job)
    folder = Path(site.environment["SLURM_CONF"]).parent
    subprocess.run([CLUSTER, "crash", str(folder), "n3"], check=True)
    site.wait("requeued", lambda: site.restarts(job) == 1, job, timeout=240)
    output = site.finish(job)
    assert site.state(job) == "COMPLETED", output
    assert "resuming from" in output
    assert steps(run) == sorted(set(steps(run)))


def test_a_rank_that_hangs_on_another_node_is_named_and_the_job_is_requeued(site: Site) -> None:
    job, run = submit(site, "--nodes=2", words=(*ENDLESS, "trainer.hang_timeout_s=6", "checkpoint.every_n_steps=50"))
    site.wait("a checkpoint", lambda: (run.checkpoints / "latest").exists(), job)
    os.kill(pid_of_rank(run, 1), signal.SIGSTOP)
    site.wait("requeued", lambda: site.restarts(job) == 1, job)
    site.call("scancel", job)
    output = site.finish(job)
    (line,) = (line for line in output.splitlines() if line.startswith("lm-train: rank"))
    assert re.match(
        r"lm-train: rank 1 on n\d, after step \d+ \(.+\): hangs: no progress for \d+ s; it is stopped", line
    )


def test_srun_alone_says_that_it_cannot_be_requeued_and_how_to_go_on(site: Site) -> None:
    process = subprocess.Popen(
        ["srun", "--kill-on-bad-exit=1", "--nodes=2", site.train, *site.words(*ENDLESS)],
        cwd=site.folder, env=site.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        site.wait("a run", lambda: list(site.folder.glob("runs/*/metrics.jsonl")))
        run = site.only_run()
        site.wait("steps", lambda: came_on(run))
        os.kill(pid_of_rank(run, 1), signal.SIGUSR1)  # one rank of all
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert run.outcome() == 75, err
    assert (run.checkpoints / "latest").exists()
    assert "warning: srun alone: Slurm cannot start Slurm step" in err
    assert f"go on with the same command and name={run.name}" in err


def test_a_time_limit_without_a_signal_is_minded(site: Site) -> None:
    """Slurm's limits are whole minutes: what is asked for here is reached after two."""
    job, run = submit(site, "--time=2", "--signal=USR1@0")
    began = time.monotonic()
    site.wait("requeued", lambda: site.restarts(job) == 1, job, timeout=200)
    assert run.outcome() == 75
    assert time.monotonic() - began < 135
    output = site.output(job)
    assert "the job's time limit is near: stopping at the next step boundary and saving" in output
    assert (run.checkpoints / "latest").exists()
    site.call("scancel", job)


def test_a_killed_supervisor_is_a_lost_rank(site: Site) -> None:
    job, run = submit(site, words=(*ENDLESS, "checkpoint.every_n_steps=50"))
    site.wait("a checkpoint", lambda: (run.checkpoints / "latest").exists(), job)
    rank = Path(f"/proc/{pid_of_rank(run, 0)}/status").read_text()
    os.kill(int(re.findall(r"PPid:\s+(\d+)", rank)[0]), signal.SIGKILL)
    site.wait("requeued", lambda: site.restarts(job) == 1, job)
    site.wait("going on", lambda: "resuming from" in site.output(job), job)
    site.call("scancel", job)
