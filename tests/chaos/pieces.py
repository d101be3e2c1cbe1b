"""What the suite does, how often, and what must come of it. A case is a function of the bench and of a seeded generator."""

from __future__ import annotations

import contextlib
import json
import random
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos import cluster, damage, kills, moves, outages, saves, stops, values
from tests.chaos.bench import Bench, Failed

SEED = 20_261_122


@dataclass(frozen=True)
class Piece:
    """Cases of one kind."""

    name: str
    title: str
    """What is counted, for the table."""
    goal: int
    """How many of these there are to be."""
    cases: int
    run: Callable[[Bench, int, random.Random], dict[str, Any]]
    """Bench, number of the case, generator -> `points` (how many of what is counted), and anything worth keeping; raises
    `Failed` where the product fails."""


@dataclass
class Row:
    """What came of a case."""

    piece: str
    case: int
    ok: bool
    points: int
    seconds: float
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


PIECES = {
    piece.name: piece
    for piece in (
        Piece(
            "kills", "SIGKILL at a random point, then the same ledger and weights to the byte", 200, 104, kills.killed
        ),
        Piece(
            "saves",
            "SIGKILL inside a save: `latest` loads, nothing older lost, then the same ledger",
            500,
            52,
            saves.killed_in_saves,
        ),
        Piece(
            "flips",
            "single bits flipped in all files of a checkpoint, found before anything is loaded",
            1000,
            10,
            damage.flips,
        ),
        Piece("cuts", "files cut, emptied, removed, made longer: found", 500, 5, damage.cuts),
        Piece("clean", "whole checkpoints loaded without an alarm", 1000, 10, damage.clean_loads),
        Piece(
            "damage",
            "newest checkpoint damaged, then started: named, the one before taken, the same ledger",
            12,
            12,
            damage.resumed_from_damage,
        ),
        Piece("disk", "full disk: 73, newest checkpoint good, with room the same ledger", 10, 12, saves.disk_full),
        Piece(
            "signals",
            "SIGTERM, SIGUSR1 to one or several ranks: 75, a good checkpoint, the same ledger",
            100,
            100,
            stops.signalled,
        ),
        Piece("stopped", "a stopped rank is named, 75, the same ledger", 50, 50, stops.stopped),
        Piece("owners", "second owners refused within 5 s, a dead one's claim free", 50, 5, stops.second_owners),
        Piece(
            "worlds",
            "4, 2, 1, 3 processes one after another: the same samples, losses within 1e-6 (20 steps) and 1e-5 (60)",
            20,
            20,
            moves.worlds,
        ),
        Piece(
            "strategies",
            "through the strategies: the same samples, losses within 1e-6 (20 steps) and 1e-5 (60)",
            20,
            20,
            moves.strategies,
        ),
        Piece(
            "values",
            "loss of one rank not finite, or a spike, and a kill: withheld, the same ledger; 76 if it stays",
            40,
            40,
            values.not_finite,
        ),
        Piece(
            "replicas",
            "a bit of one rank's parameters flipped: found, not saved, then the same ledger",
            20,
            20,
            values.flipped,
        ),
        Piece(
            "outages",
            "W&B's server lost, and every row sent later; or its process, or a rank beside it: the same ledger",
            12,
            12,
            outages.wandb_down,
        ),
        Piece("plain-kills", "the same without the fork server", 8, 8, kills.killed_plainly),
        Piece(
            "slurm",
            "requeues in a real Slurm, one by a partition of higher priority: the same ledger",
            20,
            4,
            cluster.in_slurm,
        ),
        Piece("node", "a node lost in a real Slurm: requeued elsewhere, no step twice", 2, 2, cluster.node_lost),
    )
}


def run_case(bench: Bench, piece: Piece, case: int, seed: int = SEED) -> Row:
    """Runs one case; what it raises becomes its note."""
    began = time.monotonic()
    try:
        facts = piece.run(bench, case, random.Random(f"{seed}/{piece.name}/{case}"))
        return Row(piece.name, case, True, facts.pop("points", 1), time.monotonic() - began, facts=facts)
    except Failed as failure:
        return Row(piece.name, case, False, 1, time.monotonic() - began, str(failure))
    except Exception:
        return Row(piece.name, case, False, 1, time.monotonic() - began, f"the suite itself: {traceback.format_exc()}")


def append(file: Path, row: Row) -> None:
    with file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(asdict(row)) + "\n")


def read(file: Path) -> list[Row]:
    """The rows so far, the last one of each case."""
    return list({(row.piece, row.case): row for row in read_all(file)}.values())


def read_all(file: Path) -> list[Row]:
    """Also those of cases that were done again; a torn last line is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError, TypeError):
            rows.append(Row(**json.loads(line)))
    return rows
