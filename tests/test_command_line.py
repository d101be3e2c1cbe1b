"""What a person may get wrong on the command line: 200 faulty commands, each refused in one readable message a problem.

A line of a table is the words that go to `lm-train train recipe=gpt_debug`, and after the arrow what the answer must say.
"""

from __future__ import annotations

import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from lm_train import __version__, cli
from lm_train.recipe import dump, load, shipped_recipes
from lm_train.recipe.explain import suggest
from lm_train.recipe.sections import SECTIONS
from tests.faulty_commands import FAULTS, REAL, TYPOS

NAMED_RIGHT = 0.95
Run = Callable[..., "Answer"]


class Answer(NamedTuple):
    code: int
    out: str
    problems: list[str]


class Row(NamedTuple):
    words: tuple[str, ...]
    says: str


def rows(table: str, recipe: str = "recipe=gpt_debug") -> list[Row]:
    """The lines of a table; a line that names its own recipe does without the usual one."""
    read = []
    for line in filter(None, map(str.strip, table.splitlines())):
        command, _, says = line.rpartition(" -> ")
        split = shlex.shlex(command, posix=True)
        split.whitespace_split, split.escape, split.commenters = True, "", ""
        words = [word.encode().decode("unicode_escape") if "\\" in word else word for word in split]
        whole = any(
            word.lower().lstrip("-").startswith(("recip", "confi")) or word in shipped_recipes() for word in words
        )
        read.append(Row((*([] if whole else [recipe]), *words), says.strip()))
    return read


TYPO_ROWS, FAULT_ROWS = rows(TYPOS), rows(FAULTS)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process, in an empty folder; a training that would start is a failure."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lm_train.launch.train", lambda recipe: pytest.fail(f"started to train {recipe}"))

    def go(*words: str) -> Answer:
        code = cli.main(words)
        out, err = capsys.readouterr()
        return Answer(code, out, err.splitlines())

    return go


def suggestions(problem: str) -> list[str]:
    return re.findall(r"did you mean (.+?)\?", problem)


def names_right_word(row: Row, answer: Answer) -> bool:
    return any(row.says == suggestion for problem in answer.problems for suggestion in suggestions(problem))


def test_there_are_200_rows_and_no_two_alike() -> None:
    commands = [row.words for row in TYPO_ROWS + FAULT_ROWS]
    assert len(commands) >= 200
    assert len(set(commands)) == len(commands)
    assert len(TYPO_ROWS) >= 100


@pytest.mark.parametrize(
    "row", TYPO_ROWS + FAULT_ROWS, ids=lambda row: " ".join(row.words)[:60].encode("unicode_escape").decode()
)
def test_refused_with_one_line_a_problem(row: Row, run: Run, tmp_path: Path) -> None:
    answer = run("train", *row.words)
    assert answer.code == 2
    assert answer.out == ""
    assert answer.problems
    for line in answer.problems:
        assert line.startswith("lm-train: ")
        assert "Traceback" not in line
        assert line.isprintable()
        assert not re.search(r"\b(None|True|False|pydantic|Errno|<class|object at)\b", line), "Python shows through"
        assert len(line) < 500
    assert len(set(answer.problems)) == len(answer.problems)
    if row in FAULT_ROWS:
        expected = [part.strip() for part in row.says.split(" AND ")]
        assert len(answer.problems) == len(expected), answer.problems
        for part in expected:
            assert sum(part in line for line in answer.problems) == 1, (part, answer.problems)
    else:
        assert len(answer.problems) == 1
    assert list(tmp_path.iterdir()) == []


def test_nearly_every_typo_is_answered_with_the_right_word(run: Run) -> None:
    answers = {row: run("train", *row.words) for row in TYPO_ROWS}
    missed = [
        f"{' '.join(row.words)}: wanted {row.says}; said {answer.problems}"
        for row, answer in answers.items()
        if not names_right_word(row, answer)
    ]
    share = 1 - len(missed) / len(answers)
    assert share >= NAMED_RIGHT, f"only {share:.1%} of {len(answers)}:\n" + "\n".join(missed)


def slips(word: str) -> set[str]:
    """What fingers make of a word: at each place a letter dropped, doubled or swapped with its neighbour, and so on."""
    made = {
        word.upper(),
        word.title(),
        word.replace("_", "-"),
        word.replace("_", ""),
        word + "s",
        word.removesuffix("s"),
    }
    for i in range(len(word)):
        made |= {word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:]}
        made.add(word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :])
    return made - {word, ""}


def test_slips_in_every_key() -> None:
    """No key is suggested for its neighbour, and hardly a slip stays without an answer; not tuned like the table."""
    recipe = load(["recipe=gpt_debug"])
    raw = recipe.model_dump()
    keys = [(section, leaf) for section in SECTIONS for leaf in raw[section] if leaf != "kind"]
    known = {".".join(key) for key in keys}
    tried = [(f"{section}.{slip}", f"{section}.{leaf}") for section, leaf in keys for slip in sorted(slips(leaf))]
    tried = [(slip, right) for slip, right in tried if slip not in known]
    wrong = [f"{slip}: {answer}" for slip, right in tried if (answer := suggest(tuple(slip.split(".")), raw)) != right]
    assert len(tried) > 1000
    assert len(wrong) / len(tried) <= 1 - NAMED_RIGHT, "\n".join(wrong)


