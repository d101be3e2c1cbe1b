"""Starts commands over the fork server or plainly, waits for them, and keeps the undisturbed runs that others are held to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from lm_train.runs import RunFolder
from tests.chaos.injection import TRACE, ranks_of
from tests.sentences import sentences

ROOT = Path(__file__).resolve().parents[2]
MARK = "LM_CHAOS_SUITE"
"""In the environment of everything that the suite starts, so that what is left over can be found."""
PATIENCE_S = 240.0
"""For a start and its end on a machine that others use, too; a start takes about two seconds of one core."""
STEPS, EVERY, EPOCH = 60, 10, 25
"""Optimizer steps of a run, of a checkpoint, of a pass through the data."""
WORDS = {
    "recipe": "gpt_debug",
    "data.kind": "text",
    "data.tokenizer": "bytes",
    "data.num_workers": "0",
    "data.global_batch_size": "16",
    "model": "{kind: gpt, n_layer: 2, n_head: 2, n_embd: 32, block_size: 16, dropout: 0.1}",
    "optim": "{kind: adamw, learning_rate: 3e-3, schedule: linear, warmup_steps: 10}",
    "trainer.max_steps": str(STEPS),
    "trainer.gradient_clip_val": "0.5",
    "trainer.log_every_n_steps": "7",
    "trainer.val_check_interval": "15",
    "trainer.limit_val_batches": "2",
    "trainer.sample_tokens": "0",
    "checkpoint.every_n_steps": str(EVERY),
    "tracking.wandb": "disabled",
}
"""33,000 parameters; logging, validation, checkpoint and epoch have boundaries that do not fall together."""


class Failed(AssertionError):
    """Something that the suite is there to find."""


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    """Exit code, or minus the signal."""
    output: str
    """Of this start and the ones before it."""
    seconds: float
    own: str
    """Of this start."""


class Started:
    """A command that runs."""

    def __init__(self, bench: Bench, number: int, output: Path, process: subprocess.Popen[bytes] | None) -> None:
        self.bench, self.number, self.output, self.process = bench, number, output, process
        self.began = time.monotonic()
        self.pid = process.pid if process is not None else 0
        self.before = 0
        """Bytes of output that earlier starts have left."""

    def ranks(self) -> list[int]:
        """Process ids of its ranks so far, in their order."""
        try:
            return ranks_of(self.pid)
        except (OSError, IndexError):
            return []

    @property
    def has_ended(self) -> bool:
        if self.process is not None:
            return self.process.poll() is not None
        self.bench.hear(0)
        return self.number in self.bench.statuses

    def wait(self, patience_s: float = PATIENCE_S) -> Ended:
        deadline = self.began + patience_s
        while not self.has_ended:
            if time.monotonic() > deadline:
                self.kill()
                raise Failed(f"still runs after {patience_s:.0f} s:\n{self.text()[-2000:]}")
            if self.process is not None:
                time.sleep(0.05)
            else:
                self.bench.hear(0.5)
        seconds = time.monotonic() - self.began
        status = self.process.returncode if self.process is not None else self.bench.statuses[self.number]
        with contextlib.suppress(OSError):
            return Ended(status, self.text(), seconds, self.output.read_bytes()[self.before :].decode(errors="replace"))
        return Ended(status, "", seconds, "")

    def until(self, so: Any, what: str, patience_s: float = PATIENCE_S) -> None:
        """Waits for a condition of the run; fails if the command ends before."""
        deadline = time.monotonic() + patience_s
        while not so():
            if self.has_ended or time.monotonic() > deadline:
                raise Failed(f"no {what} before the end or {patience_s:.0f} s:\n{self.text()[-2000:]}")
            time.sleep(0.01)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    def text(self) -> str:
        with contextlib.suppress(OSError):
            return self.output.read_text(errors="replace")
        return ""


class Straight(NamedTuple):
    """An undisturbed run."""

    ledger: str
    beats: list[list[tuple[int, str, float]]]
    """Of each rank's heart: step, phase, time."""
    weights: str
    """Digest of the last checkpoint's tensors."""


