"""What a run does about updates that are withheld, and about replicas that differ; with real processes where it starts anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lm_train import anomalies, data, ledger
from lm_train.anomalies import RollBackRow
from lm_train.errors import ExitCode, NoProgressError, RollBack
from lm_train.plan import Plan
from lm_train.recipe import load
from lm_train.runs import RunFolder, read_jsonl
from tests.anomaly_cases import spoilt_run
from tests.conftest import TINY, Ranks

NewRun = Callable[..., RunFolder]
WITHOUT_END = ("trainer.limit_val_batches=0",)


def test_a_withheld_step_is_counted_and_named(new_run: NewRun, ranks: Ranks) -> None:
    folder = new_run("trainer.max_steps=9", "trainer.devices=2", "checkpoint.every_n_steps=5", *WITHOUT_END)
    answers = ranks("ddp").run("spoilt_run", folder=str(folder.root), steps=[3, 7, 8], what="nan", rank=1)
    rows = list(read_jsonl(folder.anomalies))
    assert [(row["step"], row["what"], row["ranks"]) for row in rows] == [(s, "nonfinite", [1]) for s in (3, 7, 8)]
    assert all(len(row["samples"]) == 8 for row in rows), "rank 1's half of 16 samples"
    counts = [row.get("anomalies/withheld", 0) for row in read_jsonl(folder.metrics) if "train/loss" in row]
    assert counts == [0, 0, 1, 1, 1, 1, 2, 3, 3]
    state = json.loads((folder.checkpoints / "step-9" / "state.json").read_text())
    assert state["anomalies"]["withheld"] == 3
    said = [line for answer in answers for line in answer["told"].splitlines() if "not finite" in line]
    assert len(said) == 1
    assert "step 3: the loss is not finite on rank 1" in said[0]


def test_the_run_goes_on_as_one_that_left_the_data_out(new_run: NewRun) -> None:
    """Three bad steps in a row: back to the checkpoint before them, their data left out, and everything else as it was."""
    words = ("trainer.max_steps=14", "checkpoint.every_n_steps=4", "trainer.log_every_n_steps=3", *WITHOUT_END)
    words += ("checkpoint.keep_last=9",)
    folder = new_run(*words)
    with pytest.raises(RollBack):
        spoilt_run(str(folder.root), [6, 7, 8], "nan")
    assert [row.row() for row in anomalies.rollbacks(folder.anomalies)] == [
        {"step": 8, "what": "rollback", "reason": "nonfinite", "first": 6, "skipped": ((80, 128),)}
    ]
    assert sorted(p.name for p in folder.checkpoints.glob("step-*")) == ["step-4"]
    # from the checkpoint on; killed between and started again, it stays the same
    straight = new_run(*words, name="straight")
    straight.anomalies.write_text(folder.anomalies.read_text())
    for run in (folder, straight):
        assert spoilt_run(str(run.root), [], "nan", resume_from=str(folder.checkpoints / "step-4"))["code"] == 0
    assert spoilt_run(str(folder.root), [], "nan", resume_from=str(folder.checkpoints / "step-12"))["code"] == 0
    rows, expected = list(ledger.read(folder.ledger)), list(ledger.read(straight.ledger))
    assert rows[4:] == expected
    assert [row.step for row in rows] == list(range(1, 15))
    state = json.loads((folder.checkpoints / "step-14" / "state.json").read_text())
    assert state["skipped"] == [[80, 128]]
    assert state["anomalies"]["streak"] is None
    # the samples are those of a run that never had these data
    plain = new_run("trainer.max_steps=17", *WITHOUT_END, name="plain")
    spoilt_run(str(plain.root), [], "nan")
    samples = [row.samples for row in ledger.read(plain.ledger)]
    assert [row.samples for row in rows] == samples[:5] + samples[8:]


def test_a_checkpoint_amid_the_bad_steps_serves_as_well(new_run: NewRun) -> None:
    folder = new_run("trainer.max_steps=9", "checkpoint.every_n_steps=1", *WITHOUT_END)
    with pytest.raises(RollBack):
        spoilt_run(str(folder.root), [4, 5, 6], "gradient")
    assert spoilt_run(str(folder.root), [], "nan", resume_from=str(folder.checkpoints / "step-5"))["code"] == 0
    state = json.loads((folder.checkpoints / "step-9" / "state.json").read_text())
    assert state["skipped"] == [[80, 96]], (
        "what steps 4 and 5 took is behind the checkpoint; step 6's batch is left out"
    )


def test_without_a_checkpoint_the_run_begins_anew(new_run: NewRun) -> None:
    folder = new_run("trainer.max_steps=6", "checkpoint.every_n_steps=null", *WITHOUT_END)
    with pytest.raises(RollBack):
        spoilt_run(str(folder.root), [2, 3, 4], "nan")
    assert spoilt_run(str(folder.root), [], "nan")["code"] == 0
    assert [row.step for row in ledger.read(folder.ledger)] == list(range(1, 7))
    assert json.loads((folder.checkpoints / "step-6" / "state.json").read_text())["skipped"] == [[16, 64]]


def test_bad_steps_that_come_back_end_the_run(new_run: NewRun) -> None:
    folder = new_run("trainer.max_steps=20", "checkpoint.every_n_steps=4", *WITHOUT_END)
    with pytest.raises(RollBack):
        spoilt_run(str(folder.root), [6, 7, 8], "nan")
    with pytest.raises(NoProgressError, match=r"steps 9 to 11 .* steps 6 to 8"):
        spoilt_run(str(folder.root), [6, 9, 10, 11], "nan", resume_from=str(folder.checkpoints / "step-4"))
    assert len(anomalies.rollbacks(folder.anomalies)) == 1


def test_fewer_than_the_patience_do_not_end_it(new_run: NewRun) -> None:
    folder = new_run("trainer.max_steps=12", "trainer.nonfinite_patience=3", *WITHOUT_END)
    assert spoilt_run(str(folder.root), [2, 3, 5, 6, 8, 9], "nan")["code"] == 0
    folder = new_run(
        "trainer.max_steps=8", "trainer.nonfinite_patience=null", "trainer.spike_patience=null", name="ever"
    )
    assert spoilt_run(str(folder.root), range(2, 8), "nan")["code"] == 0


def test_a_streak_goes_on_behind_a_checkpoint(new_run: NewRun) -> None:
    folder = new_run("trainer.max_steps=9", "checkpoint.every_n_steps=5", *WITHOUT_END)
    again = new_run("trainer.max_steps=9", *WITHOUT_END, name="again")
    with pytest.raises(RollBack):
        spoilt_run(str(folder.root), [4, 5, 6], "nan")
    with pytest.raises(RollBack):
        spoilt_run(str(again.root), [6], "nan", resume_from=str(folder.checkpoints / "step-5"))


@pytest.mark.parametrize(
    "strategy",
    [
        "single",
        "ddp",
        "fsdp",
        pytest.param("zero2", marks=pytest.mark.slow),
        pytest.param("zero3", marks=pytest.mark.slow),
    ],
)
def test_a_spike_is_withheld(new_run: NewRun, ranks: Ranks, strategy: str) -> None:
    words = (
        "trainer.max_steps=30",
        "trainer.spike_threshold=8",
        "trainer.spike_window=16",
        "trainer.log_every_n_steps=10",
    )
    words += ("checkpoint.every_n_steps=20", *WITHOUT_END)
    if strategy == "single":
        folder = new_run(*words)
        answers = [spoilt_run(str(folder.root), [5, 23, 24], "times")]
    else:
        accumulate = 2 if strategy == "ddp" else 1
        words += (f"trainer.strategy={strategy}", f"trainer.accumulate_grad_batches={accumulate}")
        folder = new_run(*words, "trainer.devices=2")
        answers = ranks(strategy).run("spoilt_run", folder=str(folder.root), steps=[5, 23, 24], what="times", rank=1)
    for answer in answers:
        found = answer["digests"]
        assert [s for s in range(1, 31) if found[str(s)] == found[str(s - 1)]] == [23, 24], "not armed at step 5"
    assert [(r.step, r.withheld) for r in ledger.read(folder.ledger) if r.withheld] == [(23, "spike"), (24, "spike")]
    state = json.loads((folder.checkpoints / "step-30" / "state.json").read_text())
    assert state["anomalies"]["window"]["count"] == 28
    assert max(state["anomalies"]["window"]["losses"]) < 6


def test_a_resumed_run_judges_spikes_as_the_whole_one(new_run: NewRun) -> None:
    words = (
        "trainer.max_steps=30",
        "trainer.spike_threshold=8",
        "trainer.spike_window=8",
        "checkpoint.every_n_steps=14",
    )
    words += ("checkpoint.keep_last=3", *WITHOUT_END)
    whole, rest = new_run(*words, name="whole"), new_run(*words, name="rest")
    spoilt_run(str(whole.root), [5, 16, 17], "times")
    spoilt_run(str(rest.root), [16, 17], "times", resume_from=str(whole.checkpoints / "step-14"))
    rows = list(ledger.read(whole.ledger))
    assert [row.step for row in rows if row.withheld] == [16, 17], "a fresh window would not be full yet"
    assert rows[14:] == list(ledger.read(rest.ledger))


def test_lasting_spikes_take_the_run_back(new_run: NewRun) -> None:
    folder = new_run(
        "trainer.max_steps=40",
        "trainer.spike_threshold=8",
        "trainer.spike_window=8",
        "trainer.spike_patience=4",
        *WITHOUT_END,
    )
    with pytest.raises(RollBack):
        spoilt_run(str(folder.root), range(20, 30), "times")
    assert anomalies.rollbacks(folder.anomalies) == [RollBackRow("spike", 20, 23, ((19 * 16, 23 * 16),))]


@pytest.mark.parametrize("strategy", ["ddp", *(pytest.param(s, marks=pytest.mark.slow) for s in ("zero1", "zero2"))])
def test_a_flipped_bit_is_found_and_not_saved(new_run: NewRun, ranks: Ranks, strategy: str) -> None:
    words = (
        "trainer.max_steps=12",
        "trainer.replica_check_every_n_steps=4",
        "checkpoint.every_n_steps=2",
        f"trainer.strategy={strategy}",
    )
    folder = new_run(*words, "trainer.devices=2", *WITHOUT_END)
    answers = ranks(strategy).run("flipped_run", folder=str(folder.root), step=6, rank=1)
    for answer in answers:
        assert "step 6: rank 0 on" in answer["error"] or "step 6: rank 1 on" in answer["error"]
        assert "same at step 4" in answer["error"]
    assert json.loads((folder.checkpoints / "latest").read_text())["step"] == 4


@pytest.mark.slow
def test_three_replicas_outvote_one(new_run: NewRun, ranks: Ranks) -> None:
    words = (
        "trainer.max_steps=6",
        "trainer.replica_check_every_n_steps=2",
        "data.global_batch_size=12",
        "trainer.devices=3",
    )
    folder = new_run(*words, *WITHOUT_END)
    answers = ranks("ddp", 3).run("flipped_run", folder=str(folder.root), step=4, rank=2)
    assert all("rank 2 on" in a["error"] and "than the 2 other ranks" in a["error"] for a in answers)


def test_rows_of_steps_done_again_are_dropped_but_for_rollbacks(tmp_path: Path) -> None:
    file = tmp_path / "anomalies.jsonl"
    row = RollBackRow("nonfinite", 7, 9, ((48, 72),))
    for step in (3, 8):
        anomalies.append(file, {"step": step, "what": "nonfinite"})
    anomalies.append(file, row.row())
    with file.open("a") as opened:
        opened.write('{"step":9,"wha')
    anomalies.cut(file, 5)
    assert [r["step"] for r in read_jsonl(file)] == [3, 9]
    assert anomalies.rollbacks(file) == [row]
    assert anomalies.ahead([row], 40) == [(48, 72)]
    assert anomalies.ahead([row], 56) == [(56, 72)]
    assert anomalies.ahead([row], 72) == []


@pytest.fixture
def train_spoilt(tmp_path: Path, text_file: Path, new_run: NewRun) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A run as a person starts it, of a network that a block of the text in each of some steps' batches makes no number."""

    def run(steps: Sequence[int], *words: str) -> subprocess.CompletedProcess[str]:
        plain = new_run("trainer.max_steps=16", name="plain")
        recipe, plan = load([f"recipe={plain.recipe}"]), Plan.read(plain.plan)
        module = data.build(recipe.data, plan, recipe.seed, plain)
        module.prepare(recipe.model)
        batches = module.train_batches(0)
        bad = [batches[(step - 1) * plan.accumulate_grad_batches]["tokens"][0].tolist() for step in steps]
        net = f'{{kind: custom, factory: "tests.anomaly_cases:poisoned_net", block_size: 16, args: {{bad: {json.dumps(bad)}}}}}'
        given = dict(word.split("=", 1) for word in (*TINY, f"data.path={text_file}", *WITHOUT_END, *words))
        given |= {"model": net, "runs_dir": str(tmp_path), "name": "run", "plugins": "tests"}
        return subprocess.run(
            [sys.executable, "-m", "lm_train", "train", *(f"{key}={value}" for key, value in given.items())],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}, capture_output=True, text=True, timeout=240,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_goes_back_by_itself(tmp_path: Path, train_spoilt: Any, devices: int) -> None:
    """Data that give no number: three steps in a row are withheld, the run goes back, leaves them out and comes to its end."""
    ended = train_spoilt([6, 7, 8], "trainer.max_steps=12", "checkpoint.every_n_steps=4", f"trainer.devices={devices}")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("going back to the newest checkpoint") == 1
    folder = RunFolder(tmp_path / "run")
    assert [row.step for row in ledger.read(folder.ledger)] == list(range(1, 13))
    assert not any(row.withheld for row in ledger.read(folder.ledger))
    assert json.loads((folder.checkpoints / "step-12" / "state.json").read_text())["skipped"] == [[80, 128]]


@pytest.mark.slow
def test_a_run_that_goes_back_in_vain_ends_with_76(tmp_path: Path, train_spoilt: Any) -> None:
    ended = train_spoilt(range(6, 16), "trainer.max_steps=12", "checkpoint.every_n_steps=4")
    assert ended.returncode == ExitCode.NO_PROGRESS, ended.stderr
    assert [line for line in ended.stderr.splitlines() if "after the run had gone back" in line]
    assert "Traceback" not in ended.stderr
    assert json.loads((tmp_path / "run" / "checkpoints" / "latest").read_text())["step"] == 4
