"""A clock that is set back or jumps: times, rows and displays go by one that nobody sets."""

from __future__ import annotations

import io
import itertools
import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from lm_train.callbacks.progress import _Bar
from lm_train.runs import RunFolder, read_jsonl
from lm_train.train import train
from tests.test_imports import FILES, PACKAGE

FOR_PEOPLE = {"inspection.py", "budget/spending.py", "owner.py", "restarts.py"}
"""Files that ask what time it is for a person to read, and take no difference that decides anything."""


def test_no_duration_is_taken_by_the_wall_clock() -> None:
    asked = re.compile(r"\btime\.(time|time_ns|localtime|gmtime)\(|\bdatetime\.(now|utcnow|today)\(")
    names = {str(file.relative_to(PACKAGE)): file.read_text(encoding="utf-8") for file in FILES}
    found = [name for name, text in names.items() if asked.search(text) and name not in FOR_PEOPLE]
    assert found == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the wall clock is an hour before the last, every tenth a day after it."""
    now, count = time.time(), itertools.count(1)

    def look() -> float:
        n = next(count)
        return now - 3600 * n + 86400 * (n // 10)

    monkeypatch.setattr(time, "time", look)
    monkeypatch.setattr("tqdm.std.time", look)


def test_a_run_while_the_clock_jumps(
    jumping: None, new_run: Callable[..., RunFolder], capfd: pytest.CaptureFixture[str]
) -> None:
    run = new_run("trainer.max_steps=6", "checkpoint.every_n_steps=3", "trainer.val_check_interval=3")
    train(run)
    rows = list(read_jsonl(run.metrics))
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    times: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(("perf/", "budget/")):
                times.setdefault(name, []).append(value)
    assert times["perf/step_seconds"]
    assert all(0 <= value < 1e9 for values in times.values() for value in values)
    assert all(value < 60 for value in times["perf/step_seconds"])
    held = [json.loads(line)["seconds"] for line in run.budget.read_text().splitlines()]
    assert held == sorted(held)
    assert 0 <= held[-1] < 600
    assert "ETA 0:0" in capfd.readouterr().err


def test_the_bar_while_the_clock_jumps(jumping: None) -> None:
    out = Terminal()
    bar: Any = _Bar(total=100, initial=10, file=out, mininterval=0, bar_format="{n_fmt} {elapsed}<{remaining}")
    for _ in range(50):
        bar.update()
    facts = bar.format_dict
    bar.close()
    assert 0 <= facts["elapsed"] < 60
    assert "60 00:0" in out.getvalue()
    assert "-" not in out.getvalue().replace("<?", "")