class Bench:
    """A folder to work in, and the fork server.

    Args:
        folder: is made; what cases leave in it is removed as they succeed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.token = secrets.token_hex(8)
        self.statuses: dict[int, int] = {}
        self.pids: dict[int, int] = {}
        self._server: subprocess.Popen[bytes] | None = None
        self._number = 0
        self._pending = b""
        self._plain: list[Started] = []
        self._straight: dict[tuple[str, ...], Straight] = {}

    def __enter__(self) -> Bench:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.text = self.folder / "text.txt"
        if not self.text.exists():
            self.text.write_text(_sentences(), encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for started in self._plain:
            started.kill()
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            for pipe in (self._server.stdin, self._server.stdout):
                if pipe is not None:
                    pipe.close()
        left = self.left()
        deadline = time.monotonic() + 10
        while left and time.monotonic() < deadline:
            time.sleep(0.05)
            left = self.left()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if left and kind is None:
            raise Failed(f"processes that outlived the suite: {left}")

    def left(self) -> list[int]:
        """Processes that this bench, or what it started, has started and that still are there."""
        mark = f"{MARK}={self.token}\0".encode()
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                if mark in (folder / "environ").read_bytes() + b"\0" and int(folder.name) != os.getpid():
                    found.append(int(folder.name))
        return found

    @cached_property
    def code(self) -> str:
        """Digest of the package's source: what an older one has computed is no measure."""
        found = hashlib.blake2b(digest_size=6)
        for file in sorted((ROOT / "lm_train").rglob("*.py")):
            found.update(file.read_bytes())
        return found.hexdigest()

    @property
    def environment(self) -> dict[str, str]:
        """Of everything started here: ranks that wait do not spin, caches of its own, no W&B."""
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "LM_TRAIN_", "LM_CHAOS_"))},
            MARK: self.token,
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "WANDB_MODE": "offline",
            "DS_ACCELERATOR": "cpu",
            "LM_TRAIN_MEETING_TIMEOUT": "120",
        }

    def start(
        self,
        words: Sequence[str],
        faults: Sequence[dict[str, Any]] = (),
        name: str = "output",
        environment: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Started:
        """`lm-train WORDS` as a fork of the server."""
        order = {"words": list(words), "faults": list(faults), "environment": environment or {}}
        return self._order(order, name, cwd or self.folder)

    def call(self, function: str, **arguments: Any) -> Any:
        """The result of `module:function` in a fork of the server; it gets `answer`, a file for its JSON."""
        file = self.folder / f"answer-{self._number + 1}.json"
        order = {"call": function, "arguments": arguments | {"answer": str(file)}}
        ended = self._order(order, f"call-{self._number + 1}", self.folder).wait()
        if ended.status != 0 or not file.exists():
            raise Failed(f"{function} ended with {ended.status}:\n{ended.output[-3000:]}")
        answer = json.loads(file.read_text())
        file.unlink()
        (self.folder / f"call-{self._number}.txt").unlink(missing_ok=True)
        return answer

    def plainly(self, words: Sequence[str], name: str = "output", environment: dict[str, str] | None = None) -> Started:
        """`lm-train WORDS` as users start it."""
        output = self.folder / f"{name}.txt"
        before = _size(output)
        with output.open("ab") as opened:
            process = subprocess.Popen(
                [sys.executable, "-m", "lm_train", *words],
                cwd=self.folder,
                env=self.environment | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=opened,
                stderr=opened,
                start_new_session=True,
            )
        started = Started(self, 0, output, process)
        started.before = before
        self._plain.append(started)
        return started

    def words(self, runs_dir: Path, *more: str, name: str = "run") -> list[str]:
        """A small run's; `more` win over what all have."""
        given = WORDS | {"data.path": str(self.text)} | dict(word.split("=", 1) for word in more)
        return ["train", *(f"{key}={value}" for key, value in given.items()), f"name={name}", f"runs_dir={runs_dir}"]

    def straight(self, *more: str) -> Straight:
        """The undisturbed run of these words; made once for each state of the code."""
        if more not in self._straight:
            words = "_".join(word.rpartition(".")[2] for word in more)
            folder = self.folder / "straight" / self.code / "".join(c if c.isalnum() else "-" for c in words)[-200:]
            if not (folder / "done.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                command, trace = self.words(folder, *more), {TRACE: str(folder)}
                ended = self.start(command, name=str(folder / "output"), environment=trace).wait()
                if ended.status != 0:
                    raise Failed(f"the undisturbed run of {more} ended with {ended.status}:\n{ended.output[-3000:]}")
                run = RunFolder(folder / "run")
                files = sorted(folder.glob("rank-*.json"), key=lambda file: int(file.stem.removeprefix("rank-")))
                beats = [json.loads(file.read_text()) for file in files]
                made = Straight(run.ledger.read_text(), beats, self.digest(run))
                (folder / "done.json").write_text(json.dumps(made))
            self._straight[more] = Straight(*json.loads((folder / "done.json").read_text()))
        return self._straight[more]

    def digest(self, run: RunFolder) -> str:
        """Of the newest checkpoint, wholly verified: its tensors and every rank's torch generator."""
        return self.call("tests.chaos.inside:digest", run=str(run.root))["digest"]

    def _order(self, order: dict[str, Any], name: str, cwd: Path) -> Started:
        if self._server is None or self._server.poll() is not None:
            self._start_server()
        assert self._server is not None
        assert self._server.stdin is not None
        self._number += 1
        number = self._number
        output = self.folder / f"{name}.txt"
        before = _size(output)
        text = json.dumps({"id": number, "output": str(output), "cwd": str(cwd), **order})
        self._server.stdin.write(text.encode() + b"\n")
        self._server.stdin.flush()
        started = Started(self, number, output, None)
        started.before = before
        while number not in self.pids:
            self.hear(0.5)
        started.pid = self.pids[number]
        return started

    def _start_server(self) -> None:
        log = self.folder / "server.log"
        with log.open("ab") as opened:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.server"],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=opened,
                start_new_session=True,
            )
        self._ready = False
        deadline = time.monotonic() + PATIENCE_S
        while not self._ready:
            if self._server.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"the fork server did not start: {log.read_text()[-2000:]}")
            self.hear(0.5)

    def hear(self, patience_s: float) -> None:
        """Takes the server's answers; waits for the next one at most so long."""
        assert self._server is not None
        assert self._server.stdout is not None
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._server.stdout, selectors.EVENT_READ)
            if not waiting.select(patience_s):
                return
        piece = os.read(self._server.stdout.fileno(), 1 << 16)
        if not piece:
            raise Failed(f"the fork server has ended: {(self.folder / 'server.log').read_text()[-2000:]}")
        *lines, self._pending = (self._pending + piece).split(b"\n")
        for line in lines:
            answer = json.loads(line)
            if "ready" in answer:
                self._ready = True
            elif "pid" in answer:
                self.pids[answer["id"]] = answer["pid"]
            else:
                self.statuses[answer["id"]] = answer["status"]


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _sentences() -> str:
    """So many bytes that a pass through them ends inside of a run."""
    blocks = EPOCH * 16 + 3
    lines, text = sentences(), ""
    while len(text) < blocks * 16 * 10 // 9:
        text += next(lines)
    return text
