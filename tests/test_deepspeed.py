"""Whole runs under DeepSpeed, from the command line, on a machine without a compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lm_train.runs import RunFolder, read_jsonl
from lm_train.strategy.zero import LOSS_SCALE, _Precision
from tests.conftest import TINY


@pytest.mark.parametrize("strategy", [pytest.param("zero1", marks=pytest.mark.slow), "zero3"])
def test_a_whole_run_without_a_compiler(tmp_path: Path, text_file: Path, strategy: str) -> None:
    words = dict(word.split("=", 1) for word in TINY) | {
        "data.path": str(text_file),
        "name": "run",
        "trainer.devices": "2",
        "trainer.strategy": strategy,
        "trainer.max_steps": "6",
        "trainer.val_check_interval": "3",
        "trainer.sample_tokens": "20",
        "tracking.wandb": "offline",
    }
    nothing = tmp_path / "bin"
    nothing.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "lm_train", "train", *(f"{key}={value}" for key, value in words.items())],
        cwd=tmp_path,
        env=os.environ | {"PATH": str(nothing), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert not (tmp_path / "extensions").exists(), "something was compiled"
    assert done.stdout.splitlines()[0] == "--- sample ---"
    run = RunFolder(tmp_path / "runs" / "run")
    rows = list(read_jsonl(run.metrics))
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 7))
    assert [row["step"] for row in rows if "val/loss" in row] == [3, 6]
    assert all(row["train/grad_norm"] > 0 for row in rows if "train/loss" in row)
    assert len(list(run.wandb.glob("offline-run-*/run-*.wandb"))) == 1
    assert {file.name for file in (run.checkpoints / "step-6").iterdir()} == {
        "manifest.json", "state.json", "shard-0.safetensors", "shard-1.safetensors"
    }  # fmt: skip


def test_the_loss_scale_of_fp16_comes_back() -> None:
    """DeepSpeed's own scaler; it cannot train in fp16 on most CPUs."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler  # slow to import

    settings = {"scale_window": 3, "min_scale": 1, "delayed_shift": 1, "consecutive_hysteresis": False}
    scalers = [DynamicLossScaler(2.0**16, **settings) for _ in range(2)]
    plugins = [_Precision("16-mixed"), _Precision("16-mixed")]
    assert plugins[0].state_dict() == {}
    for plugin, scaler in zip(plugins, scalers, strict=True):
        plugin.scaler = scaler
    for _ in range(5):  # an overflow would need DeepSpeed's process group
        scalers[0].update_scale(False)
    assert scalers[0].cur_scale != scalers[1].cur_scale
    plugins[1].load_state_dict(json.loads(json.dumps(plugins[0].state_dict())))
    for _ in range(5):
        for scaler in scalers:
            scaler.update_scale(False)
        assert [getattr(scalers[1], key) for key in LOSS_SCALE] == [getattr(scalers[0], key) for key in LOSS_SCALE]
