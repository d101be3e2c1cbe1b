"""Faults of all kinds at seeded places, counted against goals; in pieces that go on where they were stopped.

    python benchmarks/chaos.py run [--pieces kills,saves] [--minutes 60] [--folder FOLDER] [--seed N] [--again-failed]
    python benchmarks/chaos.py report [--folder FOLDER]
    python benchmarks/chaos.py list

`run` does the cases that no row of FOLDER/rows.jsonl has yet, one after another, and begins none after M minutes; the same
command goes on. `report` prints the table and writes benchmarks/results/chaos.json and chaos.md. The cases themselves are in
tests/chaos/; a seed and a number say everything of a case.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from report import RESULTS, write_results

from tests.chaos.bench import Bench
from tests.chaos.pieces import PIECES, SEED, Piece, Row, append, read, read_all, run_case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report", "list"))
    parser.add_argument("--pieces", default=",".join(PIECES), help="names, separated by commas")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--cases", help="numbers of single cases of one piece, to reproduce; no row is kept")
    parser.add_argument("--again-failed", action="store_true", help="cases whose last row is a failure are done again")
    asked = parser.parse_args()
    unknown = [name for name in asked.pieces.split(",") if name not in PIECES]
    if unknown:
        parser.error(f"no piece {', '.join(unknown)}; there are {', '.join(PIECES)}")
    pieces = [PIECES[name] for name in asked.pieces.split(",")]
    if asked.what == "list":
        for piece in pieces:
            print(f"{piece.name:<16} {piece.goal:>5} {piece.title}")
        return 0
    file = asked.folder / f"rows-{asked.seed}.jsonl"
    if asked.what == "report":
        return report(pieces, read_all(file), asked.seed)
    return run(pieces, asked, file)


def run(pieces: list[Piece], asked: argparse.Namespace, file: Path) -> int:
    began = time.monotonic()
    asked.folder.mkdir(parents=True, exist_ok=True)
    done = {(row.piece, row.case) for row in read(file) if row.ok or not asked.again_failed}
    failures = 0
    with Bench(asked.folder / "work") as bench:
        for piece in pieces:
            cases = range(piece.cases) if asked.cases is None else map(int, asked.cases.split(","))
            for case in cases:
                if asked.cases is None and (piece.name, case) in done:
                    continue
                if time.monotonic() - began > 60 * asked.minutes:
                    print("time is up; the same command goes on", flush=True)
                    return failures > 0
                row = run_case(bench, piece, case, asked.seed)
                if asked.cases is None:
                    append(file, row)
                failures += not row.ok
                print(f"{piece.name} {case}: {_told(row)} ({row.seconds:.1f} s)", flush=True)
    return failures > 0


def _told(row: Row) -> str:
    return f"ok, {row.points}" if row.ok else f"FAILED: {row.note}"


def report(pieces: list[Piece], every: list[Row], seed: int) -> int:
    rows = list({(row.piece, row.case): row for row in every}.values())
    mended = [row for row in every if not row.ok and row not in rows]
    table: list[dict[str, Any]] = []
    for piece in pieces:
        own = [row for row in rows if row.piece == piece.name]
        good, bad = sum(row.points for row in own if row.ok), [row for row in own if not row.ok]
        table.append(
            {
                "piece": piece.name,
                "what": piece.title,
                "goal": piece.goal,
                "good": good,
                "failed": len(bad),
                "cases": f"{len(own)} of {piece.cases}",
                "failures": [f"case {row.case}: {row.note.splitlines()[0][:300]}" for row in bad],
                **_figures(own),
            }
        )
    lines = ["| piece | what | goal | good | failed cases | cases done |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['piece']} | {row['what']} | {row['goal']} | {row['good']} | {row['failed']} | {row['cases']} |"
        for row in table
    ]
    failures = [f"* {row['piece']}: {failure}" for row in table for failure in row["failures"]]
    lines += ["", *(["Failures:", "", *failures] if failures else ["No failure among the cases done."])]
    lines += ["", f"The cases took {sum(row.seconds for row in rows) / 3600:.1f} hours, one after another."]
    if mended:
        lines += ["", "Failed, and done again after the cause had been found:", ""]
        lines += [f"* {row.piece}: case {row.case}: {row.note.splitlines()[0][:200]}" for row in mended]
    text = "\n".join(lines)
    print(text)
    write_results("chaos", {"seed": seed, "pieces": table}, "chaos")
    head = f"# Chaos suite\n\n`python benchmarks/chaos.py run && python benchmarks/chaos.py report`, seed {seed}\n\n"
    (RESULTS / "chaos.md").write_text(head + text + "\n", encoding="utf-8")
    return 0


def _figures(rows: list[Row]) -> dict[str, Any]:
    """Numbers that cases have measured: their largest."""
    numbers: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.facts.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                numbers.setdefault(key, []).append(value)
    return {"largest": {key: max(values) for key, values in numbers.items()}} if numbers else {}


if __name__ == "__main__":
    sys.exit(main())
