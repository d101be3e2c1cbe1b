"""Job files: what Slurm is asked for, the plan that they follow, and what is said before a job is submitted in vain."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lm_train import sbatch
from lm_train.cli import main
from lm_train.clusters import Cluster, Site, cluster_named, this_cluster
from lm_train.errors import OutputError, UsageError
from lm_train.hardware import GPU, Machine
from lm_train.plan import Interval, MemoryPrediction, Plan, Prediction, TimePrediction, make_plan, plan_for
from lm_train.recipe import Recipe, load
from lm_train.slurm import Allocation
from lm_train.submit import file_of, read_job
from tests.conftest import TINY
from tests.slurm_answers import install

CPU = Machine(cpu_cores=4, gpus=())
H100 = GPU("NVIDIA H100 80GB HBM3", 81559 << 20, (9, 0))
GB = 10**9


def predicted(hours: float = 10.0, host: int = 0, capacity: int = 0, saving: float = 5.0) -> Prediction:
    """With `hours` at the upper end."""
    memory = dict.fromkeys(("parameters", "gradients", "optimizer", "activations", "logits", "buffers", "reserve"), GB)
    span = Interval(low=hours / 2, value=hours * 0.8, high=hours)
    return Prediction(
        memory=MemoryPrediction(**memory, moment="update", host=host, relative_error=(0.0, 0.0), capacity=capacity),
        step=TimePrediction(
            compute=1, communication=0, optimizer=0, data=0, host=0, relative_error=(0.1, 0.1), source="data sheets"
        ),
        samples_per_second=1.0,
        mfu=None,
        start_seconds=30,
        validation_seconds=1,
        checkpoint_bytes=GB,
        checkpoint_seconds=Interval(low=1, value=2, high=saving),
        hours=span,
        gpu_hours=span,
        money=None,
        currency="USD",
        kwh=span,
        final_loss=None,
    )


def recipe_and_plan(machine: Machine, *words: str, **changes: object) -> tuple[Recipe, Plan]:
    recipe = load([*dict.fromkeys(TINY), *words])
    return recipe, make_plan(recipe, machine).model_copy(update={"prediction": predicted(), **changes})


def options(text: str) -> dict[str, str]:
    found = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert found.pop("requeue") == ""
    return found


def test_a_job_on_gpus() -> None:
    cluster = cluster_named("h100x8_4nodes")
    site = Site(partition="gpu", account="grp", qos="long", gres="gpu:h100", max_hours=48.0)
    cluster = cluster.model_copy(update={"site": site})
    recipe, plan = recipe_and_plan(
        CPU,
        nodes=2,
        devices=4,
        accelerator="gpu",
        threads_per_rank=26,
        num_workers=2,
        prediction=predicted(10, host=GB),
    )
    asked = options(sbatch.job_file(["recipe=gpt_debug"], recipe, plan, cluster))
    assert asked == {
        "job-name": "lm-gpt_debug",
        "partition": "gpu",
        "account": "grp",
        "qos": "long",
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "h100:4",
        "cpus-per-task": "40",  # 4 x (8 + 2)
        "mem": asked["mem"],
        "time": "10:02:00",  # the upper end, and the two minutes from the signal to the end
        "signal": "USR1@120",
        "open-mode": "append",
    }
    gigabytes = int(asked["mem"].removesuffix("M")) * 2**20 / 1e9
    assert 4 * (8 + 1 + 2) < gigabytes < 60, "processes, pinned memory, loader workers"


def test_cores_are_a_share_of_the_node() -> None:
    cluster = cluster_named("h100x8").model_copy(update={"cpu_cores_per_node": 64})
    plan = recipe_and_plan(CPU, devices=4, accelerator="gpu", threads_per_rank=16, num_workers=4)[1]
    assert sbatch.cpus(plan, cluster) == 32, "half of the GPUs, half of the cores"
    offloaded = plan.model_copy(update={"strategy": "zero3_offload", "num_workers": 0, "threads_per_rank": 10})
    assert sbatch.cpus(offloaded, cluster_named("h100x8")) == 40


def test_folds_take_their_time_one_after_another() -> None:
    plan = recipe_and_plan(CPU, prediction=predicted(1.0))[1]
    recipe = load(["recipe=mlp_digits", "data.folds=5"])
    assert options(sbatch.job_file([], recipe, plan, this_cluster(CPU, None)))["time"] == "05:02:00"


def test_gres_words_of_the_site() -> None:
    recipe, plan = recipe_and_plan(CPU, devices=2, accelerator="gpu")
    for gres, wanted in (("gpu", {"gpus-per-node": "2"}), ("accel:h100", {"gres": "accel:h100:2"})):
        cluster = cluster_named("h100x8").model_copy(update={"site": Site(gres=gres)})
        asked = options(sbatch.job_file([], recipe, plan, cluster))
        assert {key: value for key, value in asked.items() if key.startswith("g")} == wanted


def test_a_job_on_the_cpu() -> None:
    recipe, plan = recipe_and_plan(CPU, devices=2, threads_per_rank=2, prediction=predicted(0.5))
    asked = options(
        sbatch.job_file([], recipe, plan, this_cluster(CPU, None).model_copy(update={"host_memory_bytes": 0}))
    )
    assert (asked["cpus-per-task"], asked["time"]) == ("4", "00:32:00")
    assert "partition" not in asked
    assert int(asked["mem"].removesuffix("M")) << 20 >= 2 * 7 * GB * 1.25, "what is resident in each process, and more"


@pytest.mark.parametrize(
    ("hours", "most", "time"),
    [(0.01, None, "00:03:00"), (30.0, None, "1-06:02:00"), (30.0, 24.0, "1-00:00:00"), (23.99, 24.0, "1-00:00:00"),
     (1.0, 24.0, "01:02:00"), (240.5, None, "10-00:32:00")],
)  # fmt: skip
def test_the_time_limit(hours: float, most: float | None, time: str) -> None:
    recipe, plan = recipe_and_plan(CPU, prediction=predicted(hours))
    cluster = this_cluster(CPU, None).model_copy(update={"site": Site(partition="short", max_hours=most)})
    text = sbatch.job_file([], recipe, plan, cluster)
    assert options(text)["time"] == time
    told = [line for line in sbatch.notes(recipe, plan, cluster) if "ends jobs after" in line]
    assert told == (
        ["the run may take 30.0 h, and short ends jobs after 24.0 h: it saves, is requeued by itself, and goes on"]
        if hours == 30.0 and most
        else []
    )
    assert all(f"# {line}" in text for line in told)


def test_a_large_checkpoint_has_the_time_to_be_written() -> None:
    recipe, plan = recipe_and_plan(CPU, prediction=predicted(1.0, saving=300.0))
    asked = options(sbatch.job_file([], recipe, plan, this_cluster(CPU, None)))
    assert (asked["signal"], asked["time"]) == ("USR1@660", "01:11:00")


def test_without_a_prediction_the_job_asks_for_all_it_may_have() -> None:
    cluster = cluster_named("h100x8").model_copy(update={"site": Site(max_hours=12.0)})
    recipe, plan = recipe_and_plan(CPU, devices=2, accelerator="gpu", prediction=None)
    asked = options(sbatch.job_file([], recipe, plan, cluster))
    assert asked["time"] == "12:00:00"
    assert int(asked["mem"].removesuffix("M")) << 20 == pytest.approx(cluster.host_memory_bytes / 4, rel=0.01)
    assert "nothing is predicted for this model" in sbatch.notes(recipe, plan, cluster)[0]
    open_ended = options(sbatch.job_file([], recipe, plan, cluster_named("h100x8")))
    assert "time" not in open_ended


@pytest.fixture
def odd_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a checkout's slurm/train.sbatch that only prints its words, in a folder whose name a shell could break."""
    folder = tmp_path / "it's a $(touch broken) folder"
    (folder / "slurm").mkdir(parents=True)
    (folder / "slurm" / "train.sbatch").write_text(
        'printf "%s\\n" "$LM_TRAIN_ROOT" "$PWD" "${LM_TRAIN_CONTAINER:-}" "$@"\n'
    )
    monkeypatch.chdir(folder)
    return folder


