"""Worker processes that take units in any order; what they leave behind does not depend on their number."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import connection
from types import TracebackType

from lm_train import signals
from lm_train.errors import ExitCode, LMTrainError
from lm_train.prepare.units import Unit
from lm_train.prepare.work import ShardTask, Task, Worker, start_worker

_LOOK_EVERY_S = 0.2
_END_S = 5.0

Argument = Unit | ShardTask


class WorkerLost(LMTrainError):
    """A worker process died."""

    exit_code = ExitCode.REQUEUE


class Pool:
    """Runs methods of `Worker`; with one worker in this process, where none needs to be started.

    Not a ProcessPoolExecutor: that one waits for ever for a worker that was about to start when another one died.

    Args:
        workers: most processes; they are started as they are needed.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._processes: list[_Process] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.end(at_once=kind is not None)

    def run(self, task: Task, method: str, arguments: Iterable[Argument], done: Callable[[Argument], None]) -> None:
        """Calls the method for each argument and `done` after it; each worker holds one argument, and this process the next.

        Raises:
            StopRequested: if a signal asked for a stop.
            WorkerLost: if a worker died.
            LMTrainError: what a worker raised.
        """
        if self.workers == 1:
            worker = Worker(task)
            with _one_thread():
                for argument in arguments:
                    signals.check()
                    getattr(worker, method)(argument)
                    done(argument)
            return
        idle = list(self._processes)
        running: dict[_Process, Argument] = {}
        try:
            for argument in arguments:
                while not idle and len(self._processes) == self.workers:
                    idle += self._collect(running, done)
                if not idle:
                    self._processes.append(_Process())
                    idle.append(self._processes[-1])
                process = idle.pop()
                process.send(task, method, argument)
                running[process] = argument
            while running:
                self._collect(running, done)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            signals.check()  # a signal to all processes ends workers too
            raise WorkerLost(
                "a worker process was ended from outside, as the kernel does when memory runs out; the same command "
                f"goes on, with prepare.workers={max(1, self.workers // 2)} in less memory"
            ) from None

    def _collect(self, running: dict[_Process, Argument], done: Callable[[Argument], None]) -> list[_Process]:
        """Waits a while for processes to end their argument; returns those that did."""
        signals.check()
        ready = connection.wait([process.line for process in running], timeout=_LOOK_EVERY_S)
        ended = [process for process in running if process.line in ready]
        for process in ended:
            process.receive()
            done(running.pop(process))
        return ended


class _Process:
    """One worker process and the line to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with signals.blocked():  # until it ignores them: Ctrl-C goes to all processes of a terminal
            self._process.start()
        theirs.close()

    def send(self, task: Task, method: str, argument: Argument) -> None:
        self.line.send((task, method, argument))

    def receive(self) -> None:
        """Takes the answer; raises what the worker has raised, or EOFError if it is gone."""
        answer = self.line.recv()
        if isinstance(answer, BaseException):
            raise answer

    def end(self, at_once: bool) -> None:
        self.line.close()
        if not at_once:
            self._process.join(_END_S)
        self._process.kill()
        self._process.join()


def _serve(line: connection.Connection) -> None:
    """What a worker process does: one call after another, until the line is closed."""
    start_worker()
    worker: Worker | None = None
    while True:
        try:
            task, method, argument = line.recv()
        except EOFError:
            return
        answer: BaseException | None = None
        try:
            if worker is None or worker.task != task:
                worker = Worker(task)
            getattr(worker, method)(argument)
        except Exception as error:
            answer = error
        line.send(answer)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps the tokenizer from starting threads of its own."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
