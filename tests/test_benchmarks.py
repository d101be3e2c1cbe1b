"""What of the benchmarks can be held to account without what they need: lists, command lines, sums."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from lm_train.recipe import load

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    import gpu  # type: ignore[import-not-found]

    return gpu


@pytest.fixture(scope="module")
def report() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    import report  # type: ignore[import-not-found]

    return report


def test_errors(report: ModuleType) -> None:
    found = report.errors([(110.0, 100.0), (100.0, 100.0), (80.0, 100.0), (101.0, 100.0)])
    assert found["n"] == 4
    assert found["mean_absolute"] == pytest.approx(0.0775)
    assert found["mean"] == pytest.approx(-0.0225)
    assert found["median"] == pytest.approx(0.005)
    assert found["worst"] == pytest.approx(-0.2)
    assert found["p95"] == pytest.approx(0.2)
    assert report.errors([]) is None


def test_gpu_list_is_frozen(gpu: ModuleType) -> None:
    assert gpu.LIST_HASH == "3c6e33cdc6231d9d"
    names = [c.name for c in (*gpu.CONFIGURATIONS, *gpu.SEVERAL)]
    assert len(set(names)) == len(names)
    fitted = [c for c in gpu.CONFIGURATIONS if c.split == "calibration"]
    assert len(fitted) <= 5
    assert len({c.words[0] for c in fitted}) == 1  # of one model


@pytest.mark.parametrize("gpus", [1, 8])
def test_gpu_list_is_of_recipes(gpu: ModuleType, gpus: int) -> None:
    for configuration in gpu.configurations(gpus):
        recipe = load([*configuration.words, *gpu.PLAIN])
        assert recipe.trainer.max_steps > gpu.WARMUP
        assert recipe.trainer.devices == (gpus if "devices=8" in configuration.words[-1] else 1)
        assert recipe.data.path is None if hasattr(recipe.data, "path") else True  # nothing to download


def test_gpu_without_a_gpu(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "this_machine", lambda: SimpleNamespace(gpus=()))
    assert gpu.main([]) == 2
    assert "nothing is measured" in capsys.readouterr().err
    assert gpu.main(["--list", "--only", "llama"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 3
    assert told[-1] == f"list {gpu.LIST_HASH}"


def test_gpu_results(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From what a run leaves to what is published, with figures in the place of a GPU's."""
    gib = 2**30

    def run(words: tuple[str, ...], folder: Path, name: str, card_bytes: int | None = None) -> dict[str, object]:
        if card_bytes is not None:
            return {"exit_code": int(card_bytes < 9.5 * gib)}
        ranks = [
            {"phases": [{"cuda_allocated": 8 * gib, "cuda_reserved": 9 * gib, "cuda_beside": gib // 2}, {"VmRSS": 1}]}
        ]
        rows = [{"step": s, "perf/step_seconds": 0.1 if s > gpu.WARMUP else 9.0, "perf/mfu": 0.4} for s in range(1, 41)]
        said = {"allocated": 8.08 * gib, "used": 9.5 * gib, "high": 10 * gib, "seconds": 0.11, "mfu": 0.38}
        return {"exit_code": 0, "predicted": said} | gpu.measured(ranks, rows)

    written = {}
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "this_machine", lambda: SimpleNamespace(gpus=(SimpleNamespace(name="GPU"),)))
    monkeypatch.setattr(gpu, "write_results", lambda name, result, out: written.update(result))
    assert gpu.main(["--only", "llama_1b"]) == 0
    json.dumps(written)
    found = written["summary"]
    assert found["allocated"]["architectures"]["mean_absolute"] == pytest.approx(0.01)
    assert found["used"]["architectures"]["worst"] == pytest.approx(0)
    assert found["seconds"]["architectures"]["mean"] == pytest.approx(0.1)
    assert found["false_fits"] == []
    assert found["unused_by_caution"] == pytest.approx(0.05, abs=0.01)


def test_gpu_reads_a_plan(gpu: ModuleType, tmp_path: Path) -> None:
    memory = dict.fromkeys(("parameters", "gradients", "optimizer", "activations", "logits", "buffers", "reserve"), 100)
    step = dict.fromkeys(("compute", "communication", "optimizer", "data", "host"), 0.25)
    prediction = {"memory": memory | {"relative_error": [0.1, 0.1], "moment": "the update"}, "step": step, "mfu": None}
    folder = SimpleNamespace(plan=tmp_path / "plan.json")
    assert gpu.predicted(folder) is None
    folder.plan.write_text(json.dumps({"prediction": prediction}))
    said = gpu.predicted(folder)
    assert (said["allocated"], said["used"], said["high"], said["seconds"]) == (600, 700, 770, 1.25)


# ---- baselines


@pytest.fixture(scope="module")
def baselines() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    import baselines  # type: ignore[import-not-found]

    return baselines


@pytest.mark.slow
def test_baselines_of_a_row(baselines: ModuleType) -> None:
    """DeepSpeed's and accelerate's figures are multiples of the parameters, ours and torch's know the batch."""
    row = baselines.Row(
        "small zero2",
        "test",
        "model={kind: gpt, n_layer: 1, n_head: 2, n_embd: 64, block_size: 32, vocab_size: 320}",
        8,
        (),
        "zero2",
    )
    found = baselines.asked(row)
    n = 320 * 64 + 32 * 64 + 12 * 64 * 64 + 13 * 64 + 2 * 64
    assert found["deepspeed"]["says"] == 2 * n + int(18 * n / 2)
    assert found["accelerate"]["says"] in (None, 4 * 4 * n)  # None where it is not installed
    assert found["mem_tracker"]["says"] > 16 * n
    assert found["traced"]["says"] == pytest.approx(found["formulas"]["says"], rel=0.01)
    held = baselines.held_against(found, 2.0 * found["formulas"]["says"])
    assert held["formulas"]["relative_error"] == -0.5
    rows = baselines.summary([held, baselines.held_against(found, None)])
    assert rows["formulas"]["all"]["n"] == 1
    assert rows["deepspeed"]["one process"] is None