def test_no_word_is_anything_to_the_shell(odd_folder: Path) -> None:
    words = [
        "recipe=gpt_debug",
        "data.path=a b",
        "model={kind: gpt, n_layer: 2}",
        "name=$(touch broken)",
        "x='\"`id`\n2",
    ]
    recipe, plan = recipe_and_plan(CPU)
    site = Site(container="apptainer exec 'i m.sif'; touch broken", modules=())
    cluster = this_cluster(CPU, None).model_copy(update={"site": site})
    assert (
        sbatch.write(Path("jobs/a b.sbatch"), [*words, "why=true", "sbatch=x", "plan=old"], recipe, plan, cluster) == []
    )
    done = subprocess.run([odd_folder / "jobs" / "a b.sbatch"], capture_output=True, text=True, check=True, cwd="/")
    beside = odd_folder / "jobs" / "a b.sbatch.plan.json"
    expected = [str(odd_folder), str(odd_folder), site.container or "", *words, f"plan={beside}"]
    assert done.stdout == "\n".join(expected) + "\n"
    assert not (odd_folder / "broken").exists()
    assert json.loads(beside.read_text())["made_for"]["model.n_layer"] == 2
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--severity=warning", "jobs/a b.sbatch"], check=True)


def test_a_place_that_cannot_be_written(odd_folder: Path) -> None:
    recipe, plan = recipe_and_plan(CPU)
    cluster = this_cluster(CPU, None)
    for path, said in (
        (Path("slurm"), "is a folder; name a file in it"),
        (Path("/proc/x/y"), "choose another sbatch=PATH"),
    ):
        with pytest.raises(OutputError, match=said):
            sbatch.write(path, [], recipe, plan, cluster)
    assert [file.name for file in odd_folder.iterdir()] == ["slurm"]


