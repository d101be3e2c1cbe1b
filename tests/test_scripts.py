"""The shell scripts: clean under shellcheck, without eval, and words of any kind stay words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.pair import ROOT

SCRIPTS = tuple(
    sorted(
        str(file.relative_to(ROOT))
        for pattern in ("launch/*.sh", "slurm/*.sbatch", "slurm/*.sh", "tests/*.sh", ".ci/run")
        for file in ROOT.glob(pattern)
    )
)
WORDS = (
    "data.path=a b",
    "tracking.group=$(touch canary)",
    "tracking.project=`touch canary`; touch canary & touch canary",
    'tracking.tags=["a\'b", *, ~]',
    "name=x > canary",
    "-n",
    "",
    "trainer={max_steps: 3}",
    "${HOME} $((1+1)) !! \\",
)
"""What a shell would do something with, were it ever to read it."""


def shellcheck() -> str | None:
    beside = Path(sys.executable).with_name("shellcheck")
    return str(beside) if beside.exists() else shutil.which("shellcheck")


@pytest.mark.skipif(shellcheck() is None, reason="no shellcheck here; launch/setup.sh dev installs it")
def test_scripts_are_clean_under_shellcheck() -> None:
    program = shellcheck()
    assert program is not None
    done = subprocess.run([program, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""
    assert len(SCRIPTS) >= 8


def test_no_script_evaluates_text() -> None:
    for script in SCRIPTS:
        code = [line.partition(" #")[0] for line in (ROOT / script).read_text(encoding="utf-8").splitlines()]
        assert not [line for line in code if line.strip().startswith(("eval ", "source <(")) or " eval " in line], (
            script
        )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts with an environment whose python writes down its words, and a Slurm of stubs."""
    root = tmp_path / "a check'out"
    for folder in ("launch", "slurm"):
        shutil.copytree(ROOT / folder, root / folder)
    bin_folder = root / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    stubs = {"python": 'printf "%s\\0" "$@" >"$WORDS_FILE"', "srun": 'shift; exec "$@"', "squeue": "", "scontrol": ""}
    for name, code in stubs.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{code}\n", encoding="utf-8")
        (bin_folder / name).chmod(0o755)
    (root / "launch" / "setup.sh").write_text("#!/bin/bash\nexit 0\n", encoding="utf-8")
    return root


def run_script(checkout: Path, *command: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What a script did, and the words that reached python."""
    words = checkout.parent / "words"
    words.unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", *command],
        cwd=checkout,
        env={
            "PATH": f"{checkout}/.venv/bin:{os.environ['PATH']}",
            "WORDS_FILE": str(words),
            "TMPDIR": str(checkout.parent),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, words.read_text(encoding="utf-8").split("\0")[:-1] if words.exists() else []


JOB = {"SLURM_JOB_ID": "7; touch canary", "SLURM_STEP_ID": "0"}


def test_words_pass_through_the_scripts_as_they_are(checkout: Path) -> None:
    for script in ("launch/train.sh", "slurm/train.sbatch", "slurm/debug.sbatch"):
        done, words = run_script(checkout, script, *WORDS, **(JOB if script.startswith("slurm") else {}))
        debug = ["debug=true"] if "debug" in script else []
        assert (done.returncode, words) == (0, ["-P", "-m", "lm_train", "train", *debug, *WORDS]), (script, done.stderr)
    assert not list(checkout.parent.rglob("canary"))


def test_a_line_of_an_array_is_words_and_no_code(checkout: Path) -> None:
    lines = checkout / "the lines"
    lines.write_text(
        "seed=1 'tracking.group=a b' \"tracking.project=c d\" e\\ f\n"
        "$(touch canary) `touch canary` ; touch canary | tee canary > canary ) -n $HOME\n"
        "seed=1 'open\n",
        encoding="utf-8",
    )
    asked = ("slurm/array.sbatch", str(lines), "recipe=gpt_debug")
    start = ["-P", "-m", "lm_train", "train", "recipe=gpt_debug"]
    _, words = run_script(checkout, *asked, SLURM_ARRAY_TASK_ID="1", **JOB)
    assert words == [*start, "seed=1", "tracking.group=a b", "tracking.project=c d", "e f"]
    _, words = run_script(checkout, *asked, SLURM_ARRAY_TASK_ID="2", **JOB)
    assert words == [*start, *lines.read_text(encoding="utf-8").splitlines()[1].split()]
    done, words = run_script(checkout, *asked, SLURM_ARRAY_TASK_ID="3", **JOB)
    assert (done.returncode, words) == (2, [])
    assert "the lines:3" in done.stderr
    done, words = run_script(checkout, *asked, SLURM_ARRAY_TASK_ID="1p;w canary", **JOB)
    assert not list(checkout.parent.rglob("canary*"))


def test_values_of_the_environment_are_no_code(checkout: Path) -> None:
    """As a job script, a site's file or a user's profile may set them."""
    code = "x; touch canary; $(touch canary) `touch canary`"
    for name in ("LM_TRAIN_CONTAINER", "account", "partition", "qos", "SLURM_CPUS_PER_TASK", "SLURM_RESTART_COUNT"):
        container = {"LM_TRAIN_CONTAINER": "env X=1"} | {name: f"env {code}" if name.startswith("LM") else code}
        run_script(checkout, "slurm/train.sbatch", "recipe=gpt_debug", **{**JOB, **container})
        assert not list(checkout.parent.rglob("canary*")), name
    shutil.copy(ROOT / "launch" / "setup.sh", checkout / "launch" / "setup.sh")
    for name in ("PYTHON", "LM_TRAIN_ROOT", "SLURM_SUBMIT_DIR", "TMPDIR"):
        run_script(checkout, "launch/setup.sh", "check", **{name: code})
        run_script(checkout, "slurm/train.sbatch", "recipe=gpt_debug", **JOB, **{name: code})
        assert not list(checkout.parent.rglob("canary*")), name


def test_a_full_disk_under_the_output_ends_nothing() -> None:
    """A batch job's output is a file, often on the disk of the run."""
    program = (
        "import sys, lm_train.output as o\no.outlive_readers()\n"
        "for i in range(3):\n    print('x' * 9000, flush=True)\n    print('y', file=sys.stderr)\n"
        "sys.stdout.flush()\nopen(sys.argv[1], 'w').write('went on')\nimport os; os._exit(0)"
    )
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Path("/dev/full").open("w") as full, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "end"
        done = subprocess.run(
            [sys.executable, "-c", program, str(file)], cwd=ROOT, stdout=full, stderr=full, timeout=60
        )
        assert (done.returncode, file.read_text()) == (0, "went on")