@pytest.mark.parametrize("row", rows(REAL), ids=lambda row: " ".join(row.words)[:60])
def test_as_a_real_command(row: Row, tmp_path: Path) -> None:
    done, seconds = command("train", *row.words, folder=tmp_path, options=("-X", "importtime"))
    told = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    modules = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if line not in told}
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert row.says in "\n".join(told)
    assert all(line.startswith("lm-train: ") for line in told)
    assert "pydantic" in modules  # the measurement sees imports
    assert not modules & {"torch", "lightning", "datasets", "transformers"}
    assert seconds < 1.0
    assert list(tmp_path.iterdir()) == []


def command(*words: str, folder: Path, options: tuple[str, ...] = ()) -> tuple[subprocess.CompletedProcess[str], float]:
    """A real `python -m lm_train`, and the CPU seconds that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    program = [sys.executable, *options, "-m", "lm_train", *words]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# verbs


VERBS = "train, plan, prepare, recipes, show, submit, doctor, calibrate, checkpoint, verify-resume"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("trian", "recipe=gpt_debug"), "trian: no such verb; did you mean train?"),
        (("Train",), "Train: no such verb; did you mean train?"),
        (("fit", "recipe=gpt_debug"), "fit: no such verb; did you mean train?"),
        (("recipe",), "recipe: no such verb; did you mean recipes?"),
        (("list",), "list: no such verb; did you mean recipes?"),
        (("docter",), "docter: no such verb; did you mean doctor?"),
        (("frobnicate",), f"frobnicate: no such verb; there are {VERBS}"),
        (("",), f"'': no such verb; there are {VERBS}"),
        (("\x1b[31mtrain",), r"'\x1b[31mtrain': no such verb; did you mean train?"),
        (("recipe=gpt_debug",), "a verb comes first; did you mean lm-train train recipe=gpt_debug?"),
        (("a=\n\x1b[31m",), r"a=\n\x1b[31m: a verb comes first; did you mean lm-train train a=\n\x1b[31m?"),
        (("recipes", "gpt_debug"), "gpt_debug: lm-train recipes takes no words"),
        (("doctor", "a=b"), "a=b: lm-train doctor takes no words"),
    ],
)
def test_wrong_verb(words: tuple[str, ...], says: str, run: Run) -> None:
    answer = run(*words)
    assert answer.code == 2
    assert len(answer.problems) == 1
    assert answer.problems[0].endswith(says)


def test_help(run: Run) -> None:
    asked = run("--help")
    assert (asked.code, asked.problems) == (0, [])
    assert asked.out.startswith("usage: lm-train VERB")
    assert all(f"\n  {verb} " in asked.out for verb in ("train", "recipes", "show", "doctor"))
    assert run("train", "recipe=nonsense", "--help").out == run("-h").out == asked.out
    bare = run()
    assert (bare.code, bare.out) == (2, "")
    assert "\n".join(bare.problems) == asked.out.rstrip("\n")
    assert run("--version").out == f"lm-train {__version__}\n"


def test_recipes(run: Run) -> None:
    listed = run("recipes").out.splitlines()
    assert [line.split()[0] for line in listed] == list(shipped_recipes())
    assert all(len(line.split()) > 3 for line in listed)


def test_show_feeds_back(run: Run, tmp_path: Path) -> None:
    shown = run("show", "recipe=gpt_small", "model.n_layer=4", "tracking.group=1e-4", "name=12e4567")
    assert (shown.code, shown.problems) == (0, [])
    (tmp_path / "mine.yaml").write_text(shown.out)
    again = run("show", "recipe=./mine.yaml")
    assert again.out == shown.out == dump(load(["recipe=mine.yaml"]))
    assert load(["recipe=mine.yaml"]).model.n_layer == 4


def test_what_only_prepare_reads_is_said(run: Run) -> None:
    words = ("train", "recipe=gpt_debug", "dry_run=true")
    assert not any("prepare" in line for line in run(*words).problems)
    told = run(*words, "prepare.dedup=near")
    assert told.code == 0
    assert any("warning: prepare.dedup=near: only lm-train prepare reads it" in line for line in told.problems)


def test_bug_of_ours_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(words: object) -> None:
        raise KeyError("inside")

    monkeypatch.setattr("lm_train.recipe.load", fail)
    answer = run("show", "recipe=gpt_debug")
    assert (answer.code, len(answer.problems)) == (70, 1)
    assert "our bug; debug=true shows where" in answer.problems[0]
    assert any("Traceback" in line for line in run("show", "recipe=gpt_debug", "debug=true").problems)


def test_reader_that_goes_away(tmp_path: Path) -> None:
    """`lm-train recipes | true` ends quietly, also where Python holds the output back to the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lm_train", "recipes"],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")


@pytest.mark.parametrize(
    ("words", "limit_s"), [(("--help",), 0.5), (("show", "recipe=gpt_small"), 0.5), (("recipes",), 0.5)]
)
def test_answers_at_once(words: tuple[str, ...], limit_s: float, tmp_path: Path) -> None:
    fastest = min((command(*words, folder=tmp_path) for _ in range(3)), key=lambda measured: measured[1])
    assert fastest[0].returncode == 0
    assert fastest[1] < limit_s
    assert list(tmp_path.iterdir()) == []


def test_package_imports_at_once() -> None:
    program = "import time; t = time.process_time(); import lm_train; print(time.process_time() - t)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.1