def test_modules_are_loaded_first(odd_folder: Path) -> None:
    recipe, plan = recipe_and_plan(CPU)
    cluster = this_cluster(CPU, None).model_copy(update={"site": Site(modules=("cuda/12.8", "a b"))})
    text = sbatch.job_file(["recipe=x"], recipe, plan, cluster)
    assert "module load cuda/12.8 || exit 2\nmodule load 'a b' || exit 2\nexec bash" in text
    program = f'module() {{ echo "loading $2"; [ $2 = cuda/12.8 ]; }}\n{text}'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "loading cuda/12.8\nloading a b\n")


def test_a_name_that_slurm_would_misread_is_refused() -> None:
    recipe, plan = recipe_and_plan(CPU)
    cluster = this_cluster(CPU, None).model_copy(update={"site": Site(account="grp\n#SBATCH --nodes=99")})
    with pytest.raises(UsageError, match=r"account: .* cannot stand in a job file"):
        sbatch.job_file([], recipe, plan, cluster)


def test_without_a_checkout_there_is_no_job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sbatch, "__file__", str(tmp_path / "site-packages" / "lm_train" / "sbatch.py"))
    recipe, plan = recipe_and_plan(CPU)
    with pytest.raises(UsageError, match=r"no slurm/train\.sbatch in .*; run lm-train plan in a checkout"):
        sbatch.job_file([], recipe, plan, this_cluster(CPU, None))


