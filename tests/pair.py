"""Two real rank processes that run one case after another: starting them costs more than most cases."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CASE_TIMEOUT_S = 180


class Pair:
    """`pair.run("function_of_rank_cases", key=value)` calls it on both ranks and returns [rank 0's, rank 1's] answer.

    An error or a timeout on either rank ends both, and the test fails with the rank's traceback.
    """

    def __init__(self, size: int = 2) -> None:
        self.size = size
        self.ranks: list[subprocess.Popen[str]] = []
        self._port = socket.socket()

    def __enter__(self) -> Pair:
        # kept bound until the end: nobody else is given the port while the ranks start, and rank 0 may still listen on it
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(("127.0.0.1", 0))
        port = self._port.getsockname()[1]
        for rank in range(self.size):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
                "WORLD_SIZE": str(self.size),
                "LOCAL_WORLD_SIZE": str(self.size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            self.ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.rank_cases"],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def ended(self) -> bool:
        return any(rank.poll() is not None for rank in self.ranks)

    def end(self) -> None:
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.wait()
        self._port.close()

    def run(self, case: str, **arguments: Any) -> list[Any]:
        order = json.dumps({"case": case, "arguments": arguments}) + "\n"
        timer = threading.Timer(CASE_TIMEOUT_S, self.end)
        timer.start()
        try:
            for rank in self.ranks:
                assert rank.stdin is not None
                rank.stdin.write(order)
                rank.stdin.flush()
            answers = [self._answer(i) for i in range(self.size)]
        except BaseException:
            self.end()
            raise
        finally:
            timer.cancel()
        return answers

    def _answer(self, index: int) -> Any:
        stream = self.ranks[index].stdout
        assert stream is not None
        for line in stream:
            if line.startswith("ANSWER "):
                answer = json.loads(line.removeprefix("ANSWER "))
                if "error" in answer:
                    raise AssertionError(f"rank {index}:\n{answer['error']}")
                return answer["result"]
        raise AssertionError(f"rank {index} ended, or took longer than {CASE_TIMEOUT_S} s")
