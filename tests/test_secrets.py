"""Secrets come from the environment and reach no file and no screen: canaries are planted, and every byte is searched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lm_train import cli, rank, runs, tracking
from lm_train.errors import ExitCode
from lm_train.hardware import Machine
from lm_train.plan import make_plan
from lm_train.recipe import PLUGINS_VARIABLE, load
from lm_train.runs import RunFolder
from lm_train.train import train
from tests.conftest import TINY
from tests.pair import ROOT
from tests.wandb_server import WandbServer

CANARY = "canary-5d1f0c"
NewRun = Callable[..., RunFolder]
ENVIRONMENT = {
    "WANDB_API_KEY": f"{CANARY}-wandb-0123456789012345678901234567",
    "HF_TOKEN": f"hf_{CANARY}",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}/aws+1",
    "DATABASE_PASSWORD": f"{CANARY} with a space",
    "MY_SERVICE_CREDENTIALS": f"{CANARY}-credentials-7",
    "GITHUB_TOKEN": f"ghp_{CANARY}",
    "no_proxy": "127.0.0.1",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a .netrc, temporary files of its own, and an environment full of secrets."""
    folder = tmp_path / "home"
    folder.mkdir()
    netrc = folder / ".netrc"
    netrc.write_text(
        f"machine api.wandb.ai login user password {CANARY}-netrc\nmachine 127.0.0.1 login user password {CANARY}-n\n"
    )
    netrc.chmod(0o600)
    (tmp_path / "tmp").mkdir()
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_MODE", "HTTP_PROXY", "http_proxy", "https_proxy", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    return folder


def leaks(*folders: Path) -> list[str]:
    """Files that hold the canary, but for the one it was planted in."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file() and file.name != ".netrc"]
    assert files
    return [str(file) for file in files if CANARY.encode() in file.read_bytes() or CANARY in str(file)]


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as started:
        yield started


def test_a_run_that_is_tracked_resumed_and_planned(
    home: Path, new_run: NewRun, server: WandbServer, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], tmp_path: Path, cache: Path,
) -> None:  # fmt: skip
    """Online by a URL with a password, then offline since nobody answers there, then a job file."""
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT_S", 3.0)
    monkeypatch.setenv("WANDB_BASE_URL", server.url.replace("://", f"://user:{CANARY}-url@"))
    run = new_run("tracking.wandb=auto", "trainer.max_steps=2")
    train(run)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://user:{CANARY}-url@127.0.0.1:9")
    train(new_run("tracking.wandb=auto", "trainer.max_steps=4"), runs.latest_checkpoint(run))
    job = tmp_path / "job.sbatch"
    assert cli.main(["plan", *TINY, "cluster=h100x8", f"sbatch={job}", "format=json"]) == 0
    assert cli.main(["show", "recipe=gpt_debug"]) == 0
    assert list(run.wandb.rglob("*.wandb"))
    assert list(run.wandb.rglob("debug*.log"))
    assert job.exists()
    assert leaks(tmp_path, cache) == []
    out = capfd.readouterr()
    assert CANARY not in out.out + out.err
    assert not [
        body[max(0, body.index(CANARY.encode()) - 200) :][:400] for body in server.bodies if CANARY.encode() in body
    ]


MODULE = """
import os, sys, warnings
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        print("building with", os.environ["WANDB_API_KEY"])
        warnings.warn("https://me:" + os.environ["GITHUB_TOKEN"] + "@host is slow")
        self.net = nn.Embedding(257, 257)

    def forward(self, tokens):
        if self.training:
            raise RuntimeError(f"cannot reach https://me:{os.environ['HF_TOKEN']}@host?sig={os.environ['HF_TOKEN']} with "
                               f"{os.environ['AWS_SECRET_ACCESS_KEY']} or {os.environ['DATABASE_PASSWORD']}")
        return self.net(tokens)

def build():
    return Net()
