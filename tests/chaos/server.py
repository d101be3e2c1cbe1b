"""A process that has imported everything and forks: `python -m tests.chaos.server`, one JSON order a line.

A command is forked from here, and its ranks from the command: they are real processes with real parents, process groups,
signals, deaths and gloo, that only did not import torch each for itself. Two things are done so that a fork is like a new
process: descriptors that an `exec` would close are closed, and generators that a new process draws from the system's entropy
are drawn anew. What differs still: the command line that /proc shows, and the seed of Python's hashes.

    {"id": 1, "words": ["train", ...], "cwd": .., "output": FILE, "environment": {..}, "faults": [..]}   a command
    {"id": 2, "call": "module:function", "arguments": {..}, "output": FILE, ...}                         a function
    {"id": 1, "pid": 123} ... {"id": 1, "status": 75}                                                   the answers
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

RANK = "lm_train.rank"
faults: list[dict[str, Any]] = []
"""What the ranks of the command in this process are to suffer; see `tests.chaos.injection`."""


class ForkedRank(subprocess.Popen):  # type: ignore[type-arg]
    """What the supervisor takes for `subprocess.Popen`: a rank is forked from this process, everything else is executed."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        if RANK not in args:
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        names = (
            "executable preexec_fn close_fds pass_fds cwd env startupinfo creationflags shell p2cread p2cwrite c2pread "
            "c2pwrite errread errwrite restore_signals gid gids uid umask start_new_session process_group"
        )
        given = dict(zip(names.split(), rest, strict=True))
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become_rank(list(args), given)
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in pipes))  # type: ignore[attr-defined]


def _become_rank(args: list[str], given: dict[str, Any]) -> NoReturn:
    """Runs the rank in this fork, and ends with its exit code."""
    code = 70
    try:
        os.setpgid(0, given["process_group"])
        for source, target in ((given["p2cread"], 0), (given["c2pwrite"], 1), (given["errwrite"], 2)):
            if source != -1:
                os.dup2(source, target)
        _close_all_but({0, 1, 2, *given["pass_fds"]})
        os.environ.clear()
        os.environ.update(given["env"])
        sys.argv = args[args.index(RANK) :]
        _forget_randomness()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        from lm_train import rank
        from tests.chaos import injection

        injection.arm(faults)
        code = rank.main()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _forget_randomness() -> None:
    """As a new process has it: NumPy's generator from the system's entropy (Python's own is drawn anew by every fork)."""
    import numpy as np

    np.random.seed(int.from_bytes(os.urandom(4), "little"))


def _close_all_but(kept: set[int]) -> None:
    for descriptor in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if descriptor not in kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _become_command(order: dict[str, Any]) -> NoReturn:
    code = 70
    try:
        os.setsid()
        from lm_train import signals

        signals.die_with_parent()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _close_all_but({0, 1, 2})
        os.chdir(order["cwd"])
        os.environ.update(order.get("environment", {}))
        _forget_randomness()
        if "words" in order:
            faults[:] = order.get("faults", [])
            subprocess.Popen = ForkedRank  # type: ignore[misc]
            from lm_train import cli

            code = cli.main(order["words"])
        else:
            module, _, name = order["call"].partition(":")
            code = getattr(importlib.import_module(module), name)(**order["arguments"]) or 0
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _import_all() -> None:
    """What commands and ranks import; no thread may start, since a fork has only the one that forks."""
    for name in ("numpy", "torch", "lightning.pytorch", "deepspeed", "lm_train.cli", "lm_train.launch", "lm_train.train",
                 "lm_train.rank", "lm_train.dry_run", "lm_train.folds", "lm_train.strategy.zero",
                 "torch.distributed.fsdp", "tests.chaos.injection"):  # fmt: skip
        importlib.import_module(name)
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, f"{len(threads)} threads after the imports"
    gc.collect()
    gc.freeze()  # the children share these pages as long as nobody writes to them


def main() -> None:
    from lm_train import signals

    signals.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _import_all()
    _say({"ready": True})
    waiting = selectors.DefaultSelector()
    waiting.register(0, selectors.EVENT_READ)
    running: dict[int, tuple[int, int]] = {}
    pending = b""
    while True:
        for key, _ in waiting.select():
            if key.fd == 0:
                piece = os.read(0, 1 << 16)
                if not piece:
                    os._exit(0)  # and the kernel ends the commands, and with them their ranks
                *lines, pending = (pending + piece).split(b"\n")
                for line in lines:
                    order = json.loads(line)
                    pid = os.fork()
                    if pid == 0:
                        _become_command(order)
                    descriptor = os.pidfd_open(pid)
                    running[descriptor] = (order["id"], pid)
                    waiting.register(descriptor, selectors.EVENT_READ)
                    _say({"id": order["id"], "pid": pid})
            else:
                number, pid = running.pop(key.fd)
                waiting.unregister(key.fd)
                os.close(key.fd)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                _say({"id": number, "status": status})


def _say(answer: dict[str, Any]) -> None:
    os.write(_ANSWERS, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    # what anything prints goes to the error stream: the answers have the output for themselves
    _ANSWERS = os.dup(1)
    os.dup2(2, 1)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
