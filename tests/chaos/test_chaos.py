"""The first cases of every piece of the chaos suite; all of them: benchmarks/chaos.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.bench import Bench
from tests.chaos.pieces import PIECES, run_case


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Bench(tmp_path_factory.mktemp("chaos")) as made:
        yield made


FAST = {
    "kills": (0,),
    "flips": (0,),
    "cuts": (0,),
    "clean": (0,),
    "damage": (0,),
    "disk": (0,),
    "signals": (0, 1),
    "stopped": (1,),
    "owners": (0,),
    "worlds": (0,),
    "values": (0,),
    "replicas": (1,),
}
SLOW = {
    "kills": (1, 2, 3, 4, 5, 6, 8, 12, 13, 14, 15),
    "saves": (0, 1, 4, 5, 6, 8),
    "damage": (1, 2, 3),
    "disk": (1,),
    "signals": (2, 3, 4, 9),
    "stopped": (0, 4),
    "worlds": (1,),
    "strategies": (0, 1),
    "values": (1, 2, 3, 4),
    "replicas": (0,),
    "outages": (0, 1, 2),
    "plain-kills": (0, 6),
}


@pytest.mark.parametrize(("piece", "case"), [(piece, case) for piece, cases in FAST.items() for case in cases])
def test_a_case(bench: Bench, piece: str, case: int) -> None:
    row = run_case(bench, PIECES[piece], case)
    assert row.ok, row.note
    assert row.points > 0 or "skipped" in row.facts


@pytest.mark.slow
@pytest.mark.parametrize(("piece", "case"), [(piece, case) for piece, cases in SLOW.items() for case in cases])
def test_a_further_case(bench: Bench, piece: str, case: int) -> None:
    row = run_case(bench, PIECES[piece], case)
    assert row.ok, row.note


def test_nothing_outlives_the_bench(tmp_path: Path) -> None:
    """Also not what a fault has stopped."""
    with Bench(tmp_path / "bench") as made:
        folder = tmp_path / "runs"
        folder.mkdir()
        words = made.words(folder, "trainer.devices=2", "data.num_workers=2", "trainer.max_steps=1000000")
        stop = {"rank": 1, "phase": "step", "step": 3, "signal": 19}
        started = made.start(words, [stop, {"note": str(tmp_path / "struck")}])
        started.until((tmp_path / "struck").exists, "stop")
        assert len(made.left()) >= 4
    assert made.left() == []