"""


def words_of_the_failing_run(tmp_path: Path, text_file: Path) -> list[str]:
    (tmp_path / "parts.py").write_text(MODULE)
    return [
        *(word for word in TINY if not word.startswith(("model", "tracking"))),
        "model={kind: custom, factory: 'parts:build', block_size: 16}",
        f"data.path={text_file}",
        f"runs_dir={tmp_path}/runs",
        "name=r",
        "tracking.wandb=offline",
    ]


FAILED = "cannot reach https://***@host?sig=*** with *** or ***"


def test_an_error_with_secrets_in_its_message(
    home: Path, tmp_path: Path, text_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A rank that fails; what it leaves behind are messages and tracebacks."""
    recipe = load(words_of_the_failing_run(tmp_path, text_file))
    run = runs.create(recipe, make_plan(recipe, Machine(cpu_cores=2, gpus=())))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(PLUGINS_VARIABLE, "parts")
    monkeypatch.setattr(sys, "argv", ["rank", str(run.root)])
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # put back afterwards
    for name in ("die_with_parent", "listen"):
        monkeypatch.setattr(f"lm_train.signals.{name}", lambda: None)
    assert rank.main() == ExitCode.BUG
    told = json.loads((run.errors / "rank-0.json").read_text())
    assert FAILED in told["message"]
    assert FAILED in (run.errors / "rank-0.traceback").read_text()
    out = capfd.readouterr()
    assert "building with ***" in out.out
    assert CANARY not in out.out + out.err
    assert leaks(tmp_path, cache) == []


@pytest.mark.slow
def test_a_real_run_that_fails(home: Path, tmp_path: Path, text_file: Path, cache: Path) -> None:
    """Two ranks and their supervisor: logs of the ranks, and what the supervisor says."""
    words = [*words_of_the_failing_run(tmp_path, text_file), "plugins=parts", "trainer.devices=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "lm_train", "train", *words]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == ExitCode.BUG
    assert FAILED in done.stderr, done.stderr
    errors = tmp_path / "runs" / "r" / "errors"
    assert "building with ***" in (errors / "rank-1.log").read_text()
    assert list(errors.glob("rank-*.traceback"))
    assert CANARY not in done.stdout + done.stderr
    assert leaks(tmp_path, cache) == []


@pytest.mark.parametrize(
    "word",
    [
        f"data.path=https://me:{CANARY}@host/text.txt",
        f"data.path=s3://bucket/x?X-Amz-Signature={CANARY}",
        f"tracking.group={ENVIRONMENT['HF_TOKEN']}",
        f"tracking.tags=['{ENVIRONMENT['AWS_SECRET_ACCESS_KEY']}']",
        f"tracking.api_key={CANARY}",
        f"wandb_api_key={CANARY}",
        f"model={{kind: custom, factory: 'a:b', args: {{api_key: {CANARY}}}}}",
        f"https://me:{CANARY}@host/",
        f"runs_dir=https://me:{CANARY}@host/",
        f"resume=https://me:{CANARY}@host/",
        f"plan=https://me:{CANARY}@host/",
        f"cluster=https://me:{CANARY}@host/x.yaml",
        f"recipe=https://me:{CANARY}@host/x.yaml",
        f"--data.path=https://me:{CANARY}@host/x",
        f"data.pth=https://me:{CANARY}@host/x",
        f"trainer.max_steps={ENVIRONMENT['GITHUB_TOKEN']}",
    ],
)
def test_what_was_typed_is_not_shown(word: str, home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = [] if word.startswith("recipe") else ["recipe=gpt_debug"]
    others = [] if word.startswith("runs_dir") else [f"runs_dir={tmp_path}/runs"]
    for verb in ("train", "plan", "show"):
        code = cli.main([verb, *recipe, *others, word])
        out = capfd.readouterr()
        assert code == 2, (verb, out)
        assert len([line for line in out.err.splitlines() if line.startswith("lm-train")]) == 1, out.err
        assert CANARY not in out.out + out.err
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [home / ".netrc"]


def test_a_secret_in_a_file_of_a_recipe(home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    for text in (
        f"data: {{kind: text, path: 'https://me:{CANARY}@host/x'}}\n",
        f"tracking: {{wandb_api_key: {CANARY}}}\n",
    ):
        file.write_text(text)
        assert cli.main(["train", f"recipe={file}", f"runs_dir={tmp_path}/runs"]) == 2
        out = capfd.readouterr()
        assert "environment" in out.err
        assert "mine.yaml:1" in out.err
        assert CANARY not in out.out + out.err
    assert not (tmp_path / "runs").exists()
