"""Training inside a real Slurm on this machine: four nodes, each with a slurmd and two device files for GPUs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lm_train.budget import Account
from lm_train.runs import RunFolder, read_jsonl
from tests.conftest import TINY

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "tests" / "slurm-cluster.sh"
NODES = 4
SILENT = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
STEPS = ("trainer.max_steps=20", "trainer.limit_val_batches=2")
ENDLESS = ("trainer.max_steps=1000000", "trainer.log_every_n_steps=20", "checkpoint.every_n_steps=100000")


def missing() -> str | None:
    """Why no cluster can be started here."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in ("slurmctld", "slurmd", "munged", "srun") if shutil.which(name, path=path) is None]
    if absent:
        return f"no {' '.join(absent)} here: apt-get install slurm-wlm munge"
    return "starting slurmctld needs root" if os.geteuid() != 0 else None


pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.fixture(scope="session")
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which srun, sbatch and scontrol speak to a cluster of the tests' own."""
    folder = tempfile.mkdtemp(prefix="slurm-")  # a short path: sockets lie in it
    started = subprocess.run(
        [CLUSTER, "start", folder, str(free_ports(NODES + 1)), str(NODES), "2"], capture_output=True, text=True
    )
    # also where these tests are killed
    subprocess.Popen([CLUSTER, "stop-after", folder, str(os.getpid())], start_new_session=True, **SILENT)
    try:
        assert started.returncode == 0, started.stderr
        # what a surrounding job would say of itself is not the cluster's
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        yield inherited | {"SLURM_CONF": f"{folder}/slurm.conf"}
    finally:
        subprocess.run([CLUSTER, "stop", folder], check=True)
        shutil.rmtree(folder)


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    first = 20_000 + os.getpid() % 1_000 * 10
    while any(_taken(first + n) for n in range(count)):
        first += count
    return first


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Site:
    """A folder to start jobs from, with a checkout whose environment is that of the tests."""

    def __init__(self, folder: Path, environment: dict[str, str], text: Path) -> None:
        self.folder, self.environment, self.text = folder, environment, text
        self.checkout = folder / "checkout"
        for name in ("launch", "slurm"):
            shutil.copytree(ROOT / name, self.checkout / name)
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.checkout)
        python = self.checkout / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        sums = [
            self.call("sh", "-c", f"cksum <{self.checkout / name}").strip()
            for name in ("pyproject.toml", "constraints.txt")
        ]
        (self.checkout / ".venv" / ".ready").write_text("-".join(sums) + "\n")
        self.train = str(self.checkout / "launch" / "train.sh")
        self.jobs: list[str] = []

    def words(self, *words: str) -> list[str]:
        """Words of a tiny run, the later ones in place of the earlier."""
        given = dict(word.split("=", 1) for word in (*TINY, f"data.path={self.text}", *STEPS, *words))
        return [f"{key}={value}" for key, value in given.items()]

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment | environment, capture_output=True, text=True, timeout=170
        )

    def call(self, *command: str) -> str:
        done = self.run(*command)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def srun(self, *options: str, words: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("srun", *options, self.train, *self.words(*words), **environment)

    def submit(self, *arguments: str) -> str:
        """The id of a job that was given to sbatch."""
        job = self.call("sbatch", "--parsable", *arguments).strip()
        self.jobs.append(job)
        return job

    def state(self, job: str) -> str:
        """Of the job; of all tasks of an array where they have not all come to the same."""
        states = set(re.findall(r"JobState=(\w+)", self.call("scontrol", "show", "job", job)))
        return " ".join(sorted(states))

    def restarts(self, job: str) -> int:
        return int(re.findall(r"Restarts=(\d+)", self.call("scontrol", "show", "job", job))[-1])

    def output(self, job: str) -> str:
        """Wherever it was submitted from."""
        files = [file for folder in (self.folder, self.checkout) for file in sorted(folder.glob(f"slurm-{job}*.out"))]
        return "".join(file.read_text() for file in files)

    def wait(self, what: str, ready: Callable[[], object], job: str = "", timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not ready():
            assert time.monotonic() < deadline, f"{what}: not within {timeout} s\n{self.output(job)}"
            time.sleep(0.1)

    def finish(self, job: str) -> str:
        """Waits for the end of a job; returns its output."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}
        self.wait("end", lambda: set(self.state(job).split()) <= ended, job)
        return self.output(job)

    def only_run(self) -> RunFolder:
        (folder,) = (self.folder / "runs").iterdir()
        return RunFolder(folder)


@pytest.fixture
def site(tmp_path: Path, cluster: dict[str, str], text_file: Path) -> Iterator[Site]:
    site = Site(tmp_path, cluster, text_file)
    yield site
    for job in site.jobs:
        site.run("scancel", "--quiet", job)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> RunFolder:
    """The run without Slurm that all others must equal."""
    folder = tmp_path_factory.mktemp("plain")
    given = dict(word.split("=", 1) for word in (*TINY, f"data.path={text_file}", *STEPS, "name=plain"))
    command = [sys.executable, "-m", "lm_train", "train", *(f"{key}={value}" for key, value in given.items())]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return RunFolder(folder / "runs" / "plain")


def assert_same_losses(run: RunFolder, plain: RunFolder) -> None:
    for key in ("train/loss", "train/grad_norm"):
        mine, theirs = ([row[key] for row in read_jsonl(r.metrics) if key in row] for r in (run, plain))
        assert len(mine) == 20
        assert mine == pytest.approx(theirs, abs=1e-5)


def steps(run: RunFolder) -> list[int]:
    return [row["step"] for row in read_jsonl(run.metrics) if "train/loss" in row]


def test_bare_srun_is_one_cpu_process_with_a_warning(site: Site, plain: RunFolder) -> None:
    done = site.srun()
    assert done.returncode == 0, done.stderr
    run = site.only_run()
    assert re.fullmatch(r"gpt_debug-\d+\.0", run.name)
    assert done.stdout.splitlines()[-1] == f"runs/{run.name}"
    assert "has no GPU: training on the CPU; srun --gpus-per-node=1 asks for one" in done.stderr
    assert "devices       1 x 1 cpu" in done.stderr
    assert run.exit_code.read_text() == "0\n"
    assert_same_losses(run, plain)


@pytest.mark.slow
def test_two_nodes_with_two_tasks_each_are_one_run(site: Site, plain: RunFolder) -> None:
    done = site.srun(
        "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--job-name=bash", words=("tracking.wandb=offline",)
    )
    assert done.returncode == 0, done.stderr
    assert "2 GPUs on n1, nvidia-smi shows none: training on the CPU" in done.stderr
    assert "devices       2 x 2 cpu" in done.stderr
    assert done.stderr.count("run folder") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout.count("runs/") == 1
    run = site.only_run()
    assert run.exit_code.read_text() == "0\n"
    assert len(list(run.wandb.glob("offline-run-*"))) == 1
    assert_same_losses(run, plain)


@pytest.mark.slow
def test_a_budget_ends_the_tasks_of_all_nodes_and_is_not_begun_again(site: Site) -> None:
    words = (
        "trainer.max_steps=10000000",
        "trainer.devices=1",
        "budget.hours=0.011",
        "trainer.log_every_n_steps=50",
        "name=run",
    )
    for _ in range(2):
        done = site.srun("--nodes=2", "--ntasks-per-node=1", words=words)
        assert done.returncode == 0, done.stderr
    assert "the budget is spent" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    run = site.only_run()
    (start,) = Account.read(run).starts
    assert start.tariff.devices == 2
    assert start.stopped is not None
    assert "forced" not in start.stopped
    assert start.seconds <= 0.011 * 3600
    assert (run.checkpoints / f"step-{start.stopped['step']}").is_dir()
    assert run.exit_code.read_text() == "0\n"


def test_sbatch_on_two_nodes_with_one_task_each(site: Site, plain: RunFolder) -> None:
    job = site.submit("--nodes=2", str(site.checkout / "slurm" / "train.sbatch"), *site.words())
    output = site.finish(job)
    assert site.state(job) == "COMPLETED", output
    run = site.only_run()
    assert run.name == f"gpt_debug-{job}"
    assert "devices       2 x 1 cpu" in output
    assert_same_losses(run, plain)


@pytest.mark.slow
def test_an_array_gives_each_task_its_line_and_its_run(site: Site) -> None:
    (site.folder / "words.txt").write_text("seed=1\nseed=2 'model.dropout=0.1'\n")
    job = site.submit("--array=1-2", str(site.checkout / "slurm" / "array.sbatch"), "words.txt", *site.words())
    output = site.finish(job)
    assert site.state(job) == "COMPLETED", output
    for task in (1, 2):
        run = RunFolder(site.folder / "runs" / f"gpt_debug-{job}_{task}")
        assert f"\nseed: {task}\n" in run.recipe.read_text()
    assert "dropout: 0.1" in run.recipe.read_text()


def test_a_requeued_job_goes_on_in_its_folder_and_so_it_does_after_usr1(site: Site) -> None:
    words = site.words(*ENDLESS, "tracking.wandb=offline")
    job = site.submit(str(site.checkout / "slurm" / "train.sbatch"), *words)
    run = RunFolder(site.folder / "runs" / f"gpt_debug-{job}")
    latest = run.checkpoints / "latest"
    saved = 0
    for start, interrupt in enumerate((("scontrol", "requeue"), ("scancel", "--signal=USR1"))):
        site.wait("steps", lambda least=saved + 40: steps(run)[-1:] > [least], job)
        site.call(*interrupt, job)
        site.wait("end", lambda n=start + 1: run.outcome() is not None and site.restarts(job) == n, job)
        assert run.exit_code.read_text() == "75\n", site.output(job)
        assert json.loads(latest.read_text())["step"] > saved
        saved = json.loads(latest.read_text())["step"]
    site.wait("steps", lambda: steps(run)[-1:] > [saved], job)
    site.call("scancel", job)
    output = site.finish(job)
    assert site.state(job) == "CANCELLED"
    assert site.only_run().name == run.name
    assert f"resuming from runs/{run.name}/checkpoints/step-{saved}" in output
    assert steps(run) == sorted(set(steps(run))), "no step stands twice"
    assert "Traceback" not in output
    ids = {folder.name.rsplit("-", 1)[1] for folder in run.wandb.glob("offline-run-*")}
    assert ids == {(run.wandb / "run_id").read_text().strip()}


@pytest.mark.parametrize(
    ("options", "words", "said"),
    [
        (
            ("--kill-on-bad-exit=1", "--nodes=2", "--ntasks=3"),
            (),
            "has 2, 1 tasks on its 2 nodes, and training needs the same number on each; try srun",
        ),
        (("--kill-on-bad-exit=1", "--ntasks=2"), ("debug=true",), "debug=true is one process"),
    ],
)
def test_what_contradicts_the_allocation_is_one_line(
    site: Site, options: tuple[str, ...], words: tuple[str, ...], said: str
) -> None:
    done = site.srun(*options, words=words)
    assert done.returncode in (2, 143), "srun reports the largest code, and the tasks that were ended have 143"
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("srun:", "slurmstepd"))]
    assert len(lines) == 1, done.stderr
    assert said in lines[0]
    assert "srun --nodes=" in lines[0]
    assert not (site.folder / "runs").exists()


def test_without_an_environment_one_task_says_what_to_do(site: Site) -> None:
    (site.checkout / ".venv" / ".ready").unlink()
    done = site.srun("--nodes=2", "--ntasks-per-node=2")
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("srun:", "slurmstepd"))]
    assert done.returncode == 2
    assert len(lines) == 1, done.stderr
    assert lines[0].endswith("run launch/setup.sh on the login node")


def test_debug_inside_an_allocation(site: Site) -> None:
    command = ["srun", "--ntasks=1", site.train, *site.words("debug=true", "trainer.max_steps=20")]
    done = site.run("salloc", "--nodes=2", "--ntasks-per-node=2", *command)
    assert done.returncode == 0, done.stderr
    assert "slowest operations of 5 steps" in done.stderr
    assert re.fullmatch(r"gpt_debug-debug-\d+\.0", site.only_run().name)


@pytest.mark.slow
def test_a_folder_that_the_other_node_does_not_see_is_named_and_so_is_the_missing_rank(site: Site) -> None:
    """Each node starts in a folder of its own, as where runs_dir is on a node's own disk."""
    for node in ("0", "1"):
        (site.folder / node).mkdir()
    here = 'cd "$SLURM_NODEID" && exec "$0" "$@"'
    done = site.run("srun", "--nodes=2", "bash", "-c", here, site.train, *site.words(), LM_TRAIN_MEETING_TIMEOUT="8")
    assert done.returncode == 75
    lines = sorted(line for line in done.stderr.splitlines() if line.startswith("lm-train:") and "warning" not in line)
    assert len(lines) == 2, done.stderr
    assert re.match(
        r"lm-train: n2 saw no start of runs/gpt_debug-\d+.0 within 8 s; runs_dir=runs must be on a file", lines[0]
    )
    assert lines[1] == "lm-train: rank 0 on n1: rank 1 on n2 did not come within 8 s; 1 of 2 are there"


@pytest.mark.slow
def test_the_finished_job_ends_all_tasks_at_once(site: Site) -> None:
    options = ("--nodes=2", "--ntasks-per-node=1")
    assert site.srun(*options, words=("name=run",)).returncode == 0
    began = time.monotonic()
    again = site.srun(*options, words=("name=run",))
    assert (again.returncode, again.stdout) == (0, "runs/run\n"), again.stderr
    assert again.stderr.count("finished already") == 1
    assert time.monotonic() - began < 15


@pytest.mark.slow
def test_a_rank_lost_on_another_node_is_named_once(site: Site) -> None:
    job = site.submit("--nodes=2", "--no-requeue", str(site.checkout / "slurm" / "train.sbatch"), *site.words(*ENDLESS))
    run = RunFolder(site.folder / "runs" / f"gpt_debug-{job}")
    site.wait("steps", lambda: len(steps(run)) > 1, job)
    os.kill(pid_of_rank(run, 1), signal.SIGKILL)
    output = site.finish(job)
    assert run.exit_code.read_text() == "75\n"
    (line,) = (line for line in output.splitlines() if line.startswith("lm-train: rank"))
    assert re.match(r"lm-train: rank 1 on n2, after step \d+ \(.+\): was ended by SIGKILL", line)


def pid_of_rank(run: RunFolder, rank: int) -> int:
    wanted = {f"RANK={rank}".encode(), f"LM_TRAIN_ATTEMPT={next((run.root / '.start').iterdir())}".encode()}
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and wanted <= set((process / "environ").read_bytes().split(b"\0")):
                return int(process.name)
        except OSError:
            continue
    raise AssertionError(f"no rank {rank}")


@pytest.mark.slow
def test_the_command_of_the_first_trial(site: Site) -> None:
    """GPT-2 small for two steps, as a newcomer would try it: minutes on a CPU."""
    done = subprocess.run(
        ["srun", "--cpus-per-task=2", site.train, "recipe=gpt_small", "data=embedded", "data.global_batch_size=4",
         "trainer.max_steps=2", "trainer.limit_val_batches=1"],
        cwd=site.folder, env=site.environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "optim.warmup_steps=700 is not shorter than trainer.max_steps=2" in done.stderr
    assert steps(site.only_run()) == [1, 2]


@pytest.mark.slow
def test_a_hub_out_of_reach_is_one_line(site: Site) -> None:
    """As on a compute node without a network."""
    done = site.run("srun", site.train, "recipe=gpt_small", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 66, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("lm-train:") and "warning" not in line]
    assert len(said) == 1, done.stderr
    assert "data=embedded" in said[0]


# job files of a plan

CLUSTER_FILE = """\
base: cpu_laptop
site: {{partition: {partition}}}
"""


def planned_job(site: Site, *words: str, partition: str = "main") -> tuple[str, ...]:
    """Words of a tiny run on this cluster, for `lm-train plan` and `submit`."""
    (site.checkout / "cluster.yaml").write_text(CLUSTER_FILE.format(partition=partition))
    return (*site.words(*words), "cluster=./cluster.yaml", "sbatch=jobs/job.sbatch")


def lm_train(site: Site, *words: str) -> subprocess.CompletedProcess[str]:
    """In the checkout, as on a login node."""
    command = (sys.executable, "-m", "lm_train", *words)
    return subprocess.run(command, cwd=site.checkout, env=site.environment, capture_output=True, text=True)


def test_a_planned_job_is_submitted_and_runs_as_planned(site: Site, plain: RunFolder) -> None:
    done = lm_train(site, "submit", *planned_job(site))
    assert done.returncode == 0, done.stderr
    job = done.stdout.splitlines()[-1]
    site.jobs.append(job)
    output = site.finish(job)
    assert site.state(job) == "COMPLETED", output
    run = RunFolder(site.checkout / "runs" / f"gpt_debug-{job}")
    assert run.exit_code.read_text() == "0\n"
    planned, followed = (
        json.loads(file.read_text()) for file in (site.checkout / "jobs/job.sbatch.plan.json", run.plan)
    )
    assert planned["threads_per_rank"] == 8, "as many as Slurm believes that the node has"
    assert followed == {**planned, "threads_per_rank": followed["threads_per_rank"]}
    assert planned["prediction"]["hours"]["high"] < 1
    shown = site.call("scontrol", "show", "job", job)
    assert "Partition=main" in shown
    assert re.search(r"TimeLimit=00:\d\d:00", shown)
    assert_same_losses(run, plain)


def test_the_default_partition_is_planned_for(site: Site) -> None:
    done = lm_train(site, "plan", *site.words(), "format=json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["plan"]["cluster"] == "partition main"
    assert any("unknown GPU without a type in Slurm's gres" in note for note in answer["notes"])


def test_a_job_beyond_its_partition_is_refused_before_slurm_has_it(site: Site) -> None:
    done = lm_train(site, "plan", *planned_job(site, partition="short"))
    assert done.returncode == 0, done.stderr
    file = site.checkout / done.stdout.splitlines()[-1]
    asked = file.read_text()
    assert "#SBATCH --partition=short\n" in asked
    for pattern, other, said in (
        ("--time=.*", "--time=02:00:00", "--time: 2.00 h asked, partition short allows 1.00 h"),
        ("=short", "=shrt", "no partition shrt; did you mean short? There are main, short"),
        ("--nodes=1", "--nodes=2", "partition short has 1 with 2 GPUs, 8 CPUs"),
        ("--nodes=1", "--nodes=1 --gpus-per-node=3", "1 node with 3 GPUs, 8 CPUs"),
        ("--mem=.*", "--mem=64G", "64.0 GiB each asked, partition short has 1 with 2 GPUs, 8 CPUs, 15.6 GiB"),
    ):
        file.write_text(re.sub(pattern, other, asked))
        done = lm_train(site, "submit", "job=jobs/job.sbatch")
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        (line,) = done.stderr.splitlines()
        assert said in line
    assert site.call("squeue", "--noheader") == ""
    done = lm_train(site, "plan", *planned_job(site, partition="shrt"))
    assert done.returncode == 0, "a description may be of another cluster"
    done = lm_train(site, "plan", *site.words("cluster.partition=shrt"))
    assert done.returncode == 2
    assert "Slurm has no partition shrt; did you mean short? There are main, short" in done.stderr


TWO_NODES = """
import sys
from pathlib import Path
from lm_train import sbatch
from lm_train.clusters import find
from lm_train.hardware import Machine
from lm_train.plan import make_plan
from lm_train.recipe import load
from lm_train.slurm import Allocation

recipe = load(sys.argv[1:])
step = Allocation("0", "0", nodes=2, tasks_per_node=1, node_rank=0, local_task=0, node_name="n1")
plan = make_plan(recipe, Machine(2, ()), step)
sbatch.write(Path("job.sbatch"), sys.argv[1:], recipe, plan, find(recipe.cluster, Machine(2, ()), step))
"""


@pytest.mark.slow
def test_both_nodes_follow_the_plan_of_the_job(site: Site, plain: RunFolder) -> None:
    command = (sys.executable, "-c", TWO_NODES, *site.words())
    subprocess.run(command, cwd=site.checkout, env=site.environment, check=True)
    done = lm_train(site, "submit", "job=job.sbatch")
    assert done.returncode == 0, done.stderr
    job = done.stdout.splitlines()[-1]
    site.jobs.append(job)
    output = site.finish(job)
    assert site.state(job) == "COMPLETED", output
    run = RunFolder(site.checkout / "runs" / f"gpt_debug-{job}")
    assert json.loads(run.plan.read_text())["nodes"] == 2
    assert_same_losses(run, plain)
