"""`lm-train train` as a real process, its ranks, and what is left of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lm_train.runs import RunFolder, read_jsonl
from tests.conftest import TINY

ENDLESS = ("trainer.max_steps=1000000", "trainer.log_every_n_steps=20", "checkpoint.every_n_steps=100000")


class Command:
    """`lm-train train` as a real process in a folder of its own; whatever is left of it is killed at the end."""

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        given = dict(word.split("=", 1) for word in (*TINY, *words))
        self.root = folder / "runs" / given["name"]
        self.run = RunFolder(self.root)
        command = [sys.executable, "-m", "lm_train", "train", *(f"{k}={v}" for k, v in given.items())]
        self.process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def wait_for_steps(self) -> None:
        deadline = time.monotonic() + 90
        while not (self.run.metrics.exists() and len(list(read_jsonl(self.run.metrics))) >= 2):
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, "no step within 90 s"
            time.sleep(0.05)

    def ranks(self) -> dict[int, int]:
        """Process ids by rank."""
        found = {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, StopIteration):
                pid = int(folder.name)
                if (
                    f"lm_train.rank\0{self.run.root.relative_to(self.root.parent.parent)}\0".encode()
                    not in (folder / "cmdline").read_bytes()
                ):
                    continue
                if (folder / "cwd").resolve() == self.root.parent.parent:
                    environment = (folder / "environ").read_bytes().split(b"\0")
                    found[int(next(e for e in environment if e.startswith(b"RANK="))[5:])] = pid
        return found

    def end(self, timeout: float = 90) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def clean(self) -> None:
        for pid in self.ranks().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
