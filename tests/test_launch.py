"""The supervisor with real processes: what a person types, what comes out, and what is left behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lm_train import heartbeat
from lm_train import launch as launching
from lm_train.errors import ExitCode
from lm_train.heartbeat import Phase
from lm_train.recipe import load
from lm_train.runs import RunFolder, read_jsonl
from tests.commands import ENDLESS, Command
from tests.conftest import TINY


@pytest.fixture
def launch(tmp_path: Path, text_file: Path) -> Iterator:
    started = []

    def start(*words: str) -> Command:
        command = Command(tmp_path, (f"data.path={text_file}", "name=run", *words))
        started.append(command)
        return command

    yield start
    for command in started:
        command.clean()


def test_a_refused_start_leaves_recipe_and_plan_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(seed: int, code: ExitCode) -> bytes:
        monkeypatch.setattr(launching, "_supervise", lambda *args: code)
        words = ("recipe=gpt_debug", "name=run", f"runs_dir={tmp_path}", f"seed={seed}")
        assert launching.train(load([*words, f"data.global_batch_size={32 * seed}"])) == code
        return RunFolder(tmp_path / "run").recipe.read_bytes() + RunFolder(tmp_path / "run").plan.read_bytes()

    first = start(1, ExitCode.REQUEUE)
    assert start(2, ExitCode.BAD_CHECKPOINT) == first
    assert start(2, ExitCode.REQUEUE) != first


def test_one_command_trains_reports_and_is_not_done_twice(launch) -> None:
    first = launch("trainer.sample_tokens=20", "trainer.val_check_interval=20", "tracking.wandb=offline")
    code, out, err = first.end()
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "--- sample ---"
    assert lines[-1] == "runs/run"
    assert "training tokens" in err
    assert "val/loss" in err
    assert "Traceback" not in err
    assert "Warning" not in err
    assert first.run.exit_code.read_text() == "0\n"
    assert {p.name for p in first.root.iterdir()} >= {
        "recipe.yaml", "plan.json", "exit_code", "metrics.jsonl", "checkpoints", "wandb", "tokenizer.json"
    }  # fmt: skip
    rows = list(read_jsonl(first.run.metrics))
    assert set(rows[0]) == {
        "step", "epoch", "tokens", "samples", "train/loss", "train/grad_norm", "train/learning_rate", "perf/step_seconds",
        "perf/data_wait_seconds", "perf/tokens_per_second", "perf/samples_per_second", "memory/peak_bytes",
        "budget/gpu_hours", "budget/hours", "budget/kwh", "perf/predicted_step_seconds", "memory/predicted_peak_bytes",
    }  # fmt: skip
    assert rows[0]["tokens"] == 256
    assert [row["step"] for row in rows if "val/loss" in row] == [20, 40, 50]

    before = first.run.metrics.read_bytes()
    again = launch("trainer.sample_tokens=20", "trainer.val_check_interval=20", "tracking.wandb=offline")
    code, out, err = again.end()
    assert (code, out) == (0, "runs/run\n")
    assert "finished already" in err
    assert first.run.metrics.read_bytes() == before


def test_ctrl_c_saves_both_ranks_and_the_same_command_goes_on(launch) -> None:
    words = ("trainer.devices=2",)
    command = launch(*words, *ENDLESS)
    command.wait_for_steps()
    os.killpg(command.process.pid, signal.SIGINT)  # what a terminal does
    code, out, err = command.end()
    assert code == 130
    assert out == "runs/run\n"
    assert err.count("stopping at the next step boundary") == 1
    assert "name=run" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert command.run.exit_code.read_text() == "130\n"
    step = json.loads((command.run.checkpoints / "latest").read_text())["step"]
    assert step > 20

    resumed = launch(*words, *ENDLESS, f"trainer.max_steps={step + 30}")
    code, out, err = resumed.end()
    assert code == 0
    assert f"resuming from runs/run/checkpoints/step-{step}" in err
    assert f"the recipe has changed: trainer.max_steps: 1000000 -> {step + 30}" in err
    steps = [row["step"] for row in read_jsonl(resumed.run.metrics) if "train/loss" in row]
    assert steps == sorted(set(steps)), "no step stands twice"
    assert steps[-1] == step + 30


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_preemption_signal_saves_and_asks_for_a_requeue(launch, number: signal.Signals) -> None:
    command = launch(*ENDLESS)
    command.wait_for_steps()
    command.process.send_signal(number)
    code, _, err = command.end()
    assert code == 75, err
    assert command.run.exit_code.read_text() == "75\n"
    assert (command.run.checkpoints / "latest").exists()


def test_a_second_ctrl_c_ends_at_once(launch) -> None:
    # a stopped rank reaches no step boundary
    command = launch(*ENDLESS)
    command.wait_for_steps()
    os.kill(command.ranks()[0], signal.SIGSTOP)
    command.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert command.process.poll() is None
    command.process.send_signal(signal.SIGINT)
    code, _, err = command.end(timeout=5)
    assert code == 130
    assert "stopped without saving" in err.splitlines()[-1]
    assert command.ranks() == {}


@pytest.mark.parametrize(
    "delay", [pytest.param(0.2, marks=pytest.mark.slow), 0.6, pytest.param(1.5, marks=pytest.mark.slow)]
)
def test_a_signal_before_the_first_step_ends_in_order(launch, delay: float) -> None:
    command = launch("trainer.devices=2", *ENDLESS)
    while not command.run.plan.exists():
        time.sleep(0.01)
    time.sleep(delay)
    command.process.send_signal(signal.SIGINT)
    code, _, err = command.end(timeout=90)
    assert code == 130, err
    assert "Traceback" not in err
    assert command.ranks() == {}
    logs = "".join(log.read_text() for log in command.run.errors.glob("*.log"))
    assert "Traceback" not in logs


@pytest.mark.slow
def test_a_run_killed_and_started_again_has_the_losses_of_the_undisturbed_one(launch) -> None:
    words = (
        "trainer.max_steps=400",
        "checkpoint.every_n_steps=40",
        "model.dropout=0.1",
        "trainer.limit_val_batches=2",
    )
    whole = launch(*words, "name=whole")
    assert whole.end()[0] == 0
    killed = launch(*words)
    latest = killed.run.checkpoints / "latest"
    while not latest.exists() or json.loads(latest.read_text())["step"] < 120:
        assert killed.process.poll() is None
        time.sleep(0.005)
    os.kill(killed.ranks()[0], signal.SIGKILL)
    assert killed.end()[0] == 75
    step = json.loads(latest.read_text())["step"]
    assert 120 <= step < 400
    code, _, err = launch(*words).end()
    assert code == 0
    assert f"resuming from runs/run/checkpoints/step-{step}" in err
    keys = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "val/loss")
    rows = [[[row.get(key) for key in keys] for row in read_jsonl(c.run.metrics)] for c in (whole, killed)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 401


def test_a_stop_ends_a_validation_too(launch) -> None:
    command = launch(*ENDLESS, "trainer.val_check_interval=40", "data.val_fraction=0.9", "data.micro_batch_size=1")
    command.wait_for_steps()
    rank = command.ranks()[0]
    while (beat := heartbeat.seen(command.process.pid, rank)) is None or beat.phase is not Phase.VALIDATION:
        assert command.process.poll() is None
        time.sleep(0.01)
    command.process.send_signal(signal.SIGTERM)
    code, _, err = command.end(timeout=10)
    assert code == 75, err
    assert "Traceback" not in err
    assert json.loads((command.run.checkpoints / "latest").read_text())["step"] == 40
    assert not any("val/loss" in row for row in read_jsonl(command.run.metrics))


def test_a_reader_that_goes_away_does_not_end_the_training(launch) -> None:
    command = launch("trainer.sample_tokens=20", "trainer.log_every_n_steps=5")
    command.process.stdout.close()
    command.process.stderr.close()
    assert command.process.wait(timeout=60) == 0
    assert command.run.exit_code.read_text() == "0\n"


def test_fewer_steps_than_done_are_refused(launch) -> None:
    assert launch("trainer.max_steps=6").end()[0] == 0
    code, _, err = launch("trainer.max_steps=4").end()
    assert code == 2
    assert "step-6 is at step 6 already, trainer.max_steps=4 lies before it" in err


def test_a_rank_that_dies_ends_the_run_and_is_named(launch) -> None:
    command = launch("trainer.devices=2", *ENDLESS)
    command.wait_for_steps()
    os.kill(command.ranks()[1], signal.SIGKILL)
    began = time.monotonic()
    code, _, err = command.end(timeout=20)
    assert time.monotonic() - began < 5
    assert code == 75
    assert re.search(r"^lm-train: rank 1 on \S+, after step \d+ \(.+\): was ended by SIGKILL$", err, re.MULTILINE), err
    assert "Traceback" not in err
    assert command.ranks() == {}


def test_a_run_has_one_supervisor_which_takes_its_ranks_along_when_it_is_killed(launch) -> None:
    command = launch("trainer.devices=2", *ENDLESS)
    command.wait_for_steps()
    assert set(command.ranks()) == {0, 1}
    code, _, err = launch("trainer.devices=2", *ENDLESS).end()
    assert code == 73
    assert f"lm-train: runs/run is at work already (process {command.process.pid} on " in err.splitlines()[-1]
    assert set(command.ranks()) == {0, 1}
    assert not command.run.exit_code.exists()
    command.process.kill()
    deadline = time.monotonic() + 5
    while command.ranks() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert command.ranks() == {}


def test_bad_data_is_one_line_whatever_the_number_of_ranks(launch, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"text": "broken\n')
    command = launch("trainer.devices=2", f"data.path={bad}")
    code, _out, err = command.end()
    assert code == 66
    message = [line for line in err.splitlines() if line.startswith("lm-train:")]
    assert len(message) == 1, err
    assert f"{bad}" in message[0]
    assert "line 2" in message[0]
    assert "Traceback" not in err
    assert command.run.exit_code.read_text() == "66\n"


def test_a_folder_that_cannot_be_made_is_refused_before_any_rank_starts(launch) -> None:
    command = launch("runs_dir=/proc/nowhere")
    code, _, err = command.end()
    assert code == 73
    assert "runs_dir=" in err.splitlines()[-1]


def test_debug_shows_shapes_and_times_and_overfits_one_batch(launch) -> None:
    command = launch("debug=true", "trainer.max_steps=20")
    code, _, err = command.end()
    assert code == 0, err
    assert "shapes of the first batch:" in err
    assert "(16, 16) int64" in err
    assert "slowest operations of 5 steps" in err
    assert "as it should" in err
    assert not (command.root / "wandb").exists()


def test_a_terminal_gets_a_bar(tmp_path: Path, text_file: Path) -> None:
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    words = (*TINY, f"data.path={text_file}", "trainer.max_steps=300", "trainer.val_check_interval=100", "name=run")
    given = dict(word.split("=", 1) for word in words)
    process = subprocess.Popen(
        [sys.executable, "-m", "lm_train", "train", *(f"{k}={v}" for k, v in given.items())],
        cwd=tmp_path, stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while part := os.read(main, 4096):
            shown += part
    assert process.wait() == 0
    text = shown.decode()
    assert "300/300" in text
    assert "loss " in text
    assert "tokens/s" in text
    assert "val/loss" in text
    assert "ETA" not in text, "plain lines are for other places"
