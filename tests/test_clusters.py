"""What is known of clusters: the shipped facts and their sources, this machine, partitions, and files with faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm_train.clusters import (
    Cluster,
    check_here,
    cluster_named,
    device_named,
    device_of,
    find,
    peak_flops,
    shipped_clusters,
    shipped_devices,
)
from lm_train.clusters.devices import device_of_slurm
from lm_train.clusters.machine import cpu_device, host_memory
from lm_train.clusters.partitions import hours_of
from lm_train.errors import UsageError
from lm_train.hardware import GPU, Machine
from lm_train.recipe import ClusterSection, dump, load
from lm_train.slurm import Allocation
from tests.slurm_answers import install

LAPTOP = Machine(cpu_cores=4, gpus=())
H100 = GPU("NVIDIA H100 80GB HBM3", 81559 << 20, (9, 0))
EIGHT_H100 = Machine(cpu_cores=64, gpus=(H100,) * 8)
GB10 = GPU("NVIDIA GB10", 0, (12, 1))
STEP = Allocation("7", "0", nodes=2, tasks_per_node=1, node_rank=0, local_task=0, node_name="n1", cpus_on_node=8)


# the shipped facts


@pytest.mark.parametrize("name", shipped_clusters())
def test_every_shipped_cluster_loads_and_every_fact_has_its_source(name: str) -> None:
    cluster = cluster_named(name)
    assert cluster.name == name
    assert cluster.device.known
    assert not cluster.here
    facts = ["nodes", "devices_per_node", "intra_node", "cpu_cores_per_node", "host_memory_bytes", "disk_bandwidth"]
    facts += ["price_per_gpu_hour", "start_seconds"]
    facts += ["inter_node"] if cluster.nodes > 1 else []
    facts += [f"device.{key}" for key in cluster.device.model_dump(exclude={"name", "accelerator", "known", "warning"})]
    if cluster.device.accelerator == "cpu":
        facts.remove("device.compute_capability")
    facts.remove("device.sources")
    for fact in facts:
        source = cluster.source_of(fact)
        assert source, f"{name}: {fact} has no source"
        assert not source.startswith("lm_train/"), f"{name}: {fact} is given in {source} without a source"
    price = cluster.source_of("price_per_gpu_hour") or ""
    assert cluster.price_per_gpu_hour == 0 or ("to be overridden" in price and "read on 202" in price)


@pytest.mark.parametrize("name", shipped_devices())
def test_every_shipped_device_is_plausible_and_has_its_sources(name: str) -> None:
    device = device_named(name)
    given = set(device.model_dump(exclude={"name", "accelerator", "known", "warning", "sources"}, exclude_none=True))
    assert given == set(device.sources)
    assert set(device.peak_flops) == set(device.achievable)
    assert device.peak_flops["fp32"] <= device.peak_flops.get("tf32", 1e18) <= device.peak_flops.get("fp16", 1e18)
    if device.accelerator == "gpu":
        assert set(device.peak_flops) == {"fp32", "tf32", "bf16", "fp16"}
        assert 20e9 < device.memory_bytes < 200e9
        # memory in powers of two, as cards are named by their GiB, less what the driver keeps
        nominal = float(device.name.split()[-2]) if device.name.endswith("GB") else 24.0
        assert 0.92 < device.memory_bytes / nominal / 2**30 <= 1.001


def test_the_shipped_names() -> None:
    wanted = {"cpu_laptop", "rtx4090", "a100_40", "a100_80", "l40s", "h100", "h200", "b200"}
    assert wanted | {"h100x4", "h100x8", "a100_80x8", "h100x8_4nodes"} == set(shipped_clusters())
    for name in wanted:
        assert cluster_named(name).devices == 1
    assert cluster_named("h100x8_4nodes").devices == 32


def test_a_cluster_says_only_what_differs_from_its_base() -> None:
    one, eight, four_nodes = map(cluster_named, ("h100", "h100x8", "h100x8_4nodes"))
    assert eight.intra_node == one.intra_node
    assert eight.device.peak_flops == one.device.peak_flops
    assert eight.device.power_watts > one.device.power_watts == 700
    assert "DGX H100" in (eight.source_of("device.power_watts") or "")
    assert four_nodes.device == eight.device
    assert four_nodes.inter_node is not None
    assert four_nodes.inter_node.bandwidth < 400e9 / 8
    # another GPU brings its own facts and sources, none of its predecessor's
    assert cluster_named("h200").device == device_named("h200")


# GPUs by their names

NAMES = """\
NVIDIA B200 | 183359 | b200 | 2250e12
NVIDIA H200 | 143771 | h200 | 989.4e12
NVIDIA H100 80GB HBM3 | 81559 | h100 | 989.4e12
NVIDIA H100 PCIe | 81559 | h100_pcie | 756e12
NVIDIA H100 NVL | 95830 | h100_nvl | 835.5e12
NVIDIA A100-SXM4-80GB | 81920 | a100_80 | 312e12
NVIDIA A100-SXM4-40GB | 40960 | a100_40 | 312e12
NVIDIA A100 80GB PCIe | 81920 | a100_80_pcie | 312e12
NVIDIA A100-PCIE-40GB | 40960 | a100_40_pcie | 312e12
NVIDIA L40S | 46068 | l40s | 362.05e12
NVIDIA GeForce RTX 4090 | 24564 | rtx4090 | 165.2e12
"""


@pytest.mark.parametrize("line", NAMES.splitlines())
def test_a_gpu_of_nvidia_smi_has_the_facts_of_its_shipped_device(line: str) -> None:
    name, mebibytes, shipped, peak = line.split(" | ")
    gpu = GPU(name, int(mebibytes) << 20, (8, 0))
    assert device_of(gpu) == device_named(shipped)
    assert peak_flops(gpu) == float(peak)
    assert device_of(gpu).memory_bytes < gpu.memory_bytes


def test_every_shipped_gpu_has_a_name() -> None:
    assert {line.split(" | ")[2] for line in NAMES.splitlines()} | {"cpu_laptop"} == set(shipped_devices())


@pytest.mark.parametrize(
    "name", ["NVIDIA GB10", "NVIDIA H200 NVL", "NVIDIA GeForce RTX 4090 D", "Tesla V100-SXM2-16GB"]
)
def test_an_unknown_gpu_has_low_figures_and_says_so(name: str) -> None:
    device = device_of(GPU(name, 16384 << 20, (7, 0) if "V100" in name else (9, 0)))
    assert not device.known
    assert device.warning.startswith(f"unknown GPU {name}: counting with 16 GiB, 60 TFLOP/s")
    assert "lm-train calibrate" in device.warning
    assert device.memory_bytes < 16384 << 20
    assert ("bf16" in device.peak_flops) == ("V100" not in name)
    assert peak_flops(GPU(name, 0, (9, 0))) is None


def test_a_smaller_card_of_a_known_name_keeps_its_memory() -> None:
    assert device_of(GPU("NVIDIA H100 64GB HBM2", 65536 << 20, (9, 0))).memory_bytes == int((65536 << 20) * 0.98)


@pytest.mark.parametrize(
    ("gres", "device"),
    [
        ("h100", "h100"),
        ("nvidia_h100_80gb_hbm3", "h100"),
        ("a100", "a100_40"),
        ("A100_80GB", "a100_80"),
        ("l40s", "l40s"),
    ],
)
def test_slurms_names_of_a_gpu(gres: str, device: str) -> None:
    assert device_of_slurm(gres) == device_named(device)


@pytest.mark.parametrize("gres", ["", "v100"])
def test_a_gpu_that_slurm_does_not_name(gres: str) -> None:
    assert not device_of_slurm(gres).known
    assert 0 < device_of_slurm(gres).memory_bytes <= 16e9


# this machine


def test_auto_is_this_machine() -> None:
    cluster = find(ClusterSection(), LAPTOP, None)
    assert (cluster.name, cluster.here, cluster.nodes, cluster.devices_per_node) == ("this machine", True, 1, 1)
    assert cluster.device.accelerator == "cpu"
    assert cluster.price_per_gpu_hour is None
    assert cluster.device.memory_bytes == cluster.host_memory_bytes == host_memory() > 0
    eight = find(ClusterSection(price_per_gpu_hour=2.5, currency="EUR", account="grp"), EIGHT_H100, None)
    assert (eight.devices_per_node, eight.device) == (8, device_named("h100"))
    assert eight.intra_node == cluster_named("h100").intra_node
    assert (eight.price_per_gpu_hour, eight.currency, eight.site.account) == (2.5, "EUR", "grp")


def test_processes_share_the_cpu() -> None:
    whole = find(ClusterSection(), LAPTOP, None)
    shared = find(ClusterSection(devices_per_node=4), LAPTOP, None)
    assert shared.devices_per_node == 4
    assert shared.device.memory_bytes == whole.device.memory_bytes // 4
    assert shared.device.peak_flops["fp32"] * 4 == whole.device.peak_flops["fp32"]
    assert shared.divided(1).device.memory_bandwidth == whole.device.memory_bandwidth


def test_auto_is_the_slurm_step() -> None:
    cluster = find(ClusterSection(), LAPTOP, STEP, for_planning=True)
    assert (cluster.nodes, cluster.cpu_cores_per_node, cluster.here) == (2, 8, True)
    assert cluster.inter_node is not None
    tasks = Allocation(
        "7", "0", nodes=2, tasks_per_node=4, node_rank=0, local_task=0, node_name="n1", gpus_on_node=4, binds_gpus=True
    )
    assert find(ClusterSection(), Machine(8, (H100,)), tasks).devices_per_node == 4
    assert find(ClusterSection(), LAPTOP, tasks).devices_per_node == 4


def test_the_section_wins_over_the_description() -> None:
    section = ClusterSection(name="h100x8_4nodes", nodes=2, devices_per_node=4, price_per_gpu_hour=2.0, partition="gpu")
    cluster = find(section, LAPTOP, None)
    assert (cluster.nodes, cluster.devices_per_node, cluster.price_per_gpu_hour) == (2, 4, 2.0)
    assert cluster.site.partition == "gpu"
    assert cluster.source_of("price_per_gpu_hour") == "the recipe"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"name": "h100x9"}, "cluster: h100x9: no such cluster; did you mean h100x8? There are auto, a100_40"),
        ({"name": "zebra"}, "no such cluster; there are auto, a100_40"),
        ({"name": "./no.yaml"}, "cluster: ./no.yaml: no such file"),
        ({"name": "clusters/h100x8.yaml"}, "no such file; did you mean h100x8?"),
        ({"name": "h100x8", "nodes": 4}, "4 asked, h100x8 has 1; try 1, or a YAML file with base: h100x8, nodes: 4"),
        ({"name": "h100x8", "devices_per_node": 16}, "16 asked, a node of h100x8 has 8 GPUs; try 8"),
        ({"devices_per_node": 64}, "64 asked, a node of this machine has 4 CPU cores; try 4"),
        ({"name": "h100", "currency": "EUR"}, "has its price in USD; give cluster.price_per_gpu_hour as well"),
    ],
)
def test_what_no_cluster_has(section: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as error:
        find(ClusterSection(**section), LAPTOP, None)
    assert len(error.value.problems) == 1
    assert said in str(error.value)


def test_training_needs_the_described_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = ClusterSection(name="h100x8")
    cluster = find(section, LAPTOP, None)
    with pytest.raises(UsageError) as error:
        check_here(cluster, section, LAPTOP)
    assert str(error.value) == (
        "cluster: h100x8 has NVIDIA H100 SXM 80 GB, this machine has no GPU, 4 CPU cores; train with cluster=auto, or plan "
        "for another machine with lm-train plan cluster=h100x8 sbatch=JOBFILE"
    )
    with pytest.raises(UsageError, match="this machine has 1 x NVIDIA L40S"):
        check_here(cluster, section, Machine(8, (GPU("NVIDIA L40S", 46068 << 20, (8, 9)),)))
    two = check_here(cluster, section, Machine(8, (H100, H100)))
    assert (two.here, two.devices_per_node, two.price_per_gpu_hour) == (True, 2, 3.99)
    monkeypatch.chdir(tmp_path)
    own = "base: cpu_laptop\nprice_per_gpu_hour: 0.1\ndevice: {name: mine, peak_flops: {fp32: 1e11, bf16: 1e11}}\n"
    Path("mine.yaml").write_text(own)
    section = ClusterSection(name="./mine.yaml")
    mine = check_here(find(section, LAPTOP, None), section, LAPTOP)
    assert (mine.here, mine.price_per_gpu_hour, mine.device.peak_flops["fp32"]) == (True, 0.1, 1e11)
    assert mine.host_memory_bytes == host_memory()
    assert check_here(mine, section, LAPTOP) is mine


def test_a_described_gpu_that_is_not_shipped_is_known_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "spark.yaml"
    file.write_text(
        "base: h100\ndevice: {base: h100, name: GB10, memory_bytes: 120000000000, power_watts: 140}\nprice_per_gpu_hour: 0\n"
    )
    section = ClusterSection(name=str(file))
    found = check_here(find(section, LAPTOP, None), section, Machine(20, (GPU("NVIDIA GB10", 122880 << 20, (12, 1)),)))
    assert (found.device.name, found.devices_per_node, found.here) == ("GB10", 1, True)


def test_memory_limits_of_control_groups(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:       16000000 kB\nMemFree: 1 kB\n")
    (proc / "self" / "cgroup").write_text("4:memory:/job_7/step_0\n3:cpuset:/\n0::/system/slurm\n")
    assert host_memory(proc, groups) == 16_000_000 << 10
    (groups / "memory" / "job_7" / "step_0").mkdir(parents=True)
    (groups / "memory" / "job_7" / "step_0" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (groups / "memory" / "job_7" / "memory.limit_in_bytes").write_text("8000000000\n")
    assert host_memory(proc, groups) == 8_000_000_000
    (groups / "system" / "slurm").mkdir(parents=True)
    (groups / "system" / "slurm" / "memory.max").write_text("max\n")
    (groups / "system" / "memory.max").write_text("4000000000\n")
    assert host_memory(proc, groups) == 4_000_000_000
    assert host_memory(tmp_path / "none", groups) == 0


def test_a_cpus_rates_follow_its_instruction_sets() -> None:
    plain, wide = (cpu_device(2, 0, frozenset(flags.split()), 2000.0) for flags in ("sse2", "avx2 avx512f avx512_bf16"))
    assert wide.peak_flops["fp32"] == 4 * plain.peak_flops["fp32"] == 2 * 2000e6 * 32
    assert wide.peak_flops["bf16"] == 2 * wide.peak_flops["fp32"]
    assert plain.peak_flops["bf16"] < plain.peak_flops["fp32"]


# files with faults: the text of the file | what is said, with the line

FAULTS = r"""
base: h100x9\n | base: h100x9: no such cluster; did you mean h100x8? There are auto, a100_40,
base: h100x8\ndevice: h10\n | device: h10: no such device; did you mean h100? There are a100_40,
base: h100x8\ndevice:\n  base: h20O\n | device.base: h20O: no such device; did you mean h200?
base: h100x8\nprise: 3\n | prise: no such fact; did you mean price_per_gpu_hour? (my.yaml:2)
base: h100x8\ngpus_per_node: 4\n | gpus_per_node: no such fact; did you mean devices_per_node? (my.yaml:2)
base: h100x8\nmemory_byte: 4\n | memory_byte: no such fact; did you mean
base: h100x8\npartition: gpu\n | partition: no such fact; did you mean site.partition? (my.yaml:2)
base: h100x8\nsite:\n  partion: gpu\n | site.partion: no such fact; did you mean site.partition? (my.yaml:3)
base: h100x8\nhere: true\n | here: no such fact; there are name, device,
base: h100x8\n\nprice_per_gpu_hour: -3\n | price_per_gpu_hour: expected a number of at least 0 or null; got -3 (my.yaml:3)
base: h100x8\nprice_per_gpu_hour: cheap\n | expected a number of at least 0 or null; got 'cheap' (my.yaml:2)
base: h100x8\ncurrency: dollars\n | currency: expected an ISO 4217 code such as USD; got 'dollars' (my.yaml:2)
base: h100x8\nnodes: 0\n | nodes: expected an integer of at least 1; got 0 (my.yaml:2)
base: h100x8\nnodes: many\n | nodes: expected an integer of at least 1; got 'many' (my.yaml:2)
base: h100x8\nnodes: 2\nnodes: 3\n | my.yaml:3: duplicate key 'nodes', first on line 2; keep one
base: h100x8\ndevice: {memory_bytes: 80e9}\n | got 80e9; did you mean 80000000000? (my.yaml:2)
base: h100x8\ndevice:\n  peak_flops: {bf17: 1e12}\n | no such type of numbers; did you mean bf16? (my.yaml:3)
base: h100x8\ndevice: {achievable: {bf16: 1.5}}\n | expected a number above 0 and at most 1; got 1.5 (my.yaml:2)
base: h100x8\ndevice: {peak_flops: 3}\n | device.peak_flops: expected keys and values; got 3 (my.yaml:2)
base: h100x8\ndevice: {known: true}\n | device.known: no such fact; there are name,
base: h100x8\ndevice: [h100]\n | device: expected the name of a GPU (a100_40,
base: h100x8\nsite: gpu\n | site: expected keys and values; got 'gpu' (my.yaml:2)
base: h100x8\nsite: {modules: cuda}\n | site.modules: expected a list such as [a, b]; got 'cuda'; did you mean [cuda]? (my.yaml:2)
base: h100x8\nsite: {max_hours: -1}\n | site.max_hours: expected a number above 0 or null; got -1 (my.yaml:2)
base: h100x8\ninter_node: {name: x, bandwidth: 1e9}\n | inter_node: latency_seconds missing; give it (my.yaml:2)
base: my.yaml\n | base: my.yaml leads back to itself: my.yaml -> my.yaml (my.yaml:1)
base: 4\n | base: expected the name or the path of a cluster; got 4 (my.yaml:1)
device: h100\nnodes: 2\n | ./my.yaml: devices_per_node, intra_node, cpu_cores_per_node, host_memory_bytes, disk_bandwidth missing
base: h100\ndevice: {name: GB10, memory: 1}\n | device.memory: no such fact; did you mean device.memory_bytes? (my.yaml:2)
- a\n | my.yaml:1: expected facts such as device: and nodes:; got ['a']
"""


@pytest.mark.parametrize("line", FAULTS.strip().splitlines())
def test_faults_of_a_file_are_one_line_each(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, _, said = line.partition(" | ")
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(text.replace(r"\n", "\n"))
    with pytest.raises(UsageError) as error:
        cluster_named("./my.yaml")
    (problem,) = error.value.problems
    assert said in problem
    assert "\n" not in problem


def test_all_faults_of_a_file_at_once(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("base: h100x8\nnodes: 0\nprise: 3\ndevice: {power_watts: -1}\n")
    with pytest.raises(UsageError) as error:
        cluster_named(str(file))
    assert len(error.value.problems) == 3


def test_a_file_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_text(
        "base: h100x8\nprice_per_gpu_hour: 1.2\ncurrency: EUR\n"
        "site: {partition: gpu, account: 1234, modules: [cuda/12.8], container: apptainer exec --nv image.sif}\n"
    )
    file = tmp_path / "more.yaml"
    file.write_text(
        "base: ours.yaml\nname: big\nnodes: 2\ninter_node: {name: Ethernet, bandwidth: 3e9, latency_seconds: 5e-5}\n"
    )
    cluster = cluster_named(str(file))
    assert (cluster.name, cluster.nodes, cluster.devices) == ("big", 2, 16)
    assert (cluster.price_per_gpu_hour, cluster.currency) == (1.2, "EUR")
    assert cluster.site.account == "1234"
    assert cluster.site.modules == ("cuda/12.8",)
    assert (cluster.source_of("price_per_gpu_hour") or "").endswith("ours.yaml:2")
    assert (cluster.source_of("nodes") or "").endswith("more.yaml:3")
    assert cluster_named("h100x8").price_per_gpu_hour == 3.99, "a shipped description is never changed"


def test_a_recipe_names_its_cluster(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: gpt_debug\ncluster: h100x8\n")
    assert load([f"recipe={file}"]).cluster.name == "h100x8"
    assert load([f"recipe={file}", "cluster=a100_40"]).cluster.name == "a100_40"
    assert load([f"recipe={file}", "cluster.nodes=2"]).cluster == ClusterSection(name="h100x8", nodes=2)
    again = tmp_path / "again.yaml"
    again.write_text(dump(load([f"recipe={file}"])))
    assert load([f"recipe={again}"]).cluster.name == "h100x8"
    file.write_text("base: gpt_debug\ncluster: {name: h100x8, nods: 2}\n")
    with pytest.raises(UsageError, match=r"did you mean cluster\.nodes\?.*mine\.yaml:2"):
        load([f"recipe={file}"])


# partitions, from answers like real ones


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return install(tmp_path / "bin", monkeypatch)


def planned(**section: object) -> Cluster:
    return find(ClusterSection(**section), LAPTOP, None, for_planning=True)


def test_auto_on_a_login_node_is_the_default_partition(slurm: Path) -> None:
    cluster = planned()
    assert (cluster.name, cluster.nodes, cluster.devices_per_node) == ("partition gpu", 2, 8)
    assert cluster.device == device_named("h100")
    assert not cluster.here
    assert (cluster.cpu_cores_per_node, cluster.host_memory_bytes) == (128, 1_000_000 << 20)
    assert (cluster.site.partition, cluster.site.gres) == ("gpu", "gpu:h100")
    assert (cluster.site.max_hours, cluster.site.max_nodes) == (48.0, 4)
    assert find(ClusterSection(), LAPTOP, None).here, "training on this very machine"


def test_a_partition_by_name(slurm: Path) -> None:
    cluster = planned(partition="cpu", nodes=1, devices_per_node=2)
    assert (cluster.nodes, cluster.device.accelerator, cluster.devices_per_node) == (1, "cpu", 2)
    assert cluster.device.memory_bytes == (256_000 << 20) // 2
    assert cluster.site.max_hours is None


def test_the_shell_of_salloc_plans_for_its_job(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_PARTITION", "cpu")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    assert (planned().name, planned().nodes) == ("partition cpu", 1)
    assert planned(partition="gpu").nodes == 2


def test_a_description_has_the_limits_of_its_partition_here(slurm: Path) -> None:
    site = planned(name="h100x8", partition="gpu").site
    assert (site.partition, site.max_hours, site.max_nodes) == ("gpu", 48.0, 4)
    assert site.gres == "gpu:h100"
    cluster = planned(name="h100x8", partition="gpu")
    assert (cluster.cpu_cores_per_node, cluster.host_memory_bytes) == (128, 1_000_000 << 20)
    assert planned(name="h100x8", partition="elsewhere").site.max_hours is None
    assert find(ClusterSection(name="h100x8", partition="gpu"), LAPTOP, None).site.max_hours is None


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"partition": "gpus"}, "Slurm has no partition gpus; did you mean gpu? There are gpu, cpu, empty"),
        ({"partition": "zzz"}, "Slurm has no partition zzz; there are gpu, cpu, empty"),
        ({"partition": "empty"}, "partition empty has no node that takes jobs now"),
        (
            {"name": "a100_80x8", "partition": "gpu"},
            "nodes of gpu have 8 x h100 or 4 x a100, a100_80x8 is 8 x NVIDIA A100 SXM 80 GB; plan with cluster=auto "
            "cluster.partition=gpu, or",
        ),
        ({"nodes": 3}, "cluster.nodes: 3 asked, partition gpu has 2; try 2"),
    ],
)
def test_what_the_partitions_do_not_have(slurm: Path, section: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as error:
        planned(**section)
    assert said in str(error.value)


def test_a_controller_that_does_not_answer(slurm: Path) -> None:
    (slurm / "sinfo").write_text(
        "#!/bin/sh\necho 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1\n"
    )
    assert planned().here, "the commands alone are no cluster"
    with pytest.raises(UsageError, match="sinfo fails: slurm_load_partitions: Unable to contact"):
        planned(partition="gpu")


def test_a_partition_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match=r"cluster\.partition=gpu: no Slurm answers here; plan on a login node"):
        planned(partition="gpu")
    assert planned().here


@pytest.mark.parametrize(
    ("text", "hours"),
    [("UNLIMITED", None), ("2-00:00:00", 48), ("1-12", 36), ("01:30:00", 1.5), ("30:00", 0.5), ("90", 1.5)],
)
def test_slurms_times(text: str, hours: float | None) -> None:
    assert hours_of(text) == hours
