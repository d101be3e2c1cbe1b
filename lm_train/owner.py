"""One supervisor owns a run folder. Free of torch.

The claim is a lock (flock) on `RUN/.owner` that the kernel frees when its process ends, however it ends. Its text says who
holds it, for people, and for two cases in which the lock alone is not enough: a file server that keeps the lock of a node
that is gone, and a file system that has no locks. There a claim is taken over after proof that its holder is gone: on this
host by process id and start time, elsewhere by Slurm's word, or by a minute without the sign of life that a holder gives.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import subprocess
import threading
import time
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from lm_train.errors import OutputError
from lm_train.runs import LEAVING_S, RunFolder
from lm_train.slurm import Allocation

SIGN_S = 10.0
"""How often a holder touches its claim."""
STALE_S = 60.0
"""Without a sign for so long, by the file server's own clock, a holder on another host is gone."""
SETTLE_S = 0.5
"""On a file system without locks: after which of two claims made at once both can be seen."""


class Owner:
    """The claim of one supervisor on a run folder; on several nodes the first one's supervisor holds it for all."""

    def __init__(self, folder: RunFolder, allocation: Allocation | None) -> None:
        """Takes the folder.

        An earlier start of the same Slurm job, which is being ended for its requeue, is waited for.

        Raises:
            OutputError: if another supervisor has it.
        """
        self.folder, self.path = folder, folder.root / ".owner"
        self.job = None if allocation is None else allocation.job_id
        self._token = secrets.token_hex(8)
        deadline = time.monotonic() + LEAVING_S
        while True:
            found = self._try()
            if isinstance(found, TextIOWrapper):
                self._file = found
                break
            same_job = self.job is not None and found.get("job") == self.job
            if not same_job or time.monotonic() > deadline:
                raise OutputError(
                    f"{folder.root} is at work already ({found.get('who', 'owner unknown')}{self._age()}); wait for it, or take "
                    "another name="
                )
            time.sleep(0.2)
        self._left = threading.Event()
        threading.Thread(target=self._give_signs, name="owner", daemon=True).start()

    def _try(self) -> TextIOWrapper | dict[str, Any]:
        """The open file that is claimed, or who holds it."""
        try:
            file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}; choose another place with runs_dir=DIR"
            ) from None
        locked = _lock(file)
        holder = _read(file)
        if locked and not self._is_the_file(file):  # replaced since it was opened
            file.close()
            return self._try()
        if locked or (locked is None and (not holder or self._is_gone(holder))):
            self._write(file)
            if locked or self._still_mine():
                return file
        elif self._is_gone(holder):
            taken = self._take_over(holder)
            if taken is not None:
                file.close()
                return taken
        holder = _read(file)
        file.close()
        return holder

    def _is_the_file(self, file: TextIOWrapper) -> bool:
        try:
            return os.fstat(file.fileno()).st_ino == self.path.stat().st_ino
        except OSError:
            return False

    def _still_mine(self) -> bool:
        """Without locks: whether nobody has written over this claim at the same moment."""
        time.sleep(SETTLE_S)
        with contextlib.suppress(OSError), self.path.open(encoding="utf-8") as file:
            return _read(file).get("token") == self._token
        return False

    def _write(self, file: TextIOWrapper) -> None:
        pid, host = os.getpid(), socket.gethostname()
        who = f"process {pid} on {host}" if self.job is None else f"Slurm job {self.job}, process {pid} on {host}"
        claim = {"who": who, "host": host, "boot": _boot(), "pid": pid, "began": _began(pid), "job": self.job}
        file.seek(0)
        file.truncate()
        file.write(json.dumps(claim | {"token": self._token}) + "\n")
        file.flush()

    def _take_over(self, holder: dict[str, Any]) -> TextIOWrapper | None:
        """Puts a new file in the place of one whose holder is gone; None where another process does so."""
        mark = self.path.with_name(f".owner.over-{holder.get('token', 'unknown')}")
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except OSError:  # one process alone takes a claim over
            return None
        try:
            with self.path.open(encoding="utf-8") as file:
                if _read(file).get("token") != holder.get("token"):
                    return None
            mine = self.path.with_name(f".owner.{os.getpid()}")
            fresh = mine.open("a+", encoding="utf-8")
            _lock(fresh)
            self._write(fresh)
            mine.replace(self.path)
            return fresh
        except OSError:
            return None
        finally:
            mark.unlink(missing_ok=True)

    def _is_gone(self, holder: dict[str, Any]) -> bool:
        """Whether there is proof that a holder does not live any more."""
        if not holder:
            return False
        if holder.get("host") == socket.gethostname():
            return holder.get("boot") != _boot() or _began(int(holder.get("pid", 0))) != holder.get("began")
        if holder.get("job") and holder["job"] != self.job and _slurm_has_ended(str(holder["job"])):
            return True
        age = self._silent_for()
        return age is not None and age > STALE_S

    def _silent_for(self) -> float | None:
        """Seconds since the holder's last sign, both times by the clock of the file server."""
        probe = self.path.with_name(f".owner.probe-{os.getpid()}")
        try:
            probe.touch()
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except OSError:
            return None
        finally:
            probe.unlink(missing_ok=True)

    def _age(self) -> str:
        age = self._silent_for()
        return f", last sign of life {age:.0f} s ago" if age is not None and age > 2 * SIGN_S else ""

    def _give_signs(self) -> None:
        while not self._left.wait(SIGN_S):
            with contextlib.suppress(OSError, ValueError):
                os.utime(self._file.fileno())

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        with contextlib.suppress(OSError):  # without locks the text is all there is
            self._file.truncate(0)
        self._file.close()


def _lock(file: TextIOWrapper) -> bool | None:
    """Whether the lock was had; None on a file system without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _read(file: TextIOWrapper) -> dict[str, Any]:
    try:
        file.seek(0)
        content = json.loads(file.read() or "{}")
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def _boot() -> str | None:
    """Of this start of the machine, so that a process id of before is not taken for one of now."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _began(pid: int) -> str | None:
    """When a process of this host began, in the kernel's ticks; None if there is none (proc(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        if Path("/proc/self").exists():
            return None
        try:  # a system without /proc
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass
        return "lives"


def _slurm_has_ended(job: str) -> bool:
    """Whether Slurm knows that a job does not run; False where it cannot be asked."""
    command = ["squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=3, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return False
    if done.returncode != 0:
        return "Invalid job id" in done.stderr
    states = set(done.stdout.split())
    return bool(states) and not states & {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "CONFIGURING", "SIGNALING"}
