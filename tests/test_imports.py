"""How the package hangs together: a room imports only from the rooms above it, and what need not have torch has none."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lm_train

ROOMS = (
    "errors",
    "heartbeat",
    "interpreter",
    "redaction",
    "signals",
    "output",
    "ledger",
    "saved",
    "recipe",
    "plugins",
    "hardware",
    "slurm",
    "clusters",
    "plan",
    "sbatch",
    "submit",
    "runs",
    "owner",
    "anomalies",
    "resume",
    "inspection",
    "budget",
    "horizon",
    "attempt",
    "failures",
    "watchdog",
    "restarts",
    "supervisor",
    "launch",
    "folds",
    "models",
    "optim",
    "data",
    "metrics",
    "rendezvous",
    "strategy",
    "modules",
    "trace",
    "loop",
    "checkpoint",
    "generate",
    "callbacks",
    "tracking",
    "ending",
    "train",
    "rank",
    "calibrate",
    "planning",
    "prepare",
    "verify_resume",
    "dry_run",
    "doctor",
    "cli",
    "__main__",
)
"""From the top of the house down."""
IMPORT_WHEN_CALLED = ("cli", "rank")
"""The verbs, so that --help is fast, and a rank, which takes signals before torch comes."""
WITHOUT_TORCH = (
    "errors",
    "heartbeat",
    "interpreter",
    "redaction",
    "signals",
    "ledger",
    "saved",
    "recipe",
    "plugins",
    "hardware",
    "slurm",
    "clusters",
    "plan",
    "sbatch",
    "submit",
    "runs",
    "owner",
    "anomalies",
    "resume",
    "budget",
    "horizon",
    "attempt",
    "failures",
    "watchdog",
    "restarts",
    "supervisor",
    "launch",
    "folds",
    "cli",
)
HEAVY = ("torch", "lightning", "deepspeed", "transformers", "datasets", "tokenizers", "wandb", "numpy")
MOST_LINES = 500
PACKAGE = Path(lm_train.__file__).parent
FILES = tuple(sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"))


def module_of(file: Path) -> str:
    """`recipe.load` for lm_train/recipe/load.py, `recipe` for its __init__.py."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Each module of lm_train that is imported in `tree`, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "lm_train":
                    yield alias.name.partition(".")[2], node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            package, _, module = (node.module or "").partition(".")
            if package == "lm_train":
                for alias in node.names:
                    inner = f"{module}.{alias.name}".lstrip(".")
                    yield inner if is_module(inner) else module, node.lineno


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_a_file_imports_only_from_rooms_above(file: Path) -> None:
    room = module_of(file).split(".")[0]
    assert room in ROOMS, f"{room} has no place in the house yet; put it into ROOMS"
    for name, line in imports(parsed(file)):
        other = name.split(".")[0]
        if name and other != room:
            assert ROOMS.index(other) < ROOMS.index(room), (
                f"{file.name}:{line}: {room} imports {other}, a room below it"
            )


def test_every_room_is_there() -> None:
    assert {module_of(file).split(".")[0] for file in FILES} == set(ROOMS)


@pytest.mark.parametrize("room", sorted({module_of(f).split(".")[0] for f in FILES if f.parent != PACKAGE}))
def test_no_cycle_inside_a_folder(room: str) -> None:
    graph = {}
    for file in FILES:
        name = module_of(file)
        if name.split(".")[0] == room:
            graph[name] = {other for other, _ in imports(parsed(file)) if other.split(".")[0] == room}
    for name, others in graph.items():  # an __init__ imports its files, not the other way round
        assert room not in others - {name}, f"{name} imports from its own __init__"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_stand_at_the_top(file: Path) -> None:
    name = module_of(file)
    if name in IMPORT_WHEN_CALLED:
        return
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = list(imports(node))
            assert not inside, f"{file.name}:{inside[0][1]}: {node.name} imports lm_train.{inside[0][0]}"


def test_rooms_without_torch() -> None:
    modules = [f"lm_train.{room}" for room in WITHOUT_TORCH]
    program = f"import sys, {', '.join(modules)}\nprint([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_package_imports_nothing_but_itself() -> None:
    program = "import sys; before = set(sys.modules); import lm_train; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['lm_train']"


def test_files_are_short_and_have_names_that_say_something() -> None:
    for file in FILES:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= MOST_LINES, file
        assert file.stem not in ("utils", "util", "helpers", "common", "misc"), file


def test_the_checks_see_a_fault() -> None:
    """Code with one import of each forbidden sort, so that a silent test is not taken for a good house."""
    tree = ast.parse(
        "import lm_train.cli\ndef f():\n    from lm_train import train\n    from lm_train.recipe import load\n"
    )
    assert sorted(imports(tree)) == [("cli", 1), ("recipe.load", 4), ("train", 3)]
