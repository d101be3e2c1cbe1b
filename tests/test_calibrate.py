"""Calibrations: what lies between measured sizes, files and how they are found again, and a real one in seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lm_train.cli import main
from lm_train.clusters import Cluster, cluster_named, find
from lm_train.errors import UsageError
from lm_train.hardware import Machine, this_machine
from lm_train.plan import Layout
from lm_train.plan.counts import parameter_shapes
from lm_train.plan.duration import time_of
from lm_train.plan.facts import DataFacts
from lm_train.plan.rates import Calibration, find_calibration, from_calibration, rates_of
from lm_train.plan.rates.calibration import Disk, Pass, Setting, Sum, Training, file_name, processor, torch_version
from lm_train.plan.rates.measured import OVERHEAD
from lm_train.plan.rates.tables import Curve, Point, Surface, Tables
from lm_train.plan.work import Op, work_of
from lm_train.recipe import ClusterSection, load

CPU = Machine(cpu_cores=2, gpus=())


def layout(**changes: object) -> Layout:
    given = {
        "nodes": 1,
        "devices": 1,
        "strategy": "single",
        "precision": "32-true",
        "micro_batch_size": 4,
        "accumulate_grad_batches": 1,
        "activation_checkpointing": "none",
        "cross_entropy_chunks": 1,
        "num_workers": 0,
        "compile": False,
        "threads_per_rank": 2,
        "accelerator": "cpu",
    }
    return Layout(**(given | changes))  # type: ignore[arg-type]


def here() -> Cluster:
    return find(ClusterSection(), CPU, None)


def product(rows: int, columns: int, inner: int, rate: float = 100e9, fixed: float = 2e-6) -> Point:
    flops = 2.0 * rows * columns * inner
    return Point(
        variant="",
        kind="matmul",
        backward=False,
        number="fp32",
        shape=(rows, columns, inner),
        bytes=0,
        seconds=fixed + flops / rate,
    )


def plain(kind: str, variant: str, size: float, seconds: float, backward: bool = False) -> Point:
    return Point.model_validate(
        {
            "variant": variant,
            "kind": kind,
            "backward": backward,
            "number": "fp32",
            "shape": (1,),
            "bytes": size,
            "seconds": seconds,
        }
    )


def made(**changes: object) -> Calibration:
    products = [product(m, n, k) for m in (64, 512) for n in (64, 256) for k in (64, 256)]
    passes = [plain("elementwise", "", size, 1e-6 + size / 20e9) for size in (1e3, 1e6, 1e9)]
    one = Setting(
        ranks=1,
        threads=2,
        points=(*products, *passes),
        forward_overhead=3e-6,
        backward_overhead=6e-6,
        passes=(Pass(name="adamw", elements=64, seconds=2e-5), Pass(name="adamw", elements=2**20, seconds=2e-3)),
        noise=0.01,
    )
    two = one.model_copy(
        update={
            "ranks": 2,
            "threads": 1,
            "collectives": (
                Sum(kind="all_reduce", bytes=1e3, seconds=1e-4),
                Sum(kind="all_reduce", bytes=1e8, seconds=0.1),
            ),
        }
    )
    cluster = here()
    found = Calibration(
        device=cluster.device.name,
        processor=processor(),
        cores=2,
        torch=torch_version(),
        versions={},
        date="2026-01-01",
        quick=False,
        noise=0.01,
        settings=(one, two),
        training=Training(step=1e-3, micro_batch=5e-4, row=2e-3, strategies={"ddp": (1e-3, 0.0)}, start_seconds=10),
        disk=Disk(save_seconds=0.01, bandwidth=5e8),
    )
    return found.model_copy(update=changes)


def test_a_curve_meets_its_points_and_lies_between() -> None:
    curve = Curve([(1e3, 1e-6), (1e6, 1e-3), (1e9, 2.0)])
    assert curve(1e6) == pytest.approx(1e-3)
    assert curve(1e4) == pytest.approx(1e-5)  # a straight line of logarithms
    assert curve(1) == pytest.approx(1e-6)  # never cheaper than the smallest
    assert curve(2e9) == pytest.approx(4.0)  # in proportion above the largest
    sizes = [10**n for n in range(1, 11)]
    assert [curve(n) for n in sizes] == sorted(curve(n) for n in sizes)


def test_a_surface_of_one_rate_gives_it_everywhere() -> None:
    points = [((m, n), 1e3 * m * n, 1, 1e-6 + 1e3 * m * n / 1e9) for m in (4, 64) for n in (4, 64)]
    surface = Surface(points, 1e-6)
    assert surface((16, 16), 1e3 * 256) == pytest.approx(1e-6 + 1e3 * 256 / 1e9, rel=0.02)
    assert surface((1000, 1000), 1e9) == pytest.approx(1.0, rel=0.02)


def test_steps_that_wait_for_one_another_cost_each() -> None:
    """A tenth of a millisecond a step, whatever is computed in it, and 1 ns a unit of work."""

    def seconds(shape: tuple[int, ...]) -> float:
        batch, steps, width, state = shape
        return 1e-4 * steps + 1e-9 * batch * steps * state * (width + state)

    def layer(shape: tuple[int, ...]) -> Point:
        return Point(
            variant="lstm",
            kind="recurrent",
            backward=False,
            number="fp32",
            shape=shape,
            bytes=1e6,
            seconds=seconds(shape),
        )

    tables = Tables(map(layer, ((2, 32, 8, 8), (16, 32, 64, 64), (64, 8, 512, 512))))
    wanted = (40, 256, 384, 512)
    op = Op("cells.lstm", "recurrent", False, 0.0, 0.0, wanted, "fp32", 1)
    assert tables.seconds(op) == pytest.approx(seconds(wanted), rel=0.25)


def test_a_variant_is_found_by_the_tapes_name() -> None:
    tables = Tables(
        [
            plain("activation", "gelu", 1e6, 1e-3),
            plain("activation", "relu", 1e6, 1e-4),
            plain("elementwise", "", 1e6, 5e-5),
        ]
    )

    def seconds(name: str, kind: str = "activation", backward: bool = False) -> float | None:
        return tables.seconds(Op(name, kind, backward, 0, 1e6, (1,), "fp32"))  # type: ignore[arg-type]

    assert seconds("mlp.relu") == pytest.approx(1e-4)
    assert seconds("mlp.gelu") == seconds("mlp.unknown") == pytest.approx(1e-3)
    assert seconds("mlp.gelu", backward=True) == pytest.approx(1e-3)  # of the other direction, where its own is missing
    assert seconds("norm", "normalisation") == pytest.approx(5e-5)
    assert Tables([]).seconds(Op("x", "matmul", False, 1, 1, (1, 1, 1), "fp32")) is None


def test_a_file_says_again_what_was_measured(tmp_path: Path) -> None:
    found = made()
    file = tmp_path / "calibration.json"
    file.write_text(found.model_dump_json())
    assert Calibration.read(file) == found


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        Calibration.read(tmp_path / "none.json")
    file = tmp_path / "other.json"
    file.write_text("{}")
    with pytest.raises(UsageError, match="no calibration of this version"):
        Calibration.read(file)
    file.write_text(made().model_dump_json())
    with pytest.raises(UsageError, match="was measured on 2 CPU cores"):
        from_calibration(file, cluster_named("h100"), layout(accelerator="gpu"))


def test_this_machines_calibration_is_found_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cluster = here()
    assert find_calibration(cluster) is None
    assert "data sheets" in rates_of(cluster, layout()).source or "guesses" in rates_of(cluster, layout()).source
    folder = tmp_path / "lm_train" / "calibrations"
    folder.mkdir(parents=True)
    file = folder / file_name(cluster.device.name, 2, torch_version(), processor())
    file.write_text(made().model_dump_json())
    assert find_calibration(cluster) == file
    assert "calibration" in rates_of(cluster, layout()).source
    assert find_calibration(cluster.model_copy(update={"here": False})) is None
    assert find_calibration(cluster.model_copy(update={"cpu_cores_per_node": 4})) is None


def test_measured_rates_say_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(made().model_dump_json())
    rates = from_calibration(file, here(), layout())
    op = Op("x", "matmul", False, 0, 0, (128, 128, 128), "fp32")
    alone, overhead = 2e-6 + 2 * 128**3 / 100e9, 3e-6
    assert rates.device(op) == pytest.approx(alone + overhead * OVERHEAD, rel=0.1)
    adamw = load(["recipe=gpt_debug", "optim={kind: adamw}"]).optim
    assert rates.update(adamw, ((64, 10),), 4) == pytest.approx(2e-4)
    assert rates.written(5e8) == pytest.approx(1.01)
    two = from_calibration(file, here(), layout(devices=2, threads_per_rank=1, strategy="ddp"))
    assert two.collective("all_reduce", 1e8) == pytest.approx(0.1)
    assert two.strategy("ddp").step == 1e-3
    # a setting that was not measured: as many times slower, and less certain
    other = from_calibration(file, here(), layout(threads_per_rank=1))
    assert other.device(op) > 1.5 * rates.device(op)
    assert other.relative_error > rates.relative_error


def test_a_quick_and_a_noisy_calibration_promise_less(tmp_path: Path) -> None:
    errors = []
    for number, changes in enumerate(({}, {"quick": True}, {"settings": _noisy()})):
        file = tmp_path / f"{number}.json"
        file.write_text(made(**changes).model_dump_json())
        errors.append(from_calibration(file, here(), layout()).relative_error)
    assert errors[0] < errors[1]
    assert errors[0] < errors[2]


def _noisy() -> tuple[Setting, ...]:
    return tuple(setting.model_copy(update={"noise": 0.3}) for setting in made().settings)


@pytest.mark.parametrize("word", ["quick=yes", "quick", "out=", "recipe=gpt_debug", "out=/tmp"])
def test_wrong_words(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", word]) == 2
    assert "out=" in capsys.readouterr().err


def test_a_quick_calibration_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it measures is in the order of what any CPU does, and a plan can be made by it at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = subprocess.run(
        [sys.executable, "-m", "lm_train", "calibrate", "quick=true"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    file = Path(done.stdout.splitlines()[-1])
    cluster = find(ClusterSection(), this_machine(), None)
    assert file == find_calibration(cluster)
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing is left of the measuring
    found = Calibration.read(file)
    assert found.quick
    assert {point.kind for point in found.settings[0].points} >= {
        "matmul",
        "attention",
        "convolution",
        "recurrent",
        "normalisation",
        "activation",
        "elementwise",
        "reduction",
        "lookup",
        "loss",
        "copy",
    }
    recipe = load(["recipe=gpt_debug", "model.vocab_size=2048"])
    facts = DataFacts(vocab_size=2048)
    where = layout(threads_per_rank=cluster.cpu_cores_per_node)
    shapes, work = parameter_shapes(recipe.model, "causal_lm", facts), work_of(recipe.model, "causal_lm", facts, where)
    assert shapes is not None
    assert work is not None
    seconds = time_of(shapes, work, where, recipe.optim, rates_of(cluster, where), log_every=10)
    assert "calibration" in seconds.source
    assert 2e10 < work.flops / seconds.compute < 1e13