# following a plan


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The plan of a tiny run on one CPU process."""
    recipe, plan = recipe_and_plan(CPU, num_workers=3)
    sbatch.write(tmp_path / "job.sbatch", TINY, recipe, plan, this_cluster(CPU, None))
    return tmp_path / "job.sbatch.plan.json"


def test_a_start_follows_its_plan_exactly(written: Path) -> None:
    recipe = load([*TINY, f"plan={written}", "seed=4", "tracking.project=p", "name=other"])
    plan = plan_for(recipe, CPU, None)
    assert plan.num_workers == 3, "which no new plan would choose"
    assert plan.prediction == predicted()
    assert plan_for(load([*TINY]), CPU, None).num_workers == 0
    assert plan_for(recipe, Machine(1, ()), None).threads_per_rank == 1, "not more threads than there are cores"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["trainer.max_steps=51"],
            "made for another recipe: trainer.max_steps was 50, now 51; plan again, or give the words that it was",
        ),
        (["optim={kind: sgd, learning_rate: 1e-3}", "trainer.log_every_n_steps=2"], ", and "),
        (["budget.hours=1"], "budget.hours was None, now 1.0"),
    ],
)
def test_a_plan_of_another_recipe(written: Path, words: list[str], said: str) -> None:
    given = dict(word.split("=", 1) for word in (*TINY, *words))
    recipe = load([*(f"{key}={value}" for key, value in given.items()), f"plan={written}"])
    with pytest.raises(UsageError) as error:
        plan_for(recipe, CPU, None)
    assert len(error.value.problems) == 1
    assert str(error.value).startswith(f"plan={written}: made for another recipe: ")
    assert said in str(error.value)


def step(**changes: object) -> Allocation:
    values = {"nodes": 1, "tasks_per_node": 1, "node_rank": 0, "local_task": 0, "node_name": "n1", **changes}
    return Allocation("7", "0", **values)


@pytest.mark.parametrize(
    ("changes", "machine", "allocation", "said"),
    [
        (
            {},
            Machine(4, (H100,)),
            None,
            "made for the CPU, this machine has NVIDIA H100 80GB HBM3; plan anew, or hide it",
        ),
        ({"nodes": 2}, CPU, None, "made for 2 nodes, this machine has 1; start it with sbatch, or srun --nodes=2"),
        ({}, CPU, step(nodes=2), "made for 1 node, Slurm step 7.0 has 2; start it with sbatch, or srun --nodes=1"),
        (
            {"devices": 4, "accelerator": "gpu"},
            Machine(4, (H100,)),
            None,
            "made for 4 GPUs on each node, this machine has 1",
        ),
        (
            {"accelerator": "gpu"},
            CPU,
            step(),
            "made for 1 GPU on each node, Slurm step 7.0 has no GPU; start it with srun",
        ),
        (
            {"accelerator": "gpu", "prediction": predicted(capacity=85 * GB)},
            Machine(4, (GPU("NVIDIA L40S", 46068 << 20, (8, 9)),)),
            None,
            "made for GPUs of 85 GB, this machine has NVIDIA L40S with 48 GB; plan for it anew",
        ),
        (
            {"devices": 3},
            CPU,
            step(tasks_per_node=2),
            "made for 3 ranks on each node, Slurm step 7.0 has 2 tasks there",
        ),
    ],
)
def test_a_plan_of_another_machine(
    written: Path, changes: dict[str, object], machine: Machine, allocation: Allocation | None, said: str
) -> None:
    plan = Plan.read(written).model_copy(update=changes)
    written.write_text(plan.model_dump_json())
    with pytest.raises(UsageError) as error:
        plan_for(load([*TINY, f"plan={written}"]), machine, allocation)
    assert said in str(error.value)


def test_files_that_are_no_plan(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, said in (
        ("{}", "no plan of this version"),
        ("steps: 4", "no plan of this version"),
        ("[]", "no plan of"),
    ):
        written.write_text(text)
        with pytest.raises(UsageError, match=said):
            plan_for(load([*TINY, f"plan={written}"]), CPU, None)
    with pytest.raises(
        UsageError, match=r"plan: expected a file that lm-train plan wrote; no such file: .*did you mean"
    ):
        load([*TINY, f"plan={tmp_path}/job.sbatch.plan.jsn"])
    plan = recipe_and_plan(CPU)[1]
    written.write_text(plan.model_dump_json())
    with pytest.raises(UsageError, match="does not say for which recipe it was made"):
        plan_for(load([*TINY, f"plan={written}"]), CPU, None)


# submitting


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return install(tmp_path / "bin", monkeypatch)


def job(*lines: str) -> str:
    return (
        "#!/bin/bash\n# a comment\n" + "".join(f"#SBATCH {line}\n" for line in lines) + "\nsrun x\n#SBATCH --nodes=99\n"
    )


def test_what_a_job_file_asks_for() -> None:
    text = job("--nodes=2 --ntasks-per-node=4", "-p gpu", "-A grp", "--gpus-per-node=h100:4", "--cpus-per-task=8",
               "--mem=64G", "--time=1-12:00:00", "--requeue")  # fmt: skip
    found = read_job(text, "x", {})
    assert (found.partition, found.account, found.qos, found.nodes, found.hours) == ("gpu", "grp", None, 2, 36.0)
    assert found.node == (32, 64 << 30, 4, "h100")
    assert read_job(text, "x", {"SBATCH_PARTITION": "cpu"}).partition == "cpu"
    assert read_job(job("--gres=gpu:2"), "x", {}).node.gpus == 2
    assert read_job(job("--gres=gpu:a100:2"), "x", {}).node[2:] == (2, "a100")
    assert read_job(job("--time=INFINITE"), "x", {}).hours is None


def test_what_lm_train_writes_is_what_it_checks() -> None:
    site = Site(partition="gpu", account="ai", gres="gpu:h100", max_hours=48.0)
    cluster: Cluster = cluster_named("h100x8_4nodes").model_copy(update={"site": site})
    recipe, plan = recipe_and_plan(CPU, nodes=2, devices=8, accelerator="gpu", prediction=predicted(60))
    found = read_job(sbatch.job_file([], recipe, plan, cluster), "x", {})
    assert (found.partition, found.nodes, found.node.gpus, found.node.gpu_type, found.hours) == (
        "gpu",
        2,
        8,
        "h100",
        48.0,
    )


REFUSED = """\
--partition=gpus | Slurm has no partition gpus; did you mean gpu? There are gpu, cpu, empty
--partition=gpu --time=3-00:00:00 | --time: 72.00 h asked, partition gpu allows 48.00 h; plan again with budget.hours=48
--partition=gpu --nodes=8 --gpus-per-node=4 | --nodes: 8 asked, partition gpu gives a job 4; plan again with cluster.nodes=4
--partition=gpu --account=bioo | --account=bioo: partition gpu does not take it; did you mean bio? It takes ai, bio
--partition=gpu --qos=fast | --qos=fast: partition gpu does not take it; it takes normal
--nodes=3 --gpus-per-node=h100:8 | 3 nodes with 8 GPUs (h100), 1 CPUs each asked, partition gpu has 2 with 8 GPUs (h100), 128 CPUs
--gpus-per-node=h100:16 | 1 node with 16 GPUs (h100), 1 CPUs each asked, partition gpu has 2 with 8 GPUs (h100)
--partition=cpu --mem=512G | 1 node with no GPU, 1 CPUs, 512.0 GiB each asked, partition cpu has 2 with no GPU, 64 CPUs
--partition=cpu --cpus-per-task=65 | 1 node with no GPU, 65 CPUs each asked, partition cpu has 2 with no GPU, 64 CPUs
--partition=cpu --gpus-per-node=1 | 1 node with 1 GPU, 1 CPUs each asked, partition cpu has 2 with no GPU
--partition=empty | partition empty takes no jobs now
--nodes=two | job.sbatch: --nodes=two: expected a whole number of at least 1
--mem=much | job.sbatch: --mem=much: expected a size such as 64G
--time=soon | job.sbatch: --time=soon: expected Slurm's notation, such as 1-02:30:00
--gpus-per-node=h100 | job.sbatch: --gpus-per-node=h100: expected a number of GPUs, such as 8 or h100:8
"""


@pytest.mark.parametrize("line", REFUSED.splitlines())
def test_a_job_that_slurm_would_refuse_or_never_start(
    line: str, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, said = line.split(" | ")
    Path("job.sbatch").write_text(job(asked))
    assert main(["submit", "job=job.sbatch"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert not (slurm / "submitted").exists()


def test_a_job_within_the_limits_is_submitted(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("job.sbatch").write_text(
        job("--partition=gpu --nodes=2 --gpus-per-node=h100:8 --cpus-per-task=64 --mem=200G --time=2-00:00:00")
    )
    assert main(["submit", "job.sbatch"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4711"
    assert (slurm / "submitted").read_text() == "--parsable job.sbatch\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "which job? Give lm-train submit job=PATH"),
        (("job=a.sbatch", "b.sbatch"), "which job?"),
        (("recipe=gpt_debug",), "recipe: lm-train submit takes job=PATH; with recipe=... it needs sbatch=PATH"),
    ],
)
def test_which_job(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError) as error:
        file_of(words)
    assert said in str(error.value)


def test_a_file_that_is_no_job(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("job.sbatch").write_text("echo hello\n")
    for word, said in (("job=job.sbatch", "no #SBATCH lines"), ("job=jb.sbatch", "did you mean job.sbatch?")):
        assert main(["submit", word]) == 2
        assert said in capsys.readouterr().err


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    Path("job.sbatch").write_text(job("--nodes=1"))
    assert main(["submit", "job=job.sbatch"]) == 2
    assert capsys.readouterr().err == "lm-train: no sinfo here: this is no machine of a Slurm cluster\n"


def test_a_refusal_of_sbatch_itself(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Invalid account' >&2; exit 1\n")
    Path("job.sbatch").write_text(job("--partition=gpu"))
    assert main(["submit", "job=job.sbatch"]) == 2
    assert "sbatch fails: sbatch: error: Invalid account" in capsys.readouterr().err
