"""launch/setup.sh with a stand-in for Python and pip: once under a lock, again when the files change, clear words."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAKE_PYTHON = """#!/bin/sh
# makes a "virtual environment" whose python only writes down what it was asked, slowly
case "$*" in
  *"sys.exit(sys.version_info"*) exit ${FAKE_OLD:-0} ;;
  *"import venv, ensurepip"*) exit ${FAKE_NO_VENV:-0} ;;
  --version) echo "Python 3.9.2" ;;
  "-m venv"*)
    for folder; do :; done
    mkdir -p "$folder/bin"
    printf '#!/bin/sh\\necho "$*" >>"%s/calls"\\ncase "$*" in *install*) sleep 0.3; exit ${FAKE_PIP:-0} ;; esac\\n' \\
      "$HOME" >"$folder/bin/python"
    chmod +x "$folder/bin/python" ;;
esac
"""


class Checkout:
    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        (self.root / "launch").mkdir(parents=True)
        shutil.copy(ROOT / "launch" / "setup.sh", self.root / "launch")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root)
        self.python = folder / "python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        self.calls_file = folder / "calls"
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHON": str(self.python)}

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        command = [str(self.root / "launch" / "setup.sh"), *words]
        return subprocess.Popen(command, env=self.environment | environment, stderr=subprocess.PIPE, text=True)

    def run(self, *words: str, **environment: str) -> tuple[int, str]:
        process = self.start(*words, **environment)
        said = process.communicate(timeout=30)[1]
        return process.returncode, said

    def installs(self) -> list[str]:
        calls = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [call for call in calls if " install " in call]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_many_at_once_install_once(checkout: Checkout) -> None:
    started = [checkout.start() for _ in range(6)]
    said = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [0] * 6
    torch, everything = checkout.installs()
    assert "torch==" in torch
    assert "-e" in everything
    assert sum("installing into" in text for text in said) == 1
    assert sum("waiting for it" in text for text in said) >= 1


def test_what_is_there_is_left_alone_and_costs_nothing(checkout: Checkout) -> None:
    checkout.run()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert checkout.run() == (0, "")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.2
    assert len(checkout.installs()) == 2


def test_changed_requirements_and_the_tools_of_the_tests_install_again(checkout: Checkout) -> None:
    checkout.run()
    assert checkout.run("dev")[0] == 0
    assert "[dev]" in checkout.installs()[-1]
    assert checkout.run() == (0, ""), "with the tools is more than without"
    with (checkout.root / "constraints.txt").open("a") as file:
        file.write("# another line\n")
    assert "installing into" in checkout.run()[1]


@pytest.mark.parametrize(
    ("environment", "code", "said"),
    [
        ({"FAKE_OLD": "1"}, 2, "Python 3.9.2 is too old, 3.11 is needed"),
        ({"FAKE_NO_VENV": "1"}, 2, "apt-get install python3-venv"),
        ({"PYTHON": "no-such-python"}, 2, "apt-get install python3 python3-venv"),
        ({"FAKE_PIP": "1"}, 1, "the installation failed"),
    ],
)
def test_what_is_missing_is_named(checkout: Checkout, environment: dict[str, str], code: int, said: str) -> None:
    found, words = checkout.run(**environment)
    assert found == code
    assert said in words
    assert checkout.run()[0] == 0, "and mended, it works"


def test_unknown_words_are_refused(checkout: Checkout) -> None:
    code, said = checkout.run("everything")
    assert code == 2
    assert "usage:" in said
